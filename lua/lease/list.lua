-- lease/list: a page of the leases held now, in the order of their names.
--
-- KEYS  1 docs  hash name -> status, token, fence, acquired_at, expires_at, owner
--       2 names zset name -> 0, for listing in order
-- ARGV  1 now_ms "" for the server's clock
--       2 limit  leases of the page
--       3 prefix how the names begin; "" for all
--       4 after  the last name looked at by the page before; "" at the start
-- REPLY now_ms more last, per lease: name fence acquired_at expires_at owner
-- ERRORS LK_ARGUMENT
-- FLAGS no-writes
-- COST  O(log n + names looked at, at most 1 000)
local docs, names = KEYS[1], KEYS[2]
local now_ms, limit, prefix, after = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local now = clock(now_ms)
local most = whole(limit, 1, ITEMS_MAX)
if not now then
  return refuse("now_ms")
end
if not most then
  return refuse("limit")
end

local from = after ~= "" and "(" .. after or "[" .. prefix
local found = redis.call("ZRANGEBYLEX", names, from, "+", "LIMIT", "0", integer(ITEMS_MAX + 1))
local within = {}
for i = 1, math.min(#found, ITEMS_MAX) do
  if string.sub(found[i], 1, #prefix) ~= prefix then
    break
  end
  within[i] = found[i]
end
local lines = values_of(docs, within)

local reply = { now, 0, "" }
for i = 1, #within do
  if #reply - 3 >= most then
    reply[2] = 1
    break
  end
  reply[3] = within[i]
  local lease = read_lease(lines[i])
  if lease and lease.status == "held" and lease.expires_at > now then
    reply[#reply + 1] = {
      within[i], lease.fence, lease.acquired_at, lease.expires_at, lease.owner,
    }
  end
end
if #within == ITEMS_MAX and #found > ITEMS_MAX then
  reply[2] = 1
end
return reply
