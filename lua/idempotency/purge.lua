-- idempotency/purge: delete records on an operator's order.
--
-- KEYS  1 docs hash record id -> the record
--       2 due  zset record id -> when it may be forgotten
-- ARGV  1 now_ms      "" for the server's clock
--       2 limit       records looked at
--       3 after_score where the call before ended; "" at the start
--       4 after_id    the last record id looked at by the call before
--       5 before_ms   only records last seen at or before this instant go
--       6 unfinished  1 to delete reservations as well
-- REPLY now_ms more last_score last_id deleted
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(log n + records looked at, at most 250)
local docs, due = KEYS[1], KEYS[2]
local now_ms, limit, after_score, after_id = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local before_ms, unfinished = ARGV[5], ARGV[6]

local now = clock(now_ms)
local most = whole(limit, 1, PRUNE_ROWS_MAX)
local before = whole(before_ms, 0, NEVER_MS)
if not now then
  return refuse("now_ms")
end
if not most or not before then
  return refuse("limit before_ms")
end
if not is_flag(unfinished) then
  return refuse("unfinished")
end
if after_score ~= "" and not whole(after_score, 0, NEVER_MS) then
  return refuse("after_score")
end

local start = after_score == "" and 0 or rank_after(due, after_score, after_id)
local found = redis.call("ZRANGE", due, integer(start), integer(start + most - 1), "WITHSCORES")
local ids, reply = {}, { now, 0, "0", "", 0 }
for i = 1, #found, 2 do
  ids[#ids + 1] = found[i]
  reply[3], reply[4] = found[i + 1], found[i]
end
local stored, gone = values_of(docs, ids), {}
for i = 1, #ids do
  local record = read_record(stored[i])
  if not record or (tonumber(record.last_seen) <= before
    and (record.completed_at ~= "~" or record.status == "released" or unfinished == "1")) then
    gone[#gone + 1] = ids[i]
  end
end
reply[2] = redis.call("ZCARD", due) > start + #ids and 1 or 0
reply[5] = #gone

write("HDEL", docs, gone)
write("ZREM", due, gone)
return reply
