-- gate/expire: write down as unknown what parks and whose lease has ended.
--
-- KEYS  1 state    hash intent id -> state line
--       2 expiring zset intent id -> lease end, of what parks
--       3 unknown  zset intent id -> when the destination may be asked
--       4 dead     zset intent id -> when it got there
--       5 done     zset intent id -> when it was sent or cancelled
--       6 updated  zset intent id -> its last change
--       7 runs     zset run, time of the last change, intent id -> 0
-- ARGV  1 now_ms "" for the server's clock
--       2 limit  intents written at most: 1..250
-- REPLY now_ms more written
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m intents
-- WHY   They read as unknown from the end of their lease on; this only puts them in the list that
--       is worked through.
local state, expiring, unknown, dead = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local done, updated, runs = KEYS[5], KEYS[6], KEYS[7]
local now_ms, limit = ARGV[1], ARGV[2]

local now = clock(now_ms)
local most = whole(limit, 1, PRUNE_ROWS_MAX)
if not now then
  return refuse("now_ms")
end
if not most then
  return refuse("limit")
end
local ids = redis.call("ZRANGEBYSCORE", expiring, "-inf", integer(now), "LIMIT", "0",
  integer(most))
local rows = read_intents(state, ids)

local changed, stray = {}, {}
for i = 1, #ids do
  local row = rows[ids[i]]
  if row and row ~= "damaged" and row.status == "claimed" then
    row.status, row.cause, row.revision = "unknown", "parked", row.revision + 1
    row.ask_at = integer(row.lease_end)
    changed[#changed + 1] = row
  else
    stray[#stray + 1] = ids[i]
  end
end

write("ZREM", expiring, stray)
if #changed > 0 then
  save_intents(changed, now, {
    state = state, expiring = expiring, unknown = unknown, dead = dead, done = done,
    updated = updated, runs = runs,
  })
end
return { now, #ids == most and 1 or 0, #changed }
