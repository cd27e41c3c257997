-- gate/prepare: record what is about to be sent, and grant it to one sender.
--
-- KEYS  1 docs     hash   intent id -> the intent as JSON
--       2 state    hash   intent id -> state line
--       3 expiring zset   intent id -> lease end, of what parks
--       4 unknown  zset   intent id -> when the destination may be asked
--       5 dead     zset   intent id -> when it got there
--       6 done     zset   intent id -> when it was sent or cancelled
--       7 updated  zset   intent id -> its last change
--       8 runs     zset   run, time of the last change, intent id -> 0
--       9 dataset  string name of this data, and the openings after losses
--      10 fence    string the last fence given
-- ARGV  1 now_ms "" for the server's clock
--       2 known  name of the data that the caller knows; "" = none yet
--       3 fresh  name that the data gets with its first grant
-- ITEM  id token key_digest arguments_digest lease_ms on_expiry run owner intent: on_expiry =
--       reclaim | park; run = encoded run id or ~; intent = JSON
-- REPLY now_ms name of the data or "", per item: granted fence claimed_at lease_end attempts
--       created_at | taken status lease_end fence attempts owner | key_conflict |
--       arguments_conflict | spent | data_lost | damaged
-- ERRORS LK_ARGUMENT
-- FLAGS none
-- COST  O(m log n) for m items
-- WHY   Only an intent that nobody can have sent is granted: a new one, a cancelled one, or one
--       that reclaims and whose lease is over. One that parks waits for an answer instead. A sender
--       that knows other data than is here gets nothing: what it sent before may be forgotten.
local docs, state, expiring, unknown, dead = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local done, updated, runs, dataset, fence = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local now_ms, known, fresh = ARGV[1], ARGV[2], ARGV[3]

local FIXED, WIDTH = 3, 9
local now, micros = clock(now_ms)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if not is_token(fresh) or (known ~= "" and not is_token(known)) then
  return refuse("dataset")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local ids, leases = {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  ids[i] = ARGV[base + 1]
  leases[i] = whole(ARGV[base + 5], 1, LEASE_MS_MAX)
  local on_expiry = ARGV[base + 6]
  if not leases[i] or not is_token(ARGV[base + 2]) then
    return refuse("item")
  end
  if not is_token(ARGV[base + 3]) or not is_token(ARGV[base + 4]) then
    return refuse("digest")
  end
  if on_expiry ~= "reclaim" and on_expiry ~= "park" then
    return refuse("on_expiry")
  end
  if not string.find(ARGV[base + 7], "^[%w_~-]+$") then
    return refuse("run")
  end
end
local rows = read_intents(state, ids)
local openings = redis.call("GET", dataset) or ""
local name = string.match(openings, "^[^\n]*")
local given = next_fence(fence, micros)
local is_lost = known ~= "" and known ~= name
  and not string.find(openings, "\n" .. known .. " ", 1, true)

local reply, changed, doc_pairs = { now, name }, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local id, token, key_digest = ids[i], ARGV[base + 2], ARGV[base + 3]
  local arguments_digest, on_expiry = ARGV[base + 4], ARGV[base + 6]
  local row = rows[id]
  local status = row and row ~= "damaged" and intent_status(row, now)
  if is_lost then
    reply[i + 2] = "data_lost"
  elseif row == "damaged" then
    reply[i + 2] = "damaged"
  elseif row and row.key_digest ~= "~" and row.key_digest ~= key_digest then
    reply[i + 2] = "key_conflict"
  elseif row and row.arguments_digest ~= "~" and row.arguments_digest ~= arguments_digest then
    reply[i + 2] = "arguments_conflict"
  elseif row and row.token == token and status == "cancelled" then
    reply[i + 2] = "spent"
  elseif row and row.token == token and row.status == "claimed" then
    reply[i + 2] = { "granted", row.fence, row.claimed_at, row.lease_end, row.attempts,
      row.created_at }
  elseif row and status ~= "pending" and status ~= "cancelled"
    and not (status == "claimed" and row.on_expiry == "reclaim" and row.lease_end <= now) then
    reply[i + 2] = { "taken", status, row.lease_end, row.fence, row.attempts, row.owner }
  else
    if not row then
      row = {
        id = id, created_at = integer(now), revision = 0, attempts = 0, run = ARGV[base + 7],
        key_digest = key_digest, arguments_digest = arguments_digest,
      }
      rows[id] = row
      local n = #doc_pairs
      doc_pairs[n + 1], doc_pairs[n + 2] = id, ARGV[base + 9]
    end
    changed[#changed + 1] = row
    row.status, row.cause, row.token = "claimed", "granted", token
    row.lease_end, row.on_expiry = now + leases[i], on_expiry
    row.revision, row.attempts = row.revision + 1, row.attempts + 1
    row.fence, row.claimed_at = integer(given), integer(now)
    row.asks, row.ask_token, row.ask_fence, row.ask_end, row.ask_at = "0", "~", "0", "0", "0"
    row.owner = ARGV[base + 8]
    reply[i + 2] = { "granted", row.fence, row.claimed_at, row.lease_end, row.attempts,
      row.created_at }
  end
end

if #changed > 0 then
  if name == "" then
    reply[2] = fresh
    redis.call("SET", dataset, fresh .. openings)
  end
  redis.call("SET", fence, integer(given))
  write("HSET", docs, doc_pairs)
  save_intents(changed, now, {
    state = state, expiring = expiring, unknown = unknown, dead = dead, done = done,
    updated = updated, runs = runs,
  })
end
return reply
