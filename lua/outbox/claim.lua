-- outbox/claim: take due rows of one route for a time; several claims share one call.
--
-- KEYS  1 docs       hash   id -> header line and payload
--       2 state      hash   id -> state line
--       3 due        zset   id -> the millisecond at which it may be claimed next
--       4 dead       zset   id -> when it got there
--       5 unknown    zset   id -> when it got there
--       6 errors     hash   id -> errors of its attempts
--       7 claims     hash   claim id -> lease end and the rows it took
--       8 claims_end zset   claim id -> lease end
--       9 tally      hash   counts, and the lease end that was last told
--      10 fence      string the last fence given
-- ARGV  1 now_ms     "" for the server's clock
--       2 route      encoded lane and target, joined by a colon
--       3 lease_ms   how long the rows are taken for
--       4 dead_keep_ms    how long dead letters are kept
--       5 dead_keep_count how many dead letters are kept
--       6 hint       the channel that hears when a row may be claimed; "" = nobody is told
-- ITEM  claim_id limit consumer: claim_id = the token of all its rows
-- REPLY now_ms next_due more damaged, per item: none | claimed fence lease_end rows; a row = id,
--       doc, attempt_count, claim_count, errors; more = 1 if further rows are due now
-- ERRORS LK_ARGUMENT
-- FLAGS none
-- COST  O(k log n) for k rows taken out of n
-- WHY   An expired row whose attempts are used up is buried here, and one that parks becomes
--       unknown: this is the moment at which it would be handed out again. Entries of the line
--       without a readable row leave it, or they would block it for ever; `damaged` names them.
--       A lease end is told only where no earlier one that was told lies ahead: who wakes up at
--       that one claims, and its reply's next_due leads to the later ones.
local docs, state, due, dead = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local unknown, errors, claims, claims_end = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local tally, fence = KEYS[9], KEYS[10]
local now_ms, route, lease_ms = ARGV[1], ARGV[2], ARGV[3]
local dead_keep_ms, dead_keep_count, hint = ARGV[4], ARGV[5], ARGV[6]

local FIXED, WIDTH = 6, 3
local now, micros = clock(now_ms)
local lease = whole(lease_ms, 0, LEASE_MS_MAX)
local dead_age = whole(dead_keep_ms, 0, DURATION_MS_MAX)
local dead_most = whole(dead_keep_count, 0, NEVER_MS)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if not is_route(route) then
  return refuse("route")
end
if not lease then
  return refuse("lease_ms")
end
if not dead_age or not dead_most then
  return refuse("dead_keep")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local claim_ids, limits, wanted = {}, {}, 0
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  claim_ids[i] = ARGV[base + 1]
  limits[i] = whole(ARGV[base + 2], 0, ITEMS_MAX)
  if not is_token(claim_ids[i]) then
    return refuse("claim_id")
  end
  if not limits[i] then
    return refuse("limit")
  end
end

-- A claim that is on record was made before: it gets the rows that it still holds, and no others.
local records, made_before, repeats = values_of(claims, claim_ids), {}, false
for i = 1, count do
  if records[i] or made_before[claim_ids[i]] then
    limits[i] = 0
  end
  repeats = repeats or records[i]
  made_before[claim_ids[i]] = true
  wanted = wanted + limits[i]
end
if wanted > ITEMS_MAX then
  return refuse("limit")
end

-- For a row or two, one look at the front of the line also tells which one comes next.
local now_text = integer(now)
local ids, looks_ahead, next_due = {}, wanted == 1 or wanted == 2, 0
if looks_ahead then
  local front = redis.call("ZRANGE", due, "0", wanted == 1 and "1" or "2", "WITHSCORES")
  for i = 1, #front, 2 do
    local at = tonumber(front[i + 1])
    if at > now then
      next_due = at
      break
    end
    ids[#ids + 1] = front[i]
  end
elseif wanted > 0 then
  ids = redis.call("ZRANGEBYSCORE", due, "-inf", now_text, "LIMIT", "0", integer(wanted + 1))
end
local more = #ids > wanted
ids[wanted + 1] = nil
local lines = values_of(state, ids)
local found, errors_of, bytes, looked_at = {}, {}, 0, 0
while looked_at < #ids and (looked_at == 0 or bytes < REPLY_BYTES_MAX) do
  local chunk, touched = {}, {}
  for i = looked_at + 1, math.min(looked_at + CHUNK_ROWS, #ids) do
    chunk[#chunk + 1] = ids[i]
    if lines[i] then
      touched[#touched + 1] = ids[i]
    end
  end
  local read, error_lines = values_of(docs, chunk), values_of(errors, touched)
  for i = 1, #chunk do
    found[looked_at + i] = read[i]
    bytes = bytes + #(read[i] or "")
  end
  for i = 1, #touched do
    errors_of[touched[i]] = error_lines[i] or nil
    bytes = bytes + #(error_lines[i] or "")
  end
  looked_at = looked_at + #chunk
end
more = more or looked_at < #ids

-- Decide what becomes of each row looked at.
local rows, taken_bytes = {}, 0
local buried, parked, damaged = {}, {}, {}
local from_pending, from_claimed = 0, 0
for i = 1, looked_at do
  local id, doc, line = ids[i], found[i], lines[i]
  local row, attempts_max, on_expiry
  if doc and line then
    row = read_state(line)
  elseif doc then
    row = { id = id, doc = doc, status = "pending", attempts = 0, claims = "0" }
  end
  if row and row.status == "claimed" then
    attempts_max, on_expiry = read_header(doc)
  end
  if not row or (row.status ~= "pending" and not attempts_max) then
    damaged[#damaged + 1] = id
  else
    local row_bytes = #doc + #(errors_of[id] or "")
    row.id, row.doc = id, doc
    if row.status == "claimed" and on_expiry == "park" then
      parked[#parked + 1] = row
      from_claimed = from_claimed + 1
    elseif row.status == "claimed" and attempts_max > 0 and row.attempts >= attempts_max then
      buried[#buried + 1] = row
      from_claimed = from_claimed + 1
    elseif #rows > 0 and taken_bytes + row_bytes > REPLY_BYTES_MAX then
      more = true
      break
    else
      rows[#rows + 1] = row
      taken_bytes = taken_bytes + row_bytes
      if row.status == "pending" then
        from_pending = from_pending + 1
      else
        from_claimed = from_claimed + 1
      end
    end
  end
end
-- What is due is over for the claims that had it; a repeat must not be told that it holds it still.
local over_for_repeats = repeats and {}
for i = 1, repeats and looked_at or 0 do
  over_for_repeats[ids[i]] = true
end

-- Hand the rows to the claims in the order of both.
local HEAD = 4
local reply = { now, 0, 0, damaged }
-- `{ nil, nil }` has room for one pair; most calls have no more, and growing a table costs.
local due_pairs, state_pairs = { nil, nil }, { nil, nil }
local record_pairs, end_pairs = { nil, nil }, { nil, nil }
local lease_end = now + lease
local lease_end_text, fence_text = integer(lease_end), integer(micros)
if #rows > 0 then
  -- The fence: above the last one, and above every one of a lost past. In one call, as a rule.
  local last = tonumber(redis.call("SET", fence, fence_text, "GET") or "0")
  if last >= micros then
    fence_text = integer(last + 1)
    redis.call("SET", fence, fence_text)
  end
end
local next_row = 1
for i = 1, count do
  local token, consumer = claim_ids[i], ARGV[FIXED + (i - 1) * WIDTH + 3]
  local head = "claimed claimed " .. token .. " " .. lease_end_text .. " "
  local tail = " " .. fence_text .. " " .. now_text .. " " .. consumer
  local answer, names = { "claimed", fence_text, lease_end }, { lease_end_text }
  local n = 3
  local last_row = math.min(next_row + limits[i] - 1, #rows)
  for j = next_row, last_row do
    local row = rows[j]
    local id, attempts, claim_count = row.id, row.attempts + 1, tonumber(row.claims) + 1
    due_pairs[2 * j - 1], due_pairs[2 * j] = lease_end_text, id
    state_pairs[2 * j - 1] = id
    state_pairs[2 * j] = head .. #row.doc .. " " .. attempts .. " " .. claim_count .. tail
    names[#names + 1] = id
    answer[n + 1], answer[n + 2], answer[n + 3] = id, row.doc, attempts
    answer[n + 4], answer[n + 5] = claim_count, errors_of[id] or ""
    n = n + 5
  end
  if n > 3 then
    record_pairs[#record_pairs + 1] = token
    record_pairs[#record_pairs + 1] = table.concat(names, " ")
    end_pairs[#end_pairs + 1] = lease_end_text
    end_pairs[#end_pairs + 1] = token
  elseif records[i] then
    local held, first = {}, string.find(records[i], " ", 1, true)
    for id in string.gmatch(string.sub(records[i], first), "%S+") do
      held[#held + 1] = id
    end
    local held_lines, held_docs = values_of(state, held), values_of(docs, held)
    local held_errors = values_of(errors, held)
    for j = 1, #held do
      local row = held_lines[j] and held_docs[j] and read_state(held_lines[j])
      local holds = row and row.status == "claimed" and row.token == token
      if holds and not over_for_repeats[held[j]] then
        answer[2], answer[3] = row.fence, n == 3 and row.at or math.min(answer[3], row.at)
        answer[n + 1], answer[n + 2], answer[n + 3] = held[j], held_docs[j], row.attempts
        answer[n + 4], answer[n + 5] = tonumber(row.claims), held_errors[j] or ""
        n = n + 5
      end
    end
  end
  reply[HEAD + i] = n > 3 and answer or { "none" }
  next_row = math.max(next_row, last_row + 1)
end

local over = redis.call("ZRANGEBYSCORE", claims_end, "-inf", now_text,
  "LIMIT", "0", count == 1 and "12" or integer(math.min(2 * count + 10, PRUNE_ROWS_MAX)))

local dead_bytes = 0
if #buried + #parked + #damaged > 0 then
  local dead_pairs, unknown_pairs, error_pairs, left = {}, {}, {}, {}
  for i = 1, #buried do
    local row = buried[i]
    local n = 2 * i
    dead_pairs[n - 1], dead_pairs[n] = now_text, row.id
    error_pairs[n - 1] = row.id
    error_pairs[n] = with_error(errors_of[row.id], now, "expired", row,
      '"lease expired; max attempts reached"')
    left[#left + 1] = row.id
    dead_bytes = dead_bytes + #row.doc
    n = #state_pairs
    state_pairs[n + 1] = row.id
    state_pairs[n + 2] = state_line(row, "dead_lettered", "expired", now)
  end
  for i = 1, #parked do
    local row = parked[i]
    unknown_pairs[2 * i - 1], unknown_pairs[2 * i] = now_text, row.id
    left[#left + 1] = row.id
    local n = #state_pairs
    state_pairs[n + 1], state_pairs[n + 2] = row.id, state_line(row, "unknown", "parked", now)
  end
  for i = 1, #damaged do
    left[#left + 1] = damaged[i]
  end
  write("ZREM", due, left)
  write("ZADD", dead, dead_pairs)
  write("ZADD", unknown, unknown_pairs)
  write("HSET", errors, error_pairs)
end
write("ZADD", due, due_pairs)
write("HSET", state, state_pairs)
write("HSET", claims, record_pairs)
write("ZADD", claims_end, end_pairs)
write("HDEL", claims, over)
write("ZREM", claims_end, over)
count_by(tally, "pending:" .. route, -from_pending)
count_by(tally, "claimed:" .. route, #rows - from_claimed)
if #parked > 0 then
  count_by(tally, "unknown:" .. route, #parked)
end
if #buried > 0 then
  count_by(tally, "dead_lettered:" .. route, #buried)
  count_by(tally, "dead_bytes", dead_bytes)
  local kept = { docs = docs, state = state, errors = errors, tally = tally, dead = dead }
  forget(kept, "dead", now - dead_age, dead_most, NEVER_MS, 2 * #buried + 10, dead_age)
end
if more then
  next_due = 0
elseif looks_ahead then
  if #rows > 0 and (next_due == 0 or lease_end < next_due) then
    next_due = lease_end
  end
else
  local first = redis.call("ZRANGE", due, "0", "0", "WITHSCORES")
  next_due = first[2] and tonumber(first[2]) or 0
end
if hint ~= "" and #rows > 0 then
  local field = "hinted:" .. route
  local last = tonumber(redis.call("HGET", tally, field) or "0")
  if last <= now or last > lease_end then
    redis.call("HSET", tally, field, lease_end_text)
    tell(hint, route, lease)
  end
end
reply[2], reply[3] = next_due, more and 1 or 0
return reply
