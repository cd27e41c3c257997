-- outbox/counts: how many rows there are, by lane and target.
--
-- KEYS  1 tally   hash counts, bytes kept, horizon
--       2 lanes   zset route -> last enqueue
--       3 done    zset id -> when it got there
--       4 dead    zset id -> when it got there
--       5 unknown zset id -> when it got there
-- ARGV  1 now_ms "" for the server's clock
--       2 limit  routes of the page
--       3 after_score where the page before ended; "" at the start
--       4 after_route the last route of the page before
-- REPLY now_ms more done dead unknown done_bytes dead_bytes, per route: route last_enqueue pending
--       claimed unknown dead_lettered sent cancelled
-- ERRORS LK_ARGUMENT
-- FLAGS no-writes
-- COST  O(routes)
local tally, lanes, done, dead, unknown = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now_ms, limit, after_score, after_route = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local COUNTED = { "pending", "claimed", "unknown", "dead_lettered", "sent", "cancelled" }
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

local start = after_score == "" and 0 or rank_after(lanes, after_score, after_route)
local routes = redis.call("ZRANGE", lanes, integer(start), integer(start + most - 1), "WITHSCORES")
local reply = {
  now,
  redis.call("ZCARD", lanes) > start + most and 1 or 0,
  redis.call("ZCARD", done),
  redis.call("ZCARD", dead),
  redis.call("ZCARD", unknown),
  tonumber(redis.call("HGET", tally, "done_bytes") or "0"),
  tonumber(redis.call("HGET", tally, "dead_bytes") or "0"),
}
for i = 1, #routes, 2 do
  local fields = {}
  for j = 1, #COUNTED do
    fields[j] = COUNTED[j] .. ":" .. routes[i]
  end
  local values = values_of(tally, fields)
  local row = { routes[i], tonumber(routes[i + 1]) }
  for j = 1, #COUNTED do
    row[j + 2] = tonumber(values[j] or "0")
  end
  reply[#reply + 1] = row
end
return reply
