-- gate/ask: claim unknown intents, to ask their destination what became of them.
--
-- KEYS  1 state    hash   intent id -> state line
--       2 expiring zset   intent id -> lease end, of what parks
--       3 unknown  zset   intent id -> when the destination may be asked
--       4 dead     zset   intent id -> when it got there
--       5 done     zset   intent id -> when it was sent or cancelled
--       6 updated  zset   intent id -> its last change
--       7 runs     zset   run, time of the last change, intent id -> 0
--       8 fence    string the last fence given
-- ARGV  1 now_ms    "" for the server's clock
--       2 lease_ms  how long the question may take
--       3 settle_ms not before this long after the end of the sender's lease
--       4 asks_max  after so many questions without an answer it is buried
--       5 first_ms  pause after the first question; it doubles
--       6 most_ms   longest pause
-- ITEM  id token: token = of this question
-- REPLY now_ms, per item: asked fence ask_end revision asks | wait at | buried |
--       not_unknown status | missing
-- ERRORS LK_ARGUMENT
-- FLAGS none
-- COST  O(m log n) for m items
-- WHY   The question is counted as it begins, so that asking ends also where those who ask die of
--       it. Its fence is above every sender's: a destination that notes it refuses them since.
local state, expiring, unknown, dead = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local done, updated, runs, fence = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local now_ms, lease_ms, settle_ms = ARGV[1], ARGV[2], ARGV[3]
local asks_max, first_ms, most_ms = ARGV[4], ARGV[5], ARGV[6]

local FIXED, WIDTH = 6, 2
local now, micros = clock(now_ms)
local lease = whole(lease_ms, 1, LEASE_MS_MAX)
local settle = whole(settle_ms, 0, DURATION_MS_MAX)
local budget = whole(asks_max, 1, NEVER_MS)
local first = whole(first_ms, 0, DURATION_MS_MAX)
local most = whole(most_ms, 0, DURATION_MS_MAX)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if not lease then
  return refuse("lease_ms")
end
if not settle or not budget or not first or not most then
  return refuse("pace")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local ids = {}
for i = 1, count do
  ids[i] = ARGV[FIXED + (i - 1) * WIDTH + 1]
  if not is_token(ARGV[FIXED + (i - 1) * WIDTH + 2]) then
    return refuse("token")
  end
end
local rows = read_intents(state, ids)
local given = next_fence(fence, micros)

local function not_before(row)
  return math.max(row.lease_end + settle, tonumber(row.ask_end), tonumber(row.ask_at))
end

local reply, changed, has_asked = { now }, {}, false
for i = 1, count do
  local row, token = rows[ids[i]], ARGV[FIXED + (i - 1) * WIDTH + 2]
  local status = row and row ~= "damaged" and intent_status(row, now)
  if not status then
    reply[i + 1] = "missing"
  elseif status ~= "unknown" then
    reply[i + 1] = row.ask_token == token and row.cause == "undecidable" and "buried"
      or { "not_unknown", status }
  elseif row.cause == "asked" and row.ask_token == token then
    reply[i + 1] = { "asked", row.ask_fence, row.ask_end, row.revision, row.asks }
  elseif not_before(row) > now then
    reply[i + 1] = { "wait", not_before(row) }
  else
    local asks = tonumber(row.asks)
    row.ask_token, row.revision = token, row.revision + 1
    if asks >= budget then
      row.status, row.cause = "dead_lettered", "undecidable"
      reply[i + 1] = "buried"
    else
      row.status, row.cause, row.asks = "unknown", "asked", integer(asks + 1)
      row.ask_fence, row.ask_end = integer(given), integer(now + lease)
      row.ask_at = integer(now + lease + pause_after(asks + 1, first, most))
      reply[i + 1] = { "asked", row.ask_fence, row.ask_end, row.revision, row.asks }
      has_asked = true
    end
    changed[#changed + 1] = row
  end
end

if has_asked then
  redis.call("SET", fence, integer(given))
end
if #changed > 0 then
  save_intents(changed, now, {
    state = state, expiring = expiring, unknown = unknown, dead = dead, done = done,
    updated = updated, runs = runs,
  })
end
return reply
