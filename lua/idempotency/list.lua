-- idempotency/list: a page of records, in the order in which they may be forgotten.
--
-- KEYS  1 docs hash record id -> the record
--       2 due  zset record id -> when it may be forgotten
-- ARGV  1 now_ms      "" for the server's clock
--       2 limit       records of the page
--       3 after_score where the page before ended; "" at the start
--       4 after_id    the last record id looked at by the page before
-- REPLY now_ms more last_score last_id, per record: id record
-- ERRORS LK_ARGUMENT
-- FLAGS no-writes
-- COST  O(log n + records looked at, at most 1 000)
local docs, due = KEYS[1], KEYS[2]
local now_ms, limit, after_score, after_id = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local now = clock(now_ms)
local most = whole(limit, 1, ITEMS_MAX)
if not now then
  return refuse("now_ms")
end
if not most then
  return refuse("limit")
end
if after_score ~= "" and not whole(after_score, 0, NEVER_MS) then
  return refuse("after_score")
end

local start = after_score == "" and 0 or rank_after(due, after_score, after_id)
local reply, taken, looked_at, bytes, more = { now, 0, "0", "" }, 0, 0, 0, false
repeat
  local found = redis.call("ZRANGE", due, integer(start + looked_at),
    integer(start + looked_at + CHUNK_ROWS - 1), "WITHSCORES")
  local ids = {}
  for i = 1, #found, 2 do
    ids[#ids + 1] = found[i]
  end
  local stored = values_of(docs, ids)
  for i = 1, #ids do
    if taken >= most or bytes > REPLY_BYTES_MAX then
      more = true
      break
    end
    looked_at = looked_at + 1
    reply[3], reply[4] = found[2 * i], ids[i]
    local record = read_record(stored[i])
    if record and record.status ~= "released" then
      taken = taken + 1
      bytes = bytes + #stored[i]
      reply[#reply + 1] = { ids[i], stored[i] }
    end
  end
  local last_chunk = #ids < CHUNK_ROWS
  if not last_chunk and looked_at >= ITEMS_MAX then
    more = true
  end
until more or last_chunk
reply[2] = more and 1 or 0
return reply
