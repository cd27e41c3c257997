-- idempotency/release: withdraw unfinished reservations, so that the keys are free again.
--
-- KEYS  1 docs hash record id -> the record
--       2 due  zset record id -> when it may be forgotten
-- ARGV  1 now_ms   "" for the server's clock
--       2 repeated 1 if the caller sent these items before and does not know what became of it
-- ITEM  record_id token fingerprint: one of the two may be ""; fingerprint = an encoded word
-- REPLY now_ms, per item: released | lost | kept | missing | forgotten; kept = not a
--       reservation any more
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
-- WHY   What was released is remembered for five minutes, so that a repeat gets the first answer
--       and a late copy of the reservation is not taken for a new one.
local docs, due = KEYS[1], KEYS[2]
local now_ms, repeated = ARGV[1], ARGV[2]

local FIXED, WIDTH = 2, 3
local now = clock(now_ms)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if not is_flag(repeated) then
  return refuse("repeated")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local asked = {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  asked[i] = ARGV[base + 1]
  if ARGV[base + 2] == "" and ARGV[base + 3] == "" then
    return refuse("item")
  end
end
local stored = values_of(docs, asked)
local over = records_over(due, now, asked)

local reply, handled, changed, due_pairs, doc_pairs = { now }, {}, {}, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local id, token, fingerprint = asked[i], ARGV[base + 2], ARGV[base + 3]
  local record = read_record(handled[id] or stored[i])
  local own = record and string.match(record.fingerprints, "^%S+")
  if not record then
    reply[i + 1] = repeated == "1" and "forgotten" or "missing"
  elseif (token ~= "" and record.token ~= token) or (fingerprint ~= "" and own ~= fingerprint) then
    reply[i + 1] = record.status == "released" and "missing" or "lost"
  elseif record.status == "released" then
    reply[i + 1] = "released"
  elseif record.status ~= "reserved" then
    reply[i + 1] = "kept"
  else
    reply[i + 1] = "released"
    record.status, record.last_seen = "released", integer(now)
    handled[id] = record_doc(record)
    changed[#changed + 1] = id
    due_pairs[#due_pairs + 1] = integer(now + ENDED_KEEP_MS)
    due_pairs[#due_pairs + 1] = id
    doc_pairs[#doc_pairs + 1] = id
    doc_pairs[#doc_pairs + 1] = handled[id]
  end
end

write("HDEL", docs, over)
write("HDEL", docs, changed)
write("ZREM", due, over)
write("HSET", docs, doc_pairs)
write("ZADD", due, due_pairs)
return reply
