-- outbox/enqueue: store new rows, pending; a row or a dedupe key that is there already is told.
--
-- KEYS  1 docs       hash  id -> header line and payload, written once
--       2 state      hash  id -> state line; absent while pending and fresh
--       3 due        zset  id -> the millisecond at which it may be claimed next
--       4 lanes      zset  route -> last enqueue
--       5 dedupe     hash  digest -> id and draft fingerprint
--       6 dedupe_end zset  digest -> when it may be forgotten
--       7 tally      hash  counts, bytes kept, horizon
-- ARGV  1 now_ms     "" for the server's clock
--       2 route      encoded lane and target, joined by a colon
--       3 repeated   1 if the caller sent these items before and does not know what became of it
--       4 window_ms  how long a dedupe key is remembered
--       5 hint       the channel that hears when a row may be claimed; "" = nobody is told
-- ITEM  id draft available_at dedupe: draft = header words after created_at, newline, payload;
--       dedupe = "" or digest and fingerprint, separated by a blank
-- REPLY now_ms, per item: created | duplicate id header state | conflict id | forgotten
-- ERRORS LK_ARGUMENT
-- FLAGS none
-- COST  O(m log n) for m items, n rows of the route
-- WHY   All reads come first: a row, its place in line and its dedupe key are there together or not
--       at all. Two items of one call may carry the same id or digest: the later one sees the
--       earlier.
local docs, state, due, lanes = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local dedupe, dedupe_end, tally = KEYS[5], KEYS[6], KEYS[7]
local now_ms, route, repeated, window_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local hint = ARGV[5]

local FIXED, WIDTH = 5, 4
local now = clock(now_ms)
local window = whole(window_ms, 1, DURATION_MS_MAX)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if not is_route(route) then
  return refuse("route")
end
if not is_flag(repeated) then
  return refuse("repeated")
end
if not window then
  return refuse("window_ms")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end

local ids, digests, slots = {}, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  ids[i] = ARGV[base + 1]
  if #ids[i] > ID_BYTES_MAX or not string.find(ids[i], "^[%w_-]+$") then
    return refuse("id")
  end
  if not whole(ARGV[base + 3], 0, NEVER_MS) then
    return refuse("available_at")
  end
  local named = ARGV[base + 4]
  if named ~= "" then
    local digest, fingerprint = string.match(named, "^(%S+) (%S+)$")
    if not fingerprint then
      return refuse("dedupe")
    end
    slots[i] = { digest = digest, fingerprint = fingerprint }
    digests[#digests + 1] = digest
  end
end
local now_text = integer(now)
local stored = values_of(docs, ids)
local horizon = repeated == "1" and redis.call("HGET", tally, "horizon") or ""

-- Dedupe keys: those asked for, and a few whose window is over. One whose window is over counts no
-- more, and goes, but never while its row is unfinished.
local asked, entries, ends = {}, nil, nil
local taken, spent = {}, {}
if #digests > 0 then
  asked = redis.call("ZRANGEBYSCORE", dedupe_end, "-inf", now_text,
    "LIMIT", "0", integer(math.min(2 * count + 10, PRUNE_ROWS_MAX)))
  for i = 1, #digests do
    asked[#asked + 1] = digests[i]
  end
  entries = redis.call("HMGET", dedupe, unpack(asked))
  ends = redis.call("ZMSCORE", dedupe_end, unpack(asked))
end
for i = 1, #asked do
  local id = string.match(entries[i] or "", "^(%S+) ")
  taken[asked[i]] = entries[i] or nil
  if not ends[i] or tonumber(ends[i]) <= now then
    local line = id and redis.call("HGET", state, id)
    local row = line and read_state(line)
    local status = row and row.status
    local waits = status == "pending" or status == "claimed" or status == "unknown"
    if id and redis.call("HSTRLEN", docs, id) > 0 and (not row or waits) then
      spent[asked[i]] = "waits"
    else
      spent[asked[i]] = "over"
      taken[asked[i]] = nil
    end
  end
end

-- Decide: `known` is the document that an id has after the items before it.
local known, outcomes, held_by = {}, {}, {}
-- `{ nil, nil }` has room for one pair; most calls have no more, and growing a table costs.
local doc_pairs, due_pairs, dedupe_pairs, end_pairs = { nil, nil }, { nil, nil }, {}, {}
local created, soonest = 0, NEVER_MS
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local id, draft, available_at = ids[i], ARGV[base + 2], ARGV[base + 3]
  local doc, slot = known[id] or stored[i], slots[i]
  local holder, fingerprint
  if slot and taken[slot.digest] then
    holder, fingerprint = string.match(taken[slot.digest], "^(%S+) (%S+)$")
  end
  if holder and holder ~= id then
    held_by[i] = holder
    outcomes[i] = fingerprint == slot.fingerprint and "duplicate" or "conflict"
  elseif doc then
    held_by[i] = id
    if string.sub(doc, (string.find(doc, " ", 1, true) or 0) + 1) ~= draft then
      outcomes[i] = "conflict"
    elseif repeated == "1" then
      outcomes[i] = "created"
    else
      outcomes[i] = "duplicate"
    end
  elseif holder or may_be_forgotten(id, horizon) then
    outcomes[i] = "forgotten"
  else
    outcomes[i] = "created"
    doc = now_text .. " " .. draft
    known[id] = doc
    created = created + 1
    soonest = math.min(soonest, available_at == "0" and now or tonumber(available_at))
    local n = 2 * created
    doc_pairs[n - 1], doc_pairs[n] = id, doc
    due_pairs[n - 1], due_pairs[n] = available_at == "0" and now_text or available_at, id
    if slot then
      taken[slot.digest] = id .. " " .. slot.fingerprint
      n = #dedupe_pairs
      dedupe_pairs[n + 1], dedupe_pairs[n + 2] = slot.digest, taken[slot.digest]
      end_pairs[n + 1], end_pairs[n + 2] = integer(now + window), slot.digest
      spent[slot.digest] = nil
    end
  end
end

-- What duplicates are told of the row that was there first.
local header_of, line_of = {}, {}
if created < count then
  local told = {}
  for i = 1, count do
    if outcomes[i] == "duplicate" then
      told[#told + 1] = held_by[i]
    end
  end
  local told_docs, told_lines = values_of(docs, told), values_of(state, told)
  for i = 1, #told do
    local doc = known[told[i]] or told_docs[i] or ""
    header_of[told[i]] = string.match(doc, "^[^\n]*")
    line_of[told[i]] = told_lines[i] or ""
  end
end

local reply = { now }
for i = 1, count do
  if outcomes[i] == "duplicate" then
    local id = held_by[i]
    reply[i + 1] = { "duplicate", id, header_of[id], line_of[id] }
  elseif outcomes[i] == "conflict" then
    reply[i + 1] = { "conflict", held_by[i] }
  else
    reply[i + 1] = outcomes[i]
  end
end

if created > 0 then
  write("HSET", docs, doc_pairs)
  write("ZADD", due, due_pairs)
  redis.call("ZADD", lanes, now_text, route)
  redis.call("HINCRBY", tally, "pending:" .. route, integer(created))
end
if #asked > 0 then
  local dropped = {}
  for digest, why in pairs(spent) do
    if why == "over" then
      dropped[#dropped + 1] = digest
    else
      local n = #end_pairs
      end_pairs[n + 1], end_pairs[n + 2] = integer(now + window), digest
    end
  end
  write("HSET", dedupe, dedupe_pairs)
  write("ZADD", dedupe_end, end_pairs)
  write("HDEL", dedupe, dropped)
  write("ZREM", dedupe_end, dropped)
end
if created > 0 then
  tell(hint, route, soonest - now)
end
return reply
