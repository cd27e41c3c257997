-- gate/extend: the sender needs longer.
--
-- KEYS  1 state    hash intent id -> state line
--       2 expiring zset intent id -> lease end, of what parks
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  id token lease_ms
-- REPLY now_ms, per item: extended lease_end | lost
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
-- WHY   The end is never earlier than it was, so that saying it twice is harmless. It is not a
--       change of the intent: its revision and its place in the lists by time stay.
local state, expiring = KEYS[1], KEYS[2]
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
local ids, lengths = {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  ids[i] = ARGV[base + 1]
  lengths[i] = whole(ARGV[base + 3], 1, LEASE_MS_MAX)
  if not lengths[i] then
    return refuse("lease_ms")
  end
end
local rows = read_intents(state, ids)

local reply, held, lines, ends = { now }, {}, {}, {}
for i = 1, count do
  local row, token = rows[ids[i]], ARGV[FIXED + (i - 1) * WIDTH + 2]
  if row and row ~= "damaged" and row.status == "claimed" and row.token == token
    and row.lease_end > now then
    row.lease_end = math.max(row.lease_end, now + lengths[i])
    reply[i + 1] = { "extended", row.lease_end }
    local n = #lines
    held[#held + 1] = row.id
    lines[n + 1], lines[n + 2] = row.id, intent_line(row)
    if row.on_expiry == "park" then
      n = #ends
      ends[n + 1], ends[n + 2] = integer(row.lease_end), row.id
    end
  else
    reply[i + 1] = "lost"
  end
end

-- Deletes first: so that it passes when memory is full, before Redis 7 as well.
write("HDEL", state, held)
write("HSET", state, lines)
write("ZADD", expiring, ends)
return reply
