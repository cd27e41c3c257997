-- outbox/release: the holder gives rows back untouched; the attempt is not charged.
--
-- KEYS  1 docs  hash id -> header line and payload
--       2 state hash id -> state line
--       3 due   zset id -> the millisecond at which it may be claimed next
--       4 tally hash counts, horizon
-- ARGV  1 now_ms   "" for the server's clock
--       2 route    encoded lane and target, joined by a colon
--       3 repeated 1 if the caller sent these items before and does not know what became of it
--       4 hint     the channel that hears when a row may be claimed; "" = nobody is told
-- ITEM  id token
-- REPLY now_ms, per item: released | lost_claim | forgotten
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
-- WHY   A released row lines up at the moment it was claimed, before those that became due since.
local docs, state, due, tally = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now_ms, route, repeated, hint = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local FIXED, WIDTH = 4, 2
local now = clock(now_ms)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if not is_route(route) then
  return refuse("route")
end
if not is_flag(repeated) then
  return refuse("repeated")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local ids = {}
for i = 1, count do
  ids[i] = ARGV[FIXED + 2 * i - 1]
end
local lines = values_of(state, ids)
local horizon = repeated == "1" and redis.call("HGET", tally, "horizon") or ""

local reply, moved, due_pairs, state_pairs, handled = { now }, {}, {}, {}, {}
for i = 1, count do
  local id, token = ids[i], ARGV[FIXED + 2 * i]
  local line = handled[id] or lines[i]
  local row = line and #token == 22 and read_state(line)
  local outcome = "lost_claim"
  if row and row.token == token then
    if row.status == "pending" and row.cause == "released" then
      outcome = "released"
    elseif row.status == "claimed" then
      outcome = "released"
      row.attempts = math.max(row.attempts - 1, 0)
      handled[id] = state_line(row, "pending", "released", tonumber(row.claimed_at))
      local n = #due_pairs
      due_pairs[n + 1], due_pairs[n + 2] = row.claimed_at, id
      state_pairs[n + 1], state_pairs[n + 2] = id, handled[id]
      moved[#moved + 1] = id
    end
  elseif not line and may_be_forgotten(id, horizon)
    and redis.call("HEXISTS", docs, id) == 0 then
    outcome = "forgotten"
  end
  reply[i + 1] = outcome
end

if #moved > 0 then
  write("ZREM", due, moved)
  write("ZADD", due, due_pairs)
  write("HSET", state, state_pairs)
  add(tally, { ["claimed:" .. route] = -#moved, ["pending:" .. route] = #moved })
  tell(hint, route, 0)
end
return reply
