-- outbox/resolve: an operator decides what became of rows whose holder vanished.
--
-- KEYS  1 docs    hash id -> header line and payload
--       2 state   hash id -> state line
--       3 due     zset id -> the millisecond at which it may be claimed next
--       4 done    zset id -> when it got there
--       5 dead    zset id -> when it got there
--       6 unknown zset id -> when it got there
--       7 errors  hash id -> errors of its attempts
--       8 tally   hash counts, bytes kept, horizon
-- ARGV  1 now_ms     "" for the server's clock
--       2 route      encoded lane and target, joined by a colon
--       3 repeated   1 if the caller sent these items before and does not know what became of it
--       4 keep_ms    how long finished rows are kept; 0 = deleted at once
--       5 keep_count how many finished rows are kept; 0 = deleted at once
--       6 keep_bytes how many bytes of finished rows are kept; 0 = deleted at once
--       7 dead_keep_ms    how long dead letters are kept
--       8 dead_keep_count how many dead letters are kept
--       9 hint       the channel that hears when a row may be claimed; "" = nobody is told
--      10 claim_count "", or only rows of this claim_count are meant
-- ITEM  id verdict note: verdict = sent | redrive | dead; note = a JSON string
-- REPLY now_ms, per item: resolved | not_unknown status | missing | forgotten
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
-- WHY   A row that parks is unknown from the end of its lease on, also before a claim has written
--       it. With claim_count, a verdict about one attempt is never taken for one about the next.
local docs, state, due, done = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local dead, unknown, errors, tally = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local now_ms, route, repeated = ARGV[1], ARGV[2], ARGV[3]
local keep_ms, keep_count, keep_bytes = ARGV[4], ARGV[5], ARGV[6]
local dead_keep_ms, dead_keep_count, hint = ARGV[7], ARGV[8], ARGV[9]
local claim_count = ARGV[10]

local FIXED, WIDTH = 10, 3
local STATUS = { sent = "sent", redrive = "pending", dead = "dead_lettered" }
local now = clock(now_ms)
local age = whole(keep_ms, 0, DURATION_MS_MAX)
local most = whole(keep_count, 0, NEVER_MS)
local bytes_max = whole(keep_bytes, 0, NEVER_MS)
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
if claim_count ~= "" and not whole(claim_count, 0, NEVER_MS) then
  return refuse("claim_count")
end
if not age or not most or not bytes_max or not dead_age or not dead_most then
  return refuse("keep")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local ids = {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  ids[i] = ARGV[base + 1]
  if not STATUS[ARGV[base + 2]] then
    return refuse("verdict")
  end
  if string.find(ARGV[base + 3], "\n", 1, true) then
    return refuse("note")
  end
end
local lines, error_lines = values_of(state, ids), values_of(errors, ids)
local horizon = repeated == "1" and redis.call("HGET", tally, "horizon") or ""

local reply, now_text = { now }, integer(now)
local moved, state_pairs, error_pairs, handled = {}, {}, {}, {}
local to_done, to_dead, to_due, sent = {}, {}, {}, {}
local done_bytes, dead_bytes, from_claimed, from_unknown = 0, 0, 0, 0
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local id, verdict, note = ids[i], ARGV[base + 2], ARGV[base + 3]
  local line = handled[id] or lines[i]
  local row = line and read_state(line)
  local outcome = "missing"
  local parks = false
  if row and row.status == "claimed" and row.at <= now then
    local _, on_expiry = read_header(redis.call("HGET", docs, id) or "")
    parks = on_expiry == "park"
  end
  if row and claim_count ~= "" and row.claims ~= claim_count then
    outcome = { "not_unknown", row.status }
  elseif row and row.cause == "resolved" and row.status == STATUS[verdict] then
    outcome = "resolved"
  elseif row and (row.status == "unknown" or parks) then
    outcome = "resolved"
    if row.status == "unknown" then
      from_unknown = from_unknown + 1
    else
      from_claimed = from_claimed + 1
    end
    moved[#moved + 1] = id
    local list = verdict == "sent" and to_done or verdict == "dead" and to_dead or to_due
    local n = #list
    list[n + 1], list[n + 2] = now_text, id
    if verdict == "sent" then
      sent[#sent + 1] = id
      done_bytes = done_bytes + tonumber(row.size)
    elseif verdict == "dead" then
      dead_bytes = dead_bytes + tonumber(row.size)
    end
    n = #error_pairs
    error_pairs[n + 1] = id
    error_pairs[n + 2] = with_error(error_lines[i], now, "resolved_" .. verdict, row, note)
    row.token = "~"
    if verdict == "redrive" then
      row.attempts = 0
    end
    handled[id] = state_line(row, STATUS[verdict], "resolved", now)
    state_pairs[n + 1], state_pairs[n + 2] = id, handled[id]
  elseif row then
    outcome = { "not_unknown", row.status }
  elseif redis.call("HEXISTS", docs, id) == 1 then
    outcome = { "not_unknown", "pending" }
  elseif may_be_forgotten(id, horizon) then
    outcome = "forgotten"
  end
  reply[i + 1] = outcome
end

if #moved > 0 then
  local changes = {
    ["claimed:" .. route] = -from_claimed,
    ["unknown:" .. route] = -from_unknown,
    ["pending:" .. route] = #to_due / 2,
    ["dead_lettered:" .. route] = #to_dead / 2,
    ["sent:" .. route] = #sent,
    dead_bytes = dead_bytes,
  }
  local rows = {
    docs = docs, state = state, errors = errors, tally = tally, done = done, dead = dead,
  }
  write("ZREM", unknown, moved)
  write("ZREM", due, moved)
  write("ZADD", due, to_due)
  write("ZADD", dead, to_dead)
  write("HSET", state, state_pairs)
  write("HSET", errors, error_pairs)
  if age == 0 or most == 0 or bytes_max == 0 then
    delete_rows(sent, rows)
  else
    write("ZADD", done, to_done)
    changes.done_bytes = done_bytes
  end
  add(tally, changes)
  forget(rows, "done", now - age, most, bytes_max, 2 * count + 10, age)
  forget(rows, "dead", now - dead_age, dead_most, NEVER_MS, 2 * count + 10, dead_age)
end
if #to_due > 0 then
  tell(hint, route, 0)
end
return reply
