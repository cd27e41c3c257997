-- idempotency/complete: record what became of the first use; only its token can.
--
-- KEYS  1 docs hash record id -> the record
--       2 due  zset record id -> when it may be forgotten
-- ARGV  1 now_ms   "" for the server's clock
--       2 repeated 1 if the caller sent these items before and does not know what became of it
-- ITEM  record_id token keep_ms outcome: outcome = JSON
-- REPLY now_ms, per item: completed record | lost | missing
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
-- WHY   No clock is asked: a late completion before anybody reserved the key anew is the truth. The
--       first write is a delete of the record itself: Redis 6.2 lets a full server go on only so.
local docs, due = KEYS[1], KEYS[2]
local now_ms, repeated = ARGV[1], ARGV[2]

local FIXED, WIDTH = 2, 4
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
local asked, keeps = {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  asked[i] = ARGV[base + 1]
  keeps[i] = whole(ARGV[base + 3], 1, DURATION_MS_MAX)
  if not keeps[i] then
    return refuse("keep_ms")
  end
end
local stored = values_of(docs, asked)
local over = records_over(due, now, asked)

local reply, handled, changed, due_pairs, doc_pairs = { now }, {}, {}, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local id, token, outcome = asked[i], ARGV[base + 2], ARGV[base + 4]
  local doc = handled[id] or stored[i]
  local record = read_record(doc)
  if not record or record.status == "released" then
    reply[i + 1] = "missing"
  elseif record.token ~= token then
    reply[i + 1] = "lost"
  elseif repeated == "1" and record.completed_at ~= "~" then
    reply[i + 1] = { "completed", doc }
  else
    record.status, record.last_seen, record.outcome = "completed", integer(now), outcome
    record.completed_at = integer(now)
    if record.expires_at == 0 then
      record.expires_at = now + keeps[i]
    end
    handled[id] = record_doc(record)
    reply[i + 1] = { "completed", handled[id] }
    changed[#changed + 1] = id
    due_pairs[#due_pairs + 1] = integer(record.expires_at)
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
