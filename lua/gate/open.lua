-- gate/open: an operator says that senders who know lost data may be granted intents again.
--
-- KEYS  1 dataset string name of this data, and the openings after losses
-- ARGV  1 now_ms "" for the server's clock
-- ITEM  lost note: lost = name of the data that was lost; note = JSON
-- REPLY now_ms, per item: opened | known: it is the name of the data that is here
-- ERRORS LK_ARGUMENT
-- FLAGS none
-- COST  O(m) for m items
-- WHY   The opening names what was lost: whoever knows other data stays refused.
local dataset = KEYS[1]
local now_ms = ARGV[1]

local FIXED, WIDTH = 1, 2
local now = clock(now_ms)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if count < 1 or count > OPENINGS_KEPT or count ~= math.floor(count) then
  return refuse("items")
end
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  if not is_token(ARGV[base + 1]) then
    return refuse("lost")
  end
  if string.find(ARGV[base + 2], "\n", 1, true) then
    return refuse("note")
  end
end
local stored = redis.call("GET", dataset) or ""

local reply, openings = { now }, {}
local name = string.match(stored, "^[^\n]*")
for opening in string.gmatch(string.sub(stored, #name + 1), "\n([^\n]+)") do
  openings[#openings + 1] = opening
end
local kept = #openings
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local lost, note = ARGV[base + 1], ARGV[base + 2]
  if lost == name then
    reply[i + 1] = "known"
  else
    reply[i + 1] = "opened"
    if not string.find(stored, "\n" .. lost .. " ", 1, true) then
      openings[#openings + 1] = lost .. " " .. integer(now) .. " " .. note
      stored = stored .. "\n" .. openings[#openings]
    end
  end
end

if #openings > kept then
  local first = math.max(#openings - OPENINGS_KEPT + 1, 1)
  redis.call("SET", dataset, name .. "\n" .. table.concat(openings, "\n", first))
end
return reply
