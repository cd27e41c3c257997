-- tenant/touch: note that tenants are in use, and under which clock their data is kept.
--
-- KEYS  1 names  zset  tenant -> 0, for listing in order
--       2 seen   zset  tenant -> the millisecond of its last touch
--       3 clocks hash  tenant -> server | caller
-- ARGV  1 now_ms "" for the server's clock
--       2 mark   server | caller: the clock of the client that asks
-- ITEM  tenant: its encoded text
-- REPLY now_ms, per item: noted | other_clock
-- ERRORS LK_ARGUMENT
-- FLAGS none
-- COST  O(m log n) for m items, n tenants
local names, seen, clocks = KEYS[1], KEYS[2], KEYS[3]
local now_ms, mark = ARGV[1], ARGV[2]

local now = clock(now_ms)
local count = #ARGV - 2
if not now then
  return refuse("now_ms")
end
if mark ~= "server" and mark ~= "caller" then
  return refuse("mark")
end
if count < 1 or count > ITEMS_MAX then
  return refuse("items")
end
local tenants = {}
for i = 1, count do
  tenants[i] = ARGV[2 + i]
end
local marks = values_of(clocks, tenants)

local reply, name_pairs, seen_pairs, clock_pairs = { now }, {}, {}, {}
local now_text = integer(now)
for i = 1, count do
  if marks[i] and marks[i] ~= mark then
    reply[i + 1] = "other_clock"
  else
    reply[i + 1] = "noted"
    local n = #name_pairs
    name_pairs[n + 1], name_pairs[n + 2] = "0", tenants[i]
    seen_pairs[n + 1], seen_pairs[n + 2] = now_text, tenants[i]
    clock_pairs[n + 1], clock_pairs[n + 2] = tenants[i], mark
  end
end

write("ZADD", names, name_pairs)
write("ZADD", seen, seen_pairs)
write("HSET", clocks, clock_pairs)
return reply
