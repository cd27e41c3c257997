-- idempotency/reserve: the first use of a key, or what is known of the first use.
--
-- KEYS  1 docs hash record id -> the record
--       2 due  zset record id -> when it may be forgotten
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  record_id token fingerprint lease_ms expires_at on_expiry reservation: fingerprint = an
--       encoded word; lease_ms, expires_at = "" for none; on_expiry = reclaim | park
-- REPLY now_ms, per item: reserved record | duplicate record | conflict record | spent: this token
--       had the reservation and released it | damaged: there is a record, but it cannot be read
-- ERRORS LK_ARGUMENT
-- FLAGS none
-- COST  O(m log n) for m items
-- WHY   The key's own end (expires_at) beats everything, even an outcome. The end of a first
--       attempt's lease frees the key only where on_expiry says reclaim: with park it stays taken,
--       because nobody knows whether the effect has happened.
local docs, due = KEYS[1], KEYS[2]
local now_ms = ARGV[1]

local FIXED, WIDTH = 1, 7
local now = clock(now_ms)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local asked, leases, ends = {}, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  asked[i] = ARGV[base + 1]
  leases[i] = ARGV[base + 4] == "" and 0 or whole(ARGV[base + 4], 1, LEASE_MS_MAX)
  ends[i] = ARGV[base + 5] == "" and 0 or whole(ARGV[base + 5], 1, NEVER_MS)
  local on_expiry = ARGV[base + 6]
  if not leases[i] or not ends[i] or not is_token(ARGV[base + 2]) then
    return refuse("item")
  end
  if on_expiry ~= "reclaim" and on_expiry ~= "park" then
    return refuse("on_expiry")
  end
  if not string.find(ARGV[base + 3], "^[%w_~-]+$") then
    return refuse("fingerprint")
  end
  if string.find(ARGV[base + 7], "\n", 1, true) then
    return refuse("reservation")
  end
end
local stored = values_of(docs, asked)
local over = records_over(due, now, asked)

local reply, handled, due_pairs, doc_pairs = { now }, {}, {}, {}
local now_text = integer(now)
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local id, token, fingerprint = asked[i], ARGV[base + 2], ARGV[base + 3]
  local on_expiry, reservation = ARGV[base + 6], ARGV[base + 7]
  local doc = handled[id] or stored[i]
  local record = read_record(doc)
  local own = record and string.match(record.fingerprints, "^%S+")
  local attempt_over = record and record.completed_at == "~" and record.lease_end > 0
    and record.lease_end <= now and record.on_expiry == "reclaim"
  local free = not record or record.status == "released" or attempt_over
    or (record.expires_at > 0 and record.expires_at <= now)
  local outcome, changed
  if doc and not record then
    outcome = "damaged"
  elseif record and record.status == "released" and record.token == token then
    outcome = "spent"
  elseif free then
    outcome, changed = "reserved", true
    local lease_end = leases[i] > 0 and now + leases[i] or 0
    record = {
      status = "reserved", token = token, first_seen = now_text, last_seen = now_text,
      lease_end = lease_end, expires_at = ends[i], conflicts = 0, on_expiry = on_expiry,
      completed_at = "~", fingerprints = fingerprint, reservation = reservation, outcome = "",
    }
    local forget_at = NEVER_MS
    if ends[i] > 0 then
      forget_at = ends[i]
    elseif lease_end > 0 and on_expiry == "reclaim" then
      forget_at = lease_end + RESERVED_KEEP_MS
    end
    due_pairs[#due_pairs + 1] = integer(forget_at)
    due_pairs[#due_pairs + 1] = id
  elseif own == fingerprint and record.token == token then
    outcome = "reserved"
  elseif own == fingerprint then
    outcome, changed = "duplicate", true
    record.last_seen = now_text
  else
    outcome, changed = "conflict", true
    record.status, record.last_seen, record.conflicts = "conflicted", now_text, record.conflicts + 1
    local known, kept = false, 0
    for word in string.gmatch(record.fingerprints, "%S+") do
      kept = kept + 1
      known = known or (kept > 1 and word == fingerprint)
    end
    if not known and kept < FINGERPRINTS_MAX then
      record.fingerprints = record.fingerprints .. " " .. fingerprint
    end
  end
  if changed then
    handled[id] = record_doc(record)
    doc_pairs[#doc_pairs + 1] = id
    doc_pairs[#doc_pairs + 1] = handled[id]
  end
  local is_bare = outcome == "spent" or outcome == "damaged"
  reply[i + 1] = is_bare and outcome or { outcome, handled[id] or doc }
end

write("HSET", docs, doc_pairs)
write("ZADD", due, due_pairs)
write("HDEL", docs, over)
write("ZREM", due, over)
return reply
