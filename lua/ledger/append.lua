-- ledger/append: add events to the log of one run, each once.
--
-- KEYS  1 log    zset event id -> its place in the sequence
--       2 events hash event id -> place, instant and JSON; place alone once it was compacted
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  event_id seq occurred_at event: seq = "" for the next one; event = JSON
-- REPLY now_ms, per item: appended seq | known seq
-- ERRORS LK_ARGUMENT
-- FLAGS none
-- COST  O(m log n) for m items
-- WHY   The id decides, not the content: whoever appends the same event again is told its place. The
--       place of the last event outlives the events, under the empty id.
local log, events = KEYS[1], KEYS[2]
local now_ms = ARGV[1]

local FIXED, WIDTH = 1, 4
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
  ids[i + 1] = ARGV[base + 1]
  local seq = ARGV[base + 2]
  if ARGV[base + 1] == "" or (seq ~= "" and not whole(seq, 0, NEVER_MS)) then
    return refuse("item")
  end
  if not whole(ARGV[base + 3], 0, NEVER_MS) then
    return refuse("occurred_at")
  end
end
local stored = values_of(events, ids)
local last = tonumber(stored[1] or "0")

local reply, places, log_pairs, event_pairs = { now }, {}, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local id = ids[i + 1]
  local place = places[id] or (stored[i + 1] and string.match(stored[i + 1], "^%d+"))
  if place then
    reply[i + 1] = { "known", place }
  else
    local seq = ARGV[base + 2] == "" and last + 1 or tonumber(ARGV[base + 2])
    last = math.max(last, seq)
    places[id] = integer(seq)
    reply[i + 1] = { "appended", places[id] }
    local n = #log_pairs
    log_pairs[n + 1], log_pairs[n + 2] = places[id], id
    event_pairs[n + 1] = id
    event_pairs[n + 2] = places[id] .. " " .. ARGV[base + 3] .. "\n" .. ARGV[base + 4]
  end
end

if #log_pairs > 0 then
  event_pairs[#event_pairs + 1] = ""
  event_pairs[#event_pairs + 1] = integer(last)
  write("ZADD", log, log_pairs)
  write("HSET", events, event_pairs)
end
return reply
