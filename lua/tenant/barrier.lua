-- tenant/barrier: move the replication offset of the caller's connection, and change nothing.
--
-- KEYS  1 barrier hash  never there when the command is over
-- ARGV  1 now_ms  "" for the server's clock
-- REPLY now_ms
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(1)
-- WHY   WAIT waits for what its own connection wrote last. Where that wrote nothing, because a
--       repeat found everything done, Valkey and Redis 7 answer at once, and what the reply told
--       may be on no replica. This write comes between the commands and their WAIT, so that there
--       is always one. It begins with a deletion, which Redis 6.2 lets pass when memory is full, as
--       it does all that follows. A PUBLISH is cheaper and does not move the offset in a cluster.
local barrier = KEYS[1]
local now_ms = ARGV[1]

local now = clock(now_ms)
if not now then
  return refuse("now_ms")
end

redis.call("HDEL", barrier, "at")
redis.call("HSET", barrier, "at", "")
redis.call("HDEL", barrier, "at")
return { now }
