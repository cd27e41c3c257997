-- ledger/put: write records whole, whatever was there.
--
-- KEYS  1 docs   hash record -> head, places, JSON
--       2 index  zset place of a record in a list -> 0
--       3 guards hash run -> number of commits that changed records of it
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  name token words places doc: token = name of this write; words = what pages filter by
-- REPLY now_ms, per item: put revision
-- ERRORS LK_ARGUMENT
-- FLAGS none
-- COST  O(m log n) for m items
-- WHY   It stands on nothing that was read, so nothing has to be read first: one call for many.
local docs, index, guards = KEYS[1], KEYS[2], KEYS[3]
local now_ms = ARGV[1]

local FIXED, WIDTH = 1, 5
local PLACE = "^[^|]+|" .. string.rep("%d", 16) .. "|(.+)$"
local now = clock(now_ms)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local names, runs, wanted = {}, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  names[i] = ARGV[base + 1]
  local tail = string.match(names[i], "^[a-z_]+/([a-z0-9_~.-]+)$")
  if not tail then
    return refuse("name")
  end
  if not is_token(ARGV[base + 2]) then
    return refuse("token")
  end
  runs[i] = string.match(ARGV[base + 3], "^%d+ %S+ %S+ [01] (%S+)$")
  if not runs[i] then
    return refuse("words")
  end
  if string.find(ARGV[base + 4], "\n", 1, true) then
    return refuse("places")
  end
  local places = {}
  for place in string.gmatch(ARGV[base + 4], "%S+") do
    if string.match(place, PLACE) ~= tail then
      return refuse("places")
    end
    places[#places + 1] = place
  end
  wanted[i] = places
end
local stored = values_of(docs, names)

local reply, handled, order, stood, stands, raised = { now }, {}, {}, {}, {}, {}
local now_in = {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local name, token, words = names[i], ARGV[base + 2], ARGV[base + 3]
  local before = handled[name] or stored[i]
  local revision, by, was_of, stood_in
  if before then
    revision, by, was_of, stood_in =
      string.match(before, "^(%d+) (%S+) %d+ %S+ %S+ [01] (%S+)\n([^\n]*)\n")
  end
  if by == token then
    reply[i + 1] = { "put", revision }
  else
    if not handled[name] then
      order[#order + 1] = name
      stood[name] = stood_in or ""
    end
    revision = integer(tonumber(revision or "0") + 1)
    stands[name], now_in[name] = ARGV[base + 4], wanted[i]
    handled[name] = revision .. " " .. token .. " " .. words .. "\n" .. stands[name] .. "\n"
      .. ARGV[base + 5]
    local run = runs[i]
    raised[run] = (raised[run] or 0) + 1
    if was_of and was_of ~= run then
      raised[was_of] = (raised[was_of] or 0) + 1
    end
    reply[i + 1] = { "put", revision }
  end
end
local doc_pairs, gone_places, places = {}, {}, {}
for i = 1, #order do
  local name = order[i]
  doc_pairs[2 * i - 1], doc_pairs[2 * i] = name, handled[name]
  if stood[name] ~= stands[name] then
    for place in string.gmatch(stood[name], "%S+") do
      gone_places[#gone_places + 1] = place
    end
    for j = 1, #now_in[name] do
      local n = #places
      places[n + 1], places[n + 2] = "0", now_in[name][j]
    end
  end
end

write("HSET", docs, doc_pairs)
write("ZREM", index, gone_places)
write("ZADD", index, places)
add(guards, raised)
return reply
