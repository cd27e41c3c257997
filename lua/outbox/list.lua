-- outbox/list: a page of one list of rows, in the list's own order.
--
-- KEYS  1 members zset id -> a millisecond: due of a route, done, dead or unknown
--       2 docs    hash id -> header line and payload
--       3 state   hash id -> state line
--       4 errors  hash id -> errors of its attempts
-- ARGV  1 now_ms      "" for the server's clock
--       2 limit       rows of the page
--       3 after_score where the page before ended; "" at the start
--       4 after_id    the last id looked at by the page before
--       5 statuses    wanted statuses, each between blanks; "" for all
--       6 routes      wanted route, or a lane with its colon for all of its targets; "" for all
-- REPLY now_ms more last_score last_id, rows: id, doc, state, errors
-- ERRORS LK_ARGUMENT
-- FLAGS no-writes
-- COST  O(log n + rows looked at, at most 1 000)
-- WHY   A row that parks is unknown from the end of its lease on: the filter sees it so.
local members, docs, state, errors = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now_ms, limit, after_score, after_id = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local statuses, routes = ARGV[5], ARGV[6]

local now = clock(now_ms)
local most = whole(limit, 1, ITEMS_MAX)
if not now then
  return refuse("now_ms")
end
if not most then
  return refuse("limit")
end
if after_score ~= "" and not whole(after_score, 0, NEVER_MS) then
  return refuse("after_score")
end

local start = after_score == "" and 0 or rank_after(members, after_score, after_id)
local reply, n, bytes = { now, 0, "0", "" }, 4, 0
local taken, looked_at, more = 0, 0, false
repeat
  local found = redis.call("ZRANGE", members, integer(start + looked_at),
    integer(start + looked_at + CHUNK_ROWS - 1), "WITHSCORES")
  local ids = {}
  for i = 1, #found, 2 do
    ids[#ids + 1] = found[i]
  end
  local read, lines = values_of(docs, ids), values_of(state, ids)
  local error_lines = values_of(errors, ids)
  for i = 1, #ids do
    if taken >= most or bytes > REPLY_BYTES_MAX then
      more = true
      break
    end
    looked_at = looked_at + 1
    reply[3], reply[4] = found[2 * i], ids[i]
    local doc, line = read[i] or "", lines[i] or ""
    local status, at = string.match(line, "^(%S+) %S+ %S+ (%d+) ")
    local _, on_expiry, route = read_header(doc)
    if status == "claimed" and on_expiry == "park" and tonumber(at) <= now then
      status = "unknown"
    end
    local wanted = statuses == ""
      or string.find(statuses, " " .. (status or "pending") .. " ", 1, true)
    if routes ~= "" then
      wanted = wanted and route and string.sub(route, 1, #routes) == routes
        and (#route == #routes or string.sub(routes, -1) == ":")
    end
    if wanted then
      taken = taken + 1
      bytes = bytes + #doc + #(error_lines[i] or "")
      reply[n + 1], reply[n + 2] = ids[i], doc
      reply[n + 3], reply[n + 4] = line, error_lines[i] or ""
      n = n + 4
    end
  end
  local last_chunk = #ids < CHUNK_ROWS
  if not last_chunk and looked_at >= ITEMS_MAX then
    more = true
  end
until more or last_chunk
reply[2] = more and 1 or 0
return reply
