-- ledger/events: a window of the log of one run, in the order of the sequence.
--
-- KEYS  1 log    zset event id -> its place in the sequence
--       2 events hash event id -> place and JSON
-- ARGV  1 now_ms "" for the server's clock
--       2 after  only places above this one; "" = all
--       3 before only places below this one; "" = all
--       4 limit  events at most
--       5 tail   1 = the last ones, else the first
-- REPLY now_ms more last, per event: event id, place, JSON; last = the last place ever given
-- ERRORS LK_ARGUMENT
-- FLAGS no-writes
-- COST  O(log n + limit)
local log, events = KEYS[1], KEYS[2]
local now_ms, after, before, limit, tail = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

local now = clock(now_ms)
local most = whole(limit, 1, ITEMS_MAX)
if not now then
  return refuse("now_ms")
end
if not most then
  return refuse("limit")
end
if after ~= "" and not whole(after, 0, NEVER_MS) then
  return refuse("after")
end
if before ~= "" and not whole(before, 0, NEVER_MS) then
  return refuse("before")
end
if not is_flag(tail) then
  return refuse("tail")
end

local low, high = after == "" and "-inf" or "(" .. after, before == "" and "+inf" or "(" .. before
local found
if tail == "1" then
  found = redis.call("ZREVRANGEBYSCORE", log, high, low, "WITHSCORES", "LIMIT", "0",
    integer(most + 1))
else
  found = redis.call("ZRANGEBYSCORE", log, low, high, "WITHSCORES", "LIMIT", "0",
    integer(most + 1))
end
local last = redis.call("HGET", events, "") or "0"
local rows = math.min(#found / 2, most)
local shown, first, bytes = {}, 1, 0
while first <= rows and bytes <= REPLY_BYTES_MAX do
  local ids = {}
  for i = first, math.min(first + CHUNK_ROWS - 1, rows) do
    ids[#ids + 1] = found[2 * i - 1]
  end
  local stored = values_of(events, ids)
  for i = 1, #ids do
    if bytes <= REPLY_BYTES_MAX then
      local text = string.match(stored[i] or "", "^[^\n]*\n(.*)$") or ""
      bytes = bytes + #text
      shown[#shown + 1] = { ids[i], found[2 * (first + i - 1)], text }
    end
  end
  first = first + CHUNK_ROWS
end

local reply = { now, #found / 2 > #shown and 1 or 0, last }
for i = 1, #shown do
  reply[3 + i] = tail == "1" and shown[#shown + 1 - i] or shown[i]
end
return reply
