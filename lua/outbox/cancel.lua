-- outbox/cancel: pending rows are not to be sent any more.
--
-- KEYS  1 docs   hash id -> header line and payload
--       2 state  hash id -> state line
--       3 due    zset id -> the millisecond at which it may be claimed next
--       4 done   zset id -> when it got there
--       5 errors hash id -> errors of its attempts
--       6 tally  hash counts, bytes kept, horizon
-- ARGV  1 now_ms     "" for the server's clock
--       2 route      encoded lane and target, joined by a colon
--       3 repeated   1 if the caller sent these items before and does not know what became of it
--       4 keep_ms    how long finished rows are kept; 0 = deleted at once
--       5 keep_count how many finished rows are kept; 0 = deleted at once
--       6 keep_bytes how many bytes of finished rows are kept; 0 = deleted at once
-- ITEM  id
-- REPLY now_ms, per item: cancelled | not_pending status | missing | forgotten
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
local docs, state, due, done = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local errors, tally = KEYS[5], KEYS[6]
local now_ms, route, repeated = ARGV[1], ARGV[2], ARGV[3]
local keep_ms, keep_count, keep_bytes = ARGV[4], ARGV[5], ARGV[6]

local FIXED = 6
local now = clock(now_ms)
local age = whole(keep_ms, 0, DURATION_MS_MAX)
local most = whole(keep_count, 0, NEVER_MS)
local bytes_max = whole(keep_bytes, 0, NEVER_MS)
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
if not age or not most or not bytes_max then
  return refuse("keep")
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
local moved, state_pairs, done_pairs, bytes, handled = {}, {}, {}, 0, {}
for i = 1, count do
  local id = ids[i]
  local line = handled[id] or lines[i]
  local doc = not line and redis.call("HGET", docs, id)
  local row = line and read_state(line)
  if doc then
    row = {
      status = "pending", token = "~", size = #doc, attempts = 0, claims = "0", fence = "0",
      claimed_at = "0", consumer = "",
    }
  end
  local outcome = "missing"
  if row and row.status == "cancelled" then
    outcome = "cancelled"
  elseif row and row.status == "pending" then
    outcome = "cancelled"
    handled[id] = state_line(row, "cancelled", "cancelled", now)
    local n = 2 * #moved
    moved[#moved + 1] = id
    state_pairs[n + 1], state_pairs[n + 2] = id, handled[id]
    done_pairs[n + 1], done_pairs[n + 2] = now_text, id
    bytes = bytes + tonumber(row.size)
  elseif row then
    outcome = { "not_pending", row.status }
  elseif may_be_forgotten(id, horizon) then
    outcome = "forgotten"
  end
  reply[i + 1] = outcome
end

if #moved > 0 then
  local changes = { ["pending:" .. route] = -#moved, ["cancelled:" .. route] = #moved }
  local rows = { docs = docs, state = state, errors = errors, tally = tally, done = done }
  write("ZREM", due, moved)
  if age == 0 or most == 0 or bytes_max == 0 then
    delete_rows(moved, rows)
  else
    write("HSET", state, state_pairs)
    write("ZADD", done, done_pairs)
    changes.done_bytes = bytes
  end
  add(tally, changes)
  forget(rows, "done", now - age, most, bytes_max, 2 * count + 10, age)
end
return reply
