-- gate/get: all that is stored of intents.
--
-- KEYS  1 docs  hash intent id -> the intent as JSON
--       2 state hash intent id -> state line
--       3 facts hash intent id -> what was said of it
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  id
-- REPLY now_ms, per item: found intent state facts | missing
-- ERRORS LK_ARGUMENT
-- FLAGS no-writes
-- COST  O(m) for m items
local docs, state, facts = KEYS[1], KEYS[2], KEYS[3]
local now_ms = ARGV[1]

local FIXED = 1
local now = clock(now_ms)
local count = #ARGV - FIXED
if not now then
  return refuse("now_ms")
end
if count < 1 or count > ITEMS_MAX then
  return refuse("items")
end
local ids = {}
for i = 1, count do
  ids[i] = ARGV[FIXED + i]
end
local intents, lines, said = values_of(docs, ids), values_of(state, ids), values_of(facts, ids)
local reply = { now }
for i = 1, count do
  if lines[i] then
    reply[i + 1] = { "found", intents[i] or "", lines[i], said[i] or "" }
  else
    reply[i + 1] = "missing"
  end
end
return reply
