-- ledger/compact: replace events of a run's log by one marker; their ids stay known.
--
-- KEYS  1 log    zset event id -> its place in the sequence
--       2 events hash event id -> place and JSON; place alone once it was compacted
-- ARGV  1 now_ms "" for the server's clock
--       2 marker event id of the marker
--       3 place  of the marker: that of the last event that goes
--       4 token  name of this compaction
--       5 event  the marker as JSON
-- ITEM  event_id: of an event that goes, older markers included
-- REPLY now_ms, for all items together: compacted | changed event_id
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
-- WHY   The marker counts the events that it stands for: all of them go, or none does, where one
--       has gone already.
local log, events = KEYS[1], KEYS[2]
local now_ms, marker, place, token, event = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

local FIXED = 5
local now = clock(now_ms)
local count = #ARGV - FIXED
if not now then
  return refuse("now_ms")
end
if marker == "" then
  return refuse("marker")
end
if not whole(place, 1, NEVER_MS) then
  return refuse("place")
end
if not is_token(token) then
  return refuse("token")
end
if count < 1 or count > ITEMS_MAX then
  return refuse("items")
end
local ids = { marker }
for i = 1, count do
  ids[i + 1] = ARGV[FIXED + i]
end
local stored = values_of(events, ids)
local head = place .. " " .. token .. "\n"
if stored[1] and string.sub(stored[1], 1, #head) == head then
  return { now, "compacted" }
end
local gone, event_pairs = {}, {}
for i = 1, count do
  local seq = stored[i + 1] and string.match(stored[i + 1], "^(%d+)[^\n]*\n")
  if not seq then
    return { now, { "changed", ids[i + 1] } }
  end
  gone[i], event_pairs[2 * i - 1], event_pairs[2 * i] = ids[i + 1], ids[i + 1], seq
end

event_pairs[2 * count + 1], event_pairs[2 * count + 2] = marker, head .. event
write("ZREM", log, gone)
write("ZADD", log, { place, marker })
write("HSET", events, event_pairs)
return { now, "compacted" }
