-- lease/extend: the holder wants its leases for longer, counted from now.
--
-- KEYS  1 docs hash name -> status, token, fence, acquired_at, expires_at, owner
--       2 due  zset name -> end of the lease
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  name token ttl_ms
-- REPLY now_ms, per item: extended fence acquired_at expires_at owner | lost
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
local docs, due = KEYS[1], KEYS[2]
local now_ms = ARGV[1]

local FIXED, WIDTH = 1, 3
local now = clock(now_ms)
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
  if not lengths[i] then
    return refuse("ttl_ms")
  end
end
local lines = values_of(docs, asked)

local reply, handled = { now }, {}
local doc_pairs, due_pairs, moved = {}, {}, {}
for i = 1, count do
  local name, token = asked[i], ARGV[FIXED + (i - 1) * WIDTH + 2]
  local lease = read_lease(handled[name] or lines[i])
  if lease and lease.status == "held" and lease.token == token and lease.expires_at > now then
    local expires_at = math.max(lease.expires_at, now + lengths[i])
    handled[name] =
      lease_line("held", token, lease.fence, lease.acquired_at, expires_at, lease.owner)
    reply[i + 1] = { "extended", lease.fence, lease.acquired_at, expires_at, lease.owner }
    local n = #doc_pairs
    doc_pairs[n + 1], doc_pairs[n + 2] = name, handled[name]
    due_pairs[n + 1], due_pairs[n + 2] = integer(expires_at), name
    moved[#moved + 1] = name
  else
    reply[i + 1] = "lost"
  end
end

write("ZREM", due, moved)
write("ZADD", due, due_pairs)
write("HSET", docs, doc_pairs)
return reply
