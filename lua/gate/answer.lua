-- gate/answer: record what the destination said.
--
-- KEYS  1 state    hash intent id -> state line
--       2 facts    hash intent id -> what was said of it
--       3 expiring zset intent id -> lease end, of what parks
--       4 unknown  zset intent id -> when the destination may be asked
--       5 dead     zset intent id -> when it got there
--       6 done     zset intent id -> when it was sent or cancelled
--       7 updated  zset intent id -> its last change
--       8 runs     zset run, time of the last change, intent id -> 0
-- ARGV  1 now_ms   "" for the server's clock
--       2 asks_max after so many questions without an answer it is buried
--       3 first_ms pause after the first question; it doubles
--       4 most_ms  longest pause
-- ITEM  id token revision verdict note: token, revision = of the question; verdict = applied |
--       absent | undecidable; note = JSON
-- REPLY now_ms, per item: recorded status | lost status | missing
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
-- WHY   The answer is to a question about one state: where the intent has changed since, by a late
--       word of its sender or by another question, it counts for nothing.
local state, facts, expiring, unknown = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local dead, done, updated, runs = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local now_ms, asks_max, first_ms, most_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local FIXED, WIDTH = 4, 5
local STATUS = { applied = "sent", absent = "cancelled", undecidable = "unknown" }
local now = clock(now_ms)
local budget = whole(asks_max, 1, NEVER_MS)
local first = whole(first_ms, 0, DURATION_MS_MAX)
local most = whole(most_ms, 0, DURATION_MS_MAX)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if not budget or not first or not most then
  return refuse("pace")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local ids = {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  ids[i] = ARGV[base + 1]
  if not STATUS[ARGV[base + 4]] or not whole(ARGV[base + 3], 0, NEVER_MS) then
    return refuse("item")
  end
  if string.find(ARGV[base + 5], "\n", 1, true) or #ARGV[base + 5] > FACT_BYTES_MAX then
    return refuse("note")
  end
end
local rows, said = read_intents(state, ids), values_of(facts, ids)

local reply, changed, noted = { now }, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local id, token, verdict, note = ids[i], ARGV[base + 2], ARGV[base + 4], ARGV[base + 5]
  local revision = tonumber(ARGV[base + 3])
  local row = rows[id]
  if not row or row == "damaged" then
    reply[i + 1] = "missing"
  elseif row.ask_token == token and row.cause == verdict and row.revision == revision + 1 then
    reply[i + 1] = { "recorded", row.status }
  elseif row.ask_token ~= token or row.cause ~= "asked" or row.revision ~= revision then
    reply[i + 1] = { "lost", intent_status(row, now) }
  else
    local asks = tonumber(row.asks)
    row.status, row.cause, row.revision = STATUS[verdict], verdict, row.revision + 1
    row.ask_end = integer(math.min(tonumber(row.ask_end), now))
    if verdict == "undecidable" and asks >= budget then
      row.status = "dead_lettered"
    elseif verdict == "undecidable" then
      row.ask_at = integer(now + pause_after(asks, first, most))
    end
    reply[i + 1] = { "recorded", row.status }
    changed[#changed + 1] = row
    local n = #noted
    noted[n + 1] = id
    noted[n + 2] = with_fact(said[i] or nil, now, verdict, row.ask_fence, true, note)
  end
end

if #changed > 0 then
  save_intents(changed, now, {
    state = state, expiring = expiring, unknown = unknown, dead = dead, done = done,
    updated = updated, runs = runs,
  })
end
write("HSET", facts, noted)
return reply
