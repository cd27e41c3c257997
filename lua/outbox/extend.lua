-- outbox/extend: the holder wants its rows for longer, counted from now.
--
-- KEYS  1 state  hash id -> state line
--       2 due    zset id -> the millisecond at which it may be claimed next
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  id token lease_ms
-- REPLY now_ms, per item: extended lease_end | lost_claim
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
-- WHY   The one command that refuses after the lease's end: what has ended may already be promised
--       to another. An end never moves back, so that asking twice, or late, shortens nothing.
local state, due = KEYS[1], KEYS[2]
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
local ids, leases = {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  ids[i] = ARGV[base + 1]
  leases[i] = whole(ARGV[base + 3], 1, LEASE_MS_MAX)
  if not leases[i] then
    return refuse("lease_ms")
  end
end
local lines = values_of(state, ids)

local reply, moved, due_pairs, state_pairs, handled = { now }, {}, {}, {}, {}
for i = 1, count do
  local id, token = ids[i], ARGV[FIXED + (i - 1) * WIDTH + 2]
  local line = handled[id] or lines[i]
  local row = line and #token == 22 and read_state(line)
  if row and row.token == token and row.status == "claimed" and row.at > now then
    local lease_end = math.max(row.at, now + leases[i])
    handled[id] = state_line(row, "claimed", "claimed", lease_end)
    local n = #due_pairs
    due_pairs[n + 1], due_pairs[n + 2] = integer(lease_end), id
    state_pairs[n + 1], state_pairs[n + 2] = id, handled[id]
    moved[#moved + 1] = id
    reply[i + 1] = { "extended", lease_end }
  else
    reply[i + 1] = "lost_claim"
  end
end

write("ZREM", due, moved)
write("ZADD", due, due_pairs)
write("HSET", state, state_pairs)
return reply
