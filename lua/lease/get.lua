-- lease/get: who holds names now.
--
-- KEYS  1 docs hash name -> status, token, fence, acquired_at, expires_at, owner
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  name
-- REPLY now_ms, per item: held fence acquired_at expires_at owner | free
-- ERRORS LK_ARGUMENT
-- FLAGS no-writes
-- COST  O(m) for m items
local docs = KEYS[1]
local now_ms = ARGV[1]

local now = clock(now_ms)
local count = #ARGV - 1
if not now then
  return refuse("now_ms")
end
if count < 1 or count > ITEMS_MAX then
  return refuse("items")
end
local asked = {}
for i = 1, count do
  asked[i] = ARGV[1 + i]
end
local lines = values_of(docs, asked)

local reply = { now }
for i = 1, count do
  local lease = read_lease(lines[i])
  if lease and lease.status == "held" and lease.expires_at > now then
    reply[i + 1] = { "held", lease.fence, lease.acquired_at, lease.expires_at, lease.owner }
  else
    reply[i + 1] = "free"
  end
end
return reply
