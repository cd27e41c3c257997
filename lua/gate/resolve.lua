-- gate/resolve: an operator decides what became of intents that nobody else can tell.
--
-- KEYS  1 state    hash intent id -> state line
--       2 facts    hash intent id -> what was said of it
--       3 expiring zset intent id -> lease end, of what parks
--       4 unknown  zset intent id -> when the destination may be asked
--       5 dead     zset intent id -> when it got there
--       6 done     zset intent id -> when it was sent or cancelled
--       7 updated  zset intent id -> its last change
--       8 runs     zset run, time of the last change, intent id -> 0
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  id revision verdict note: revision = of the intent as the operator saw it; verdict = sent |
--       failed | not_sent; note = JSON
-- REPLY now_ms, per item: resolved status | changed status | not_unknown status | missing
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
-- WHY   not_sent allows a new grant, so the order is about one state of the intent: a copy of it
--       that comes late finds another revision, and does nothing.
local state, facts, expiring, unknown = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local dead, done, updated, runs = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local now_ms = ARGV[1]

local FIXED, WIDTH = 1, 4
local STATUS = { sent = "sent", failed = "failed", not_sent = "cancelled" }
local now = clock(now_ms)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local ids = {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  ids[i] = ARGV[base + 1]
  if not STATUS[ARGV[base + 3]] or not whole(ARGV[base + 2], 0, NEVER_MS) then
    return refuse("item")
  end
  if string.find(ARGV[base + 4], "\n", 1, true) or #ARGV[base + 4] > FACT_BYTES_MAX then
    return refuse("note")
  end
end
local rows, said = read_intents(state, ids), values_of(facts, ids)

local reply, changed, noted = { now }, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local id, verdict, note = ids[i], ARGV[base + 3], ARGV[base + 4]
  local revision = tonumber(ARGV[base + 2])
  local row = rows[id]
  local status = row and row ~= "damaged" and intent_status(row, now)
  if not status then
    reply[i + 1] = "missing"
  elseif row.cause == "resolved" and row.status == STATUS[verdict]
    and row.revision == revision + 1 then
    reply[i + 1] = { "resolved", row.status }
  elseif status ~= "unknown" and status ~= "dead_lettered" then
    reply[i + 1] = { "not_unknown", status }
  elseif row.revision ~= revision then
    reply[i + 1] = { "changed", status }
  else
    row.status, row.cause, row.revision = STATUS[verdict], "resolved", row.revision + 1
    reply[i + 1] = { "resolved", row.status }
    changed[#changed + 1] = row
    local n = #noted
    noted[n + 1] = id
    noted[n + 2] = with_fact(said[i] or nil, now, "resolved_" .. verdict, row.fence, true, note)
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
