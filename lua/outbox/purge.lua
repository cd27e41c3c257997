-- outbox/purge: delete finished rows or dead letters on an operator's order, the oldest first.
--
-- KEYS  1 docs   hash id -> header line and payload
--       2 state  hash id -> state line
--       3 done   zset id -> when it got there
--       4 dead   zset id -> when it got there
--       5 errors hash id -> errors of its attempts
--       6 tally  hash counts, bytes kept, horizon
-- ARGV  1 now_ms    "" for the server's clock
--       2 noun      done | dead: which list
--       3 before_ms what got there at or before this instant goes
--       4 limit     at most this many rows
-- REPLY now_ms deleted more
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m rows deleted
local docs, state, done, dead = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local errors, tally = KEYS[5], KEYS[6]
local now_ms, noun, before_ms, limit = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local now = clock(now_ms)
local before = whole(before_ms, 0, NEVER_MS)
local most = whole(limit, 1, PRUNE_ROWS_MAX)
if not now then
  return refuse("now_ms")
end
if noun ~= "done" and noun ~= "dead" then
  return refuse("noun")
end
if not before or not most then
  return refuse("before_ms limit")
end

local rows = {
  docs = docs, state = state, errors = errors, tally = tally, done = done, dead = dead,
}
local deleted = forget(rows, noun, before, NEVER_MS, NEVER_MS, most, 0)
local left = redis.call("ZCOUNT", rows[noun], "-inf", integer(before))
return { now, deleted, left > 0 and 1 or 0 }
