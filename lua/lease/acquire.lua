-- lease/acquire: take names for a time, each by one holder at a time.
--
-- KEYS  1 docs  hash   name -> status, token, fence, acquired_at, expires_at, owner
--       2 due   zset   name -> end of the lease
--       3 names zset   name -> 0, for listing in order
--       4 fence string the last fence given
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  name token ttl_ms owner
-- REPLY now_ms, per item: acquired fence acquired_at expires_at | busy fence acquired_at expires_at
--       owner | spent: this token had the lease and released it
-- ERRORS LK_ARGUMENT
-- FLAGS none
-- COST  O(m log n) for m items
-- WHY   The token makes a repeat harmless: while it holds the lease it gets the same answer again,
--       and once it gave the lease back an old request that arrives late takes nothing.
local docs, due, names, fence = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now_ms = ARGV[1]

local FIXED, WIDTH = 1, 4
local now, micros = clock(now_ms)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local asked, lengths = {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  asked[i] = ARGV[base + 1]
  lengths[i] = whole(ARGV[base + 3], 1, LEASE_MS_MAX)
  if not lengths[i] or not is_token(ARGV[base + 2]) then
    return refuse("item")
  end
end
local lines = values_of(docs, asked)
local given = next_fence(fence, micros)
local over = redis.call("ZRANGEBYSCORE", due, "-inf", integer(now - ENDED_KEEP_MS),
  "LIMIT", "0", integer(math.min(2 * count + 10, PRUNE_ROWS_MAX)))

local reply, handled = { now }, {}
local doc_pairs, due_pairs, name_pairs = {}, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local name, token, owner = asked[i], ARGV[base + 2], ARGV[base + 4]
  local lease = read_lease(handled[name] or lines[i])
  if lease and lease.status == "held" and lease.expires_at > now then
    if lease.token == token then
      reply[i + 1] = { "acquired", lease.fence, lease.acquired_at, lease.expires_at }
    else
      reply[i + 1] = { "busy", lease.fence, lease.acquired_at, lease.expires_at, lease.owner }
    end
  elseif lease and lease.status == "released" and lease.token == token then
    reply[i + 1] = "spent"
  else
    local expires_at = now + lengths[i]
    handled[name] = lease_line("held", token, integer(given), now, expires_at, owner)
    reply[i + 1] = { "acquired", integer(given), now, expires_at }
    local n = #doc_pairs
    doc_pairs[n + 1], doc_pairs[n + 2] = name, handled[name]
    due_pairs[n + 1], due_pairs[n + 2] = integer(expires_at), name
    name_pairs[n + 1], name_pairs[n + 2] = "0", name
  end
end
local ended = {}
for i = 1, #over do
  if not handled[over[i]] then
    ended[#ended + 1] = over[i]
  end
end

if #doc_pairs > 0 then
  write("HSET", docs, doc_pairs)
  write("ZADD", due, due_pairs)
  write("ZADD", names, name_pairs)
  redis.call("SET", fence, integer(given))
end
write("HDEL", docs, ended)
write("ZREM", due, ended)
write("ZREM", names, ended)
return reply
