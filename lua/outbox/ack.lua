-- outbox/ack: the rows were delivered; only the holder of the token can say so.
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
-- ITEM  id token
-- REPLY now_ms, per item: acked | lost_claim | forgotten
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
-- WHY   The token decides, not the clock: a late ack before anybody reclaimed the row is good, and
--       so is one of the last holder after the row was buried or parked because its lease had
--       ended.
local docs, state, due, done = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local dead, unknown, errors, tally = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local now_ms, route, repeated = ARGV[1], ARGV[2], ARGV[3]
local keep_ms, keep_count, keep_bytes = ARGV[4], ARGV[5], ARGV[6]

local FIXED, WIDTH = 6, 2
local now = clock(now_ms)
local age = whole(keep_ms, 0, DURATION_MS_MAX)
local most = whole(keep_count, 0, NEVER_MS)
local bytes_max = whole(keep_bytes, 0, NEVER_MS)
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
if not age or not most or not bytes_max then
  return refuse("keep")
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

local reply, now_text = { now }, integer(now)
-- `{ nil, nil }` has room for one pair; most calls have no more, and growing a table costs.
local finished, state_pairs, done_pairs, bytes = { nil }, { nil, nil }, { nil, nil }, 0
local from_dead, from_unknown, from_claimed, dead_bytes = {}, {}, 0, 0
local handled = {}
for i = 1, count do
  local id, token = ids[i], ARGV[FIXED + 2 * i]
  local line = handled[id] or lines[i]
  local outcome = "lost_claim"
  if line and #token == 22 then
    local size, rest
    if string.sub(line, 1, 39) == "claimed claimed " .. token .. " " then
      size, rest = string.match(line, "^%d+ (%d+)()", 40)
      from_claimed = from_claimed + (size and 1 or 0)
    else
      local row = read_state(line)
      if row and row.token == token then
        if row.status == "sent" then
          outcome = "acked"
        elseif row.status == "dead_lettered" and row.cause == "expired" then
          from_dead[#from_dead + 1], dead_bytes = id, dead_bytes + tonumber(row.size)
          size = row.size
        elseif row.status == "unknown" then
          from_unknown[#from_unknown + 1] = id
          size = row.size
        end
      end
      if size then
        local _, last = string.find(line, "^%S+ %S+ %S+ %d+ %d+")
        rest = last + 1
      end
    end
    if size then
      outcome = "acked"
      local n = 2 * #finished
      finished[#finished + 1] = id
      handled[id] = "sent acked " .. token .. " " .. now_text .. " " .. size
        .. string.sub(line, rest)
      state_pairs[n + 1], state_pairs[n + 2] = id, handled[id]
      done_pairs[n + 1], done_pairs[n + 2] = now_text, id
      bytes = bytes + tonumber(size)
    end
  elseif not line and may_be_forgotten(id, horizon)
    and redis.call("HEXISTS", docs, id) == 0 then
    outcome = "forgotten"
  end
  reply[i + 1] = outcome
end

if #finished > 0 then
  local rows = { docs = docs, state = state, errors = errors, tally = tally, done = done }
  write("ZREM", due, finished)
  write("ZREM", dead, from_dead)
  write("ZREM", unknown, from_unknown)
  if age == 0 or most == 0 or bytes_max == 0 then
    delete_rows(finished, rows)
    bytes = 0
  else
    write("HSET", state, state_pairs)
    write("ZADD", done, done_pairs)
  end
  local done_bytes = count_by(tally, "done_bytes", bytes)
  count_by(tally, "sent:" .. route, #finished)
  count_by(tally, "claimed:" .. route, -from_claimed)
  if #from_dead + #from_unknown > 0 then
    count_by(tally, "dead_lettered:" .. route, -#from_dead)
    count_by(tally, "unknown:" .. route, -#from_unknown)
    count_by(tally, "dead_bytes", -dead_bytes)
  end
  forget(rows, "done", now - age, most, bytes_max, 2 * count + 10, age, done_bytes)
end
return reply
