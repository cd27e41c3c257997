-- ledger/append: add events to the log of one run, each once.
--
-- KEYS  1 log    zset event id -> its place in the sequence
--       2 events hash event id -> place and JSON; place alone once it was compacted
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  event_id seq event: seq = "" for the next place, else the place to get; event = JSON
-- REPLY now_ms, per item: appended seq | known seq | taken
-- ERRORS LK_ARGUMENT
-- FLAGS none
-- COST  O(m log n) for m items
-- WHY   The id decides, not the content: whoever appends the same event again is told its place.
--       The last place that was given outlives the events, under the empty id.
local log, events = KEYS[1], KEYS[2]
local now_ms = ARGV[1]

local FIXED, WIDTH = 1, 3
-- Places above it could be counted on no further.
local SEQ_MAX = 1000000000000000
local now = clock(now_ms)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local ids = { "" }
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local id, seq = ARGV[base + 1], ARGV[base + 2]
  if id == "" then
    return refuse("event_id")
  end
  if seq ~= "" and not whole(seq, 1, SEQ_MAX) then
    return refuse("seq")
  end
  ids[i + 1] = id
end
local stored = values_of(events, ids)
local last = tonumber(stored[1] or "0")
local taken = {}
for i = 1, count do
  local seq = ARGV[FIXED + (i - 1) * WIDTH + 2]
  if seq ~= "" and not stored[i + 1] then
    seq = integer(tonumber(seq))
    taken[seq] = redis.call("ZCOUNT", log, seq, seq) > 0
  end
end

local reply, places, log_pairs, event_pairs = { now }, {}, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local id = ids[i + 1]
  local place = places[id] or (stored[i + 1] and string.match(stored[i + 1], "^%d+"))
  local seq = integer(ARGV[base + 2] == "" and last + 1 or tonumber(ARGV[base + 2]))
  if place then
    reply[i + 1] = { "known", place }
  elseif taken[seq] then
    reply[i + 1] = "taken"
  else
    last = math.max(last, tonumber(seq))
    places[id], taken[seq] = seq, true
    reply[i + 1] = { "appended", seq }
    local n = #log_pairs
    log_pairs[n + 1], log_pairs[n + 2] = seq, id
    event_pairs[n + 1], event_pairs[n + 2] = id, seq .. "\n" .. ARGV[base + 3]
  end
end

if #log_pairs > 0 then
  local n = #event_pairs
  event_pairs[n + 1], event_pairs[n + 2] = "", integer(last)
  write("ZADD", log, log_pairs)
  write("HSET", events, event_pairs)
end
return reply
