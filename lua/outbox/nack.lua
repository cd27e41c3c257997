-- outbox/nack: the rows were not delivered; each waits for its next attempt or is buried.
--
-- KEYS  1 docs    hash id -> header line and payload
--       2 state   hash id -> state line
--       3 due     zset id -> the millisecond at which it may be claimed next
--       4 dead    zset id -> when it got there
--       5 unknown zset id -> when it got there
--       6 errors  hash id -> errors of its attempts
--       7 tally   hash counts, bytes kept, horizon
-- ARGV  1 now_ms     "" for the server's clock
--       2 route      encoded lane and target, joined by a colon
--       3 repeated   1 if the caller sent these items before and does not know what became of it
--       4 dead_keep_ms    how long dead letters are kept
--       5 dead_keep_count how many dead letters are kept
--       6 hint       the channel that hears when a row may be claimed; "" = nobody is told
-- ITEM  id token retry_at permanent error: retry_at = "" for now; permanent = 1 to bury at once;
--       error = a JSON string
-- REPLY now_ms, per item: requeued retry_at | dead_lettered | lost_claim | forgotten
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
-- WHY   Deletes come first: Redis 6.2 lets a full server go on writing only after a command that
--       frees.
local docs, state, due, dead = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local unknown, errors, tally = KEYS[5], KEYS[6], KEYS[7]
local now_ms, route, repeated = ARGV[1], ARGV[2], ARGV[3]
local dead_keep_ms, dead_keep_count, hint = ARGV[4], ARGV[5], ARGV[6]

local FIXED, WIDTH = 6, 5
local now = clock(now_ms)
local dead_age = whole(dead_keep_ms, 0, DURATION_MS_MAX)
local dead_most = whole(dead_keep_count, 0, NEVER_MS)
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
if not dead_age or not dead_most then
  return refuse("dead_keep")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local ids, retries = {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  ids[i] = ARGV[base + 1]
  retries[i] = ARGV[base + 3] == "" and now or whole(ARGV[base + 3], 0, NEVER_MS)
  if not retries[i] then
    return refuse("retry_at")
  end
  if not is_flag(ARGV[base + 4]) then
    return refuse("permanent")
  end
  if string.find(ARGV[base + 5], "\n", 1, true) then
    return refuse("error")
  end
end
local lines, error_lines = values_of(state, ids), values_of(errors, ids)
local horizon = repeated == "1" and redis.call("HGET", tally, "horizon") or ""

local reply, now_text = { now }, integer(now)
local moved, due_pairs, dead_pairs, state_pairs, error_pairs = {}, {}, {}, {}, {}
local from_claimed, from_unknown, dead_bytes = 0, {}, 0
local soonest = NEVER_MS
local handled = {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local id, token, permanent, text = ids[i], ARGV[base + 2], ARGV[base + 4], ARGV[base + 5]
  local line = handled[id] or lines[i]
  local row = line and #token == 22 and read_state(line)
  local outcome = "lost_claim"
  if row and row.token == token then
    if row.status == "pending" and row.cause == "requeued" then
      outcome = { "requeued", row.at }
    elseif row.status == "dead_lettered" and row.cause ~= "resolved" then
      outcome = "dead_lettered"
    elseif row.status == "claimed" or row.status == "unknown" then
      local attempts_max = read_header(redis.call("HGET", docs, id) or "") or 0
      local spent = attempts_max > 0 and row.attempts >= attempts_max
      local kind = permanent == "1" and "permanent" or spent and "nacked" or "requeued"
      if kind == "requeued" then
        outcome = { "requeued", retries[i] }
        handled[id] = state_line(row, "pending", "requeued", retries[i])
        soonest = math.min(soonest, retries[i])
        local n = #due_pairs
        due_pairs[n + 1], due_pairs[n + 2] = integer(retries[i]), id
      else
        outcome = "dead_lettered"
        handled[id] = state_line(row, "dead_lettered", kind, now)
        local n = #dead_pairs
        dead_pairs[n + 1], dead_pairs[n + 2] = now_text, id
        dead_bytes = dead_bytes + tonumber(row.size)
      end
      if row.status == "claimed" then
        from_claimed = from_claimed + 1
      else
        from_unknown[#from_unknown + 1] = id
      end
      moved[#moved + 1] = id
      local n = #state_pairs
      state_pairs[n + 1], state_pairs[n + 2] = id, handled[id]
      error_pairs[n + 1] = id
      error_pairs[n + 2] = with_error(error_lines[i], now, kind, row, text)
    end
  elseif not line and may_be_forgotten(id, horizon)
    and redis.call("HEXISTS", docs, id) == 0 then
    outcome = "forgotten"
  end
  reply[i + 1] = outcome
end

if #moved > 0 then
  write("ZREM", due, moved)
  write("ZREM", unknown, from_unknown)
  write("HSET", state, state_pairs)
  write("ZADD", due, due_pairs)
  write("ZADD", dead, dead_pairs)
  write("HSET", errors, error_pairs)
  add(tally, {
    ["claimed:" .. route] = -from_claimed,
    ["unknown:" .. route] = -#from_unknown,
    ["pending:" .. route] = #due_pairs / 2,
    ["dead_lettered:" .. route] = #dead_pairs / 2,
    dead_bytes = dead_bytes,
  })
  local rows = { docs = docs, state = state, errors = errors, tally = tally, dead = dead }
  forget(rows, "dead", now - dead_age, dead_most, NEVER_MS, 2 * count + 10, dead_age)
end
if #due_pairs > 0 then
  tell(hint, route, soonest - now)
end
return reply
