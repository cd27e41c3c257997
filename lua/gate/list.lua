-- gate/list: a page of intents, in the order of one of their lists.
--
-- KEYS  1 members zset intent id -> its place: unknown, dead, done, expiring or updated
--       2 docs    hash intent id -> the intent as JSON
--       3 state   hash intent id -> state line
--       4 facts   hash intent id -> what was said of it
-- ARGV  1 now_ms      "" for the server's clock
--       2 limit       intents of the page
--       3 after_score where the page before ended; "" at the start
--       4 after_id    the last intent looked at by the page before
--       5 statuses    "" or wanted statuses, each between blanks
--       6 newest      1 = from the end of the list
-- REPLY now_ms more last_score last_id, per intent: id intent state facts
-- ERRORS LK_ARGUMENT
-- FLAGS no-writes
-- COST  O(log n + intents looked at, at most 1 000)
local members, docs, state, facts = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now_ms, limit, after_score, after_id = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local statuses, newest = ARGV[5], ARGV[6]

local now = clock(now_ms)
local wanted = whole(limit, 1, ITEMS_MAX)
if not now then
  return refuse("now_ms")
end
if not wanted then
  return refuse("limit")
end
if after_score ~= "" and not whole(after_score, 0, NEVER_MS) then
  return refuse("after_score")
end
if not is_flag(newest) then
  return refuse("newest")
end

local range, start = "ZRANGE", 0
if newest == "1" then
  range = "ZREVRANGE"
end
if after_score ~= "" and newest == "0" then
  start = rank_after(members, after_score, after_id)
elseif after_score ~= "" then
  start = redis.call("ZCARD", members) - rank_after(members, after_score, after_id)
  local there = redis.call("ZRANGE", members, integer(-start - 1), integer(-start - 1))[1]
  if there == after_id then
    start = start + 1
  end
end
local reply, taken, looked_at, bytes, more = { now, 0, "0", "" }, 0, 0, 0, false
repeat
  local found = redis.call(range, members, integer(start + looked_at),
    integer(start + looked_at + CHUNK_ROWS - 1), "WITHSCORES")
  local ids = {}
  for i = 1, #found, 2 do
    ids[#ids + 1] = found[i]
  end
  local intents, lines = values_of(docs, ids), values_of(state, ids)
  local said = values_of(facts, ids)
  for i = 1, #ids do
    if taken >= wanted or bytes > REPLY_BYTES_MAX then
      more = true
      break
    end
    looked_at = looked_at + 1
    reply[3], reply[4] = found[2 * i], ids[i]
    local row = lines[i] and read_intent(ids[i], lines[i])
    local status = row and intent_status(row, now)
    if row and (statuses == "" or string.find(statuses, " " .. status .. " ", 1, true)) then
      taken = taken + 1
      bytes = bytes + #lines[i] + #(intents[i] or "") + #(said[i] or "")
      reply[#reply + 1] = { ids[i], intents[i] or "", lines[i], said[i] or "" }
    end
  end
  local last_chunk = #ids < CHUNK_ROWS
  if not last_chunk and looked_at >= ITEMS_MAX then
    more = true
  end
until more or last_chunk
reply[2] = more and 1 or 0
return reply
