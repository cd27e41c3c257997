-- ledger/get: records by their names, and guards of runs.
--
-- KEYS  1 docs   hash record -> head, places, JSON
--       2 guards hash run -> number of commits that changed records of it
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  kind name: kind = record | guard
-- REPLY now_ms, per item: found doc | missing | guard count
-- ERRORS LK_ARGUMENT
-- FLAGS no-writes
-- COST  O(m) for m items
local docs, guards = KEYS[1], KEYS[2]
local now_ms = ARGV[1]

local FIXED, WIDTH = 1, 2
local now = clock(now_ms)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local names, runs = {}, {}
for i = 1, count do
  local kind, name = ARGV[FIXED + 2 * i - 1], ARGV[FIXED + 2 * i]
  if kind == "record" then
    names[#names + 1] = name
  elseif kind == "guard" then
    runs[#runs + 1] = name
  else
    return refuse("kind")
  end
end
local stored, counts = values_of(docs, names), values_of(guards, runs)
local reply, records, guard = { now }, 0, 0
for i = 1, count do
  if ARGV[FIXED + 2 * i - 1] == "guard" then
    guard = guard + 1
    reply[i + 1] = { "guard", counts[guard] or "0" }
  else
    records = records + 1
    reply[i + 1] = stored[records] and { "found", stored[records] } or "missing"
  end
end
return reply
