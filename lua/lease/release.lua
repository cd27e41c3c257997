-- lease/release: the holder gives its leases back before their end.
--
-- KEYS  1 docs  hash name -> status, token, fence, acquired_at, expires_at, owner
--       2 due   zset name -> end of the lease
--       3 names zset name -> 0, for listing in order
-- ARGV  1 now_ms   "" for the server's clock
--       2 repeated 1 if the caller sent these items before and does not know what became of it
-- ITEM  name token
-- REPLY now_ms, per item: released | lost | forgotten
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
-- WHY   What was released is remembered for five minutes, so that a repeat gets the first answer.
local docs, due, names = KEYS[1], KEYS[2], KEYS[3]
local now_ms, repeated = ARGV[1], ARGV[2]

local FIXED, WIDTH = 2, 2
local now = clock(now_ms)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if not is_flag(repeated) then
  return refuse("repeated")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local asked = {}
for i = 1, count do
  asked[i] = ARGV[FIXED + 2 * i - 1]
end
local lines = values_of(docs, asked)
local over = redis.call("ZRANGEBYSCORE", due, "-inf", integer(now - ENDED_KEEP_MS),
  "LIMIT", "0", integer(math.min(2 * count + 10, PRUNE_ROWS_MAX)))

local reply, handled = { now }, {}
local doc_pairs, due_pairs, moved = {}, {}, {}
for i = 1, count do
  local name, token = asked[i], ARGV[FIXED + 2 * i]
  local line = handled[name] or lines[i]
  local lease = read_lease(line)
  if lease and lease.token == token and lease.status == "released" then
    reply[i + 1] = "released"
  elseif lease and lease.token == token and lease.expires_at > now then
    handled[name] = lease_line("released", token, lease.fence, lease.acquired_at, now, lease.owner)
    reply[i + 1] = "released"
    local n = #doc_pairs
    doc_pairs[n + 1], doc_pairs[n + 2] = name, handled[name]
    due_pairs[n + 1], due_pairs[n + 2] = integer(now), name
    moved[#moved + 1] = name
  elseif not line and repeated == "1" then
    reply[i + 1] = "forgotten"
  else
    reply[i + 1] = "lost"
  end
end
local ended = {}
for i = 1, #over do
  if not handled[over[i]] then
    ended[#ended + 1] = over[i]
  end
end

write("ZREM", due, moved)
write("HDEL", docs, ended)
write("ZREM", due, ended)
write("ZREM", names, ended)
write("ZADD", due, due_pairs)
write("HSET", docs, doc_pairs)
return reply
