-- gate/run: a page of the intents of one run, the last changed first.
--
-- KEYS  1 runs  zset run, time of the last change, intent id -> 0
--       2 docs  hash intent id -> the intent as JSON
--       3 state hash intent id -> state line
--       4 facts hash intent id -> what was said of it
-- ARGV  1 now_ms   "" for the server's clock
--       2 limit    intents of the page
--       3 run      encoded run id
--       4 after    the last member looked at by the page before; "" at the start
--       5 statuses "" or wanted statuses, each between blanks
-- REPLY now_ms more last, per intent: id intent state facts
-- ERRORS LK_ARGUMENT
-- FLAGS no-writes
-- COST  O(log n + intents looked at, at most 1 000)
local runs, docs, state, facts = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now_ms, limit, run, after, statuses = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

local now = clock(now_ms)
local wanted = whole(limit, 1, ITEMS_MAX)
if not now then
  return refuse("now_ms")
end
if not wanted then
  return refuse("limit")
end
if not string.find(run, "^[%w_~-]+$") then
  return refuse("run")
end
if after ~= "" and string.sub(after, 1, #run + 1) ~= run .. ":" then
  return refuse("after")
end

local low, high = "[" .. run .. ":", after == "" and "(" .. run .. ";" or "(" .. after
local reply, taken, looked_at, bytes, more = { now, 0, "" }, 0, 0, 0, false
repeat
  local found = redis.call("ZREVRANGEBYLEX", runs, high, low, "LIMIT", "0", integer(CHUNK_ROWS))
  local ids = {}
  for i = 1, #found do
    ids[i] = string.sub(found[i], #run + 19)
  end
  local intents, lines = values_of(docs, ids), values_of(state, ids)
  local said = values_of(facts, ids)
  for i = 1, #ids do
    if taken >= wanted or bytes > REPLY_BYTES_MAX then
      more = true
      break
    end
    looked_at = looked_at + 1
    reply[3], high = found[i], "(" .. found[i]
    local row = lines[i] and read_intent(ids[i], lines[i])
    local status = row and intent_status(row, now)
    if row and (statuses == "" or string.find(statuses, " " .. status .. " ", 1, true)) then
      taken = taken + 1
      bytes = bytes + #lines[i] + #(intents[i] or "") + #(said[i] or "")
      reply[#reply + 1] = { ids[i], intents[i] or "", lines[i], said[i] or "" }
    end
  end
  local last_chunk = #ids < CHUNK_ROWS
  if not last_chunk and looked_at >= ITEMS_MAX then
    more = true
  end
until more or last_chunk
reply[2] = more and 1 or 0
return reply
