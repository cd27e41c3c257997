-- ledger/compact: replace the oldest events of a run's log by one marker; their ids stay known.
--
-- KEYS  1 log    zset event id -> its place in the sequence
--       2 events hash event id -> place, instant and JSON
-- ARGV  1 now_ms  "" for the server's clock
--       2 marker  event id of the marker
--       3 place   of the marker: that of the last event that goes
--       4 event   the marker as JSON
-- ITEM  event_id: of an event that goes, older markers included
-- REPLY now_ms, per item: compacted | missing
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
local log, events = KEYS[1], KEYS[2]
local now_ms, marker, place, event = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local FIXED = 4
local now = clock(now_ms)
local count = #ARGV - FIXED
if not now then
  return refuse("now_ms")
end
if marker == "" or not whole(place, 0, NEVER_MS) then
  return refuse("marker")
end
if count < 1 or count > ITEMS_MAX then
  return refuse("items")
end
local ids = {}
for i = 1, count do
  ids[i] = ARGV[FIXED + i]
end
local stored = values_of(events, ids)

local reply, gone, event_pairs = { now }, {}, {}
for i = 1, count do
  local seq = stored[i] and string.match(stored[i], "^%d+")
  if seq then
    gone[#gone + 1] = ids[i]
    local n = #event_pairs
    event_pairs[n + 1], event_pairs[n + 2] = ids[i], seq
  end
  reply[i + 1] = seq and "compacted" or "missing"
end

write("ZREM", log, gone)
if #gone > 0 then
  local n = #event_pairs
  event_pairs[n + 1], event_pairs[n + 2] = marker, place .. " " .. integer(now) .. "\n" .. event
  redis.call("ZADD", log, place, marker)
  write("HSET", events, event_pairs)
end
return reply
