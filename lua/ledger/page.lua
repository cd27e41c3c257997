-- ledger/page: a page of one list of records.
--
-- KEYS  1 docs  hash record -> head, places, JSON
--       2 index zset place of a record in a list -> 0
-- ARGV  1 now_ms     "" for the server's clock
--       2 limit      records of the page
--       3 collection what the list's records are named by
--       4 list       name of the list
--       5 after      order and name where the page before ended; "" at the start
--       6 newest     1 = from the end of the list
--       7 upto       only orders up to this one; "" = all
--       8 statuses   "" or wanted statuses, each between blanks
--       9 source     "" or the wanted source
--      10 active     1 = only active records
--      11 created_before only what was created before this instant; "" = all
-- REPLY now_ms more after, per record: name doc; after = order and name of the last one looked at
-- ERRORS LK_ARGUMENT
-- FLAGS no-writes
-- COST  O(log n + records looked at, at most 1 000)
local docs, index = KEYS[1], KEYS[2]
local now_ms, limit, collection, list, after = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local newest, upto, statuses, source = ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local active, created_before = ARGV[10], ARGV[11]

local now = clock(now_ms)
local wanted = whole(limit, 1, ITEMS_MAX)
local before = created_before == "" and NEVER_MS or whole(created_before, 0, NEVER_MS)
if not now then
  return refuse("now_ms")
end
if not wanted then
  return refuse("limit")
end
if not is_flag(newest) or not is_flag(active) then
  return refuse("flag")
end
if not before or (upto ~= "" and not whole(upto, 0, NEVER_MS)) then
  return refuse("bound")
end

local low, high = "[" .. list .. "|", "(" .. list .. "}"
if upto ~= "" then
  high = "(" .. list .. "|" .. string.sub("0000000000000000" .. upto, -16) .. "}"
end
if after ~= "" and newest == "1" then
  high = "(" .. list .. "|" .. after
elseif after ~= "" then
  low = "(" .. list .. "|" .. after
end
-- Where every record counts, no more are read than are wanted, and one to see if more follow.
local is_filtered = statuses ~= "" or source ~= "" or active == "1" or created_before ~= ""
local reply = { now, 0, "" }
local taken, looked_at, bytes, more = 0, 0, 0, false
repeat
  local chunk = is_filtered and CHUNK_ROWS or math.min(CHUNK_ROWS, wanted - taken + 1)
  local found
  if newest == "1" then
    found = redis.call("ZREVRANGEBYLEX", index, high, low, "LIMIT", "0", integer(chunk))
  else
    found = redis.call("ZRANGEBYLEX", index, low, high, "LIMIT", "0", integer(chunk))
  end
  local names = {}
  for i = 1, #found do
    names[i] = collection .. "/" .. string.sub(found[i], #list + 19)
  end
  local stored = values_of(docs, names)
  for i = 1, #names do
    if taken >= wanted or bytes > REPLY_BYTES_MAX then
      more = true
      break
    end
    looked_at = looked_at + 1
    reply[3] = string.sub(found[i], #list + 2)
    if newest == "1" then
      high = "(" .. found[i]
    else
      low = "(" .. found[i]
    end
    local created_at, status, from, is_active =
      string.match(stored[i] or "", "^%d+ %S+ (%d+) (%S+) (%S+) ([01]) ")
    if created_at and tonumber(created_at) < before
      and (statuses == "" or string.find(statuses, " " .. status .. " ", 1, true))
      and (source == "" or source == from) and (active == "0" or is_active == "1") then
      taken = taken + 1
      bytes = bytes + #stored[i]
      reply[#reply + 1] = { names[i], stored[i] }
    end
  end
  local last_chunk = #names < chunk
  if not last_chunk and looked_at >= ITEMS_MAX then
    more = true
  end
until more or last_chunk
reply[2] = more and 1 or 0
return reply
