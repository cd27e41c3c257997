-- outbox/get: what is stored of rows.
--
-- KEYS  1 docs   hash id -> header line and payload
--       2 state  hash id -> state line
--       3 errors hash id -> errors of its attempts
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  id
-- REPLY now_ms, per item: found doc state errors | missing
-- ERRORS LK_ARGUMENT
-- FLAGS no-writes
-- COST  O(m) for m items
local docs, state, errors = KEYS[1], KEYS[2], KEYS[3]
local now_ms = ARGV[1]

local now = clock(now_ms)
local count = #ARGV - 1
if not now then
  return refuse("now_ms")
end
if count < 1 or count > ITEMS_MAX then
  return refuse("items")
end
local ids = {}
for i = 1, count do
  ids[i] = ARGV[1 + i]
end
local found, lines = values_of(docs, ids), values_of(state, ids)
local error_lines = values_of(errors, ids)

local reply = { now }
for i = 1, count do
  if found[i] then
    reply[i + 1] = { "found", found[i], lines[i] or "", error_lines[i] or "" }
  else
    reply[i + 1] = "missing"
  end
end
return reply
