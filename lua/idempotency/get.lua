-- idempotency/get: what is stored of keys, whatever their age.
--
-- KEYS  1 docs hash record id -> the record
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  record_id
-- REPLY now_ms, per item: found record | missing
-- ERRORS LK_ARGUMENT
-- FLAGS no-writes
-- COST  O(m) for m items
local docs = KEYS[1]
local now_ms = ARGV[1]

local now = clock(now_ms)
local count = #ARGV - 1
if not now then
  return refuse("now_ms")
end
if count < 1 or count > ITEMS_MAX then
  return refuse("items")
end
local asked = {}
for i = 1, count do
  asked[i] = ARGV[1 + i]
end
local stored = values_of(docs, asked)

local reply = { now }
for i = 1, count do
  local record = read_record(stored[i])
  if record and record.status ~= "released" then
    reply[i + 1] = { "found", stored[i] }
  else
    reply[i + 1] = "missing"
  end
end
return reply
