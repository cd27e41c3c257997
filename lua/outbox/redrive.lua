-- outbox/redrive: dead letters wait again, with all their attempts before them.
--
-- KEYS  1 docs  hash id -> header line and payload
--       2 state hash id -> state line
--       3 due   zset id -> the millisecond at which it may be claimed next
--       4 dead  zset id -> when it got there
--       5 tally hash counts, bytes kept, horizon
-- ARGV  1 now_ms   "" for the server's clock
--       2 route    encoded lane and target, joined by a colon
--       3 repeated 1 if the caller sent these items before and does not know what became of it
--       4 hint     the channel that hears when a row may be claimed; "" = nobody is told
--       5 claim_count "", or only rows of this claim_count are meant
-- ITEM  id
-- REPLY now_ms, per item: redriven | not_dead status | missing | forgotten
-- ERRORS LK_ARGUMENT
-- FLAGS none
-- COST  O(m log n) for m items
-- WHY   The token goes: an ack by the last holder of a redriven row would end a row that waits
--       again. A row is dead again only after another claim: with claim_count one order redrives it
--       once, however often and late it arrives.
local docs, state, due, dead, tally = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now_ms, route, repeated, hint = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local claim_count = ARGV[5]

local FIXED = 5
local now = clock(now_ms)
local count = #ARGV - FIXED
if not now then
  return refuse("now_ms")
end
if not is_route(route) then
  return refuse("route")
end
if not is_flag(repeated) then
  return refuse("repeated")
end
if claim_count ~= "" and not whole(claim_count, 0, NEVER_MS) then
  return refuse("claim_count")
end
if count < 1 or count > ITEMS_MAX then
  return refuse("items")
end
local ids = {}
for i = 1, count do
  ids[i] = ARGV[FIXED + i]
end
local lines = values_of(state, ids)
local horizon = repeated == "1" and redis.call("HGET", tally, "horizon") or ""

local reply, now_text = { now }, integer(now)
local moved, state_pairs, due_pairs, bytes, handled = {}, {}, {}, 0, {}
for i = 1, count do
  local id = ids[i]
  local line = handled[id] or lines[i]
  local row = line and read_state(line)
  local outcome = "missing"
  if row and claim_count ~= "" and row.claims ~= claim_count then
    outcome = { "not_dead", row.status }
  elseif row and row.status == "pending" and row.cause == "redriven" then
    outcome = "redriven"
  elseif row and row.status == "dead_lettered" then
    outcome = "redriven"
    row.attempts, row.token = 0, "~"
    handled[id] = state_line(row, "pending", "redriven", now)
    local n = 2 * #moved
    moved[#moved + 1] = id
    state_pairs[n + 1], state_pairs[n + 2] = id, handled[id]
    due_pairs[n + 1], due_pairs[n + 2] = now_text, id
    bytes = bytes + tonumber(row.size)
  elseif row then
    outcome = { "not_dead", row.status }
  elseif redis.call("HEXISTS", docs, id) == 1 then
    outcome = { "not_dead", "pending" }
  elseif may_be_forgotten(id, horizon) then
    outcome = "forgotten"
  end
  reply[i + 1] = outcome
end

if #moved > 0 then
  write("ZREM", dead, moved)
  write("HSET", state, state_pairs)
  write("ZADD", due, due_pairs)
  add(tally, {
    ["dead_lettered:" .. route] = -#moved,
    ["pending:" .. route] = #moved,
    dead_bytes = -bytes,
  })
  tell(hint, route, 0)
end
return reply
