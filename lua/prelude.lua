-- prelude: what every command shares; the loader puts it in front of each script.
--
-- Only helpers whose meaning PROTOCOL.md states once for all commands. Instants are milliseconds,
-- numbers are whole and below 2^53, and they go to redis.call as text: a Lua number costs more
-- there and loses digits above 10^14.

local NOW_MS_MAX = 4102444800000
local LEASE_MS_MAX = 43200000
local DURATION_MS_MAX = 3155760000000
local ITEMS_MAX = 1000
local ID_BYTES_MAX = 200
local TOKEN_LENGTH = 22
local PRUNE_ROWS_MAX = 250
local REPLY_BYTES_MAX = 4194304
local CHUNK_ROWS = 100
local ERRORS_KEPT = 10
local FINGERPRINTS_MAX = 33
local NEVER_MS = 9007199254740991
local ENDED_KEEP_MS = 300000
local RESERVED_KEEP_MS = 86400000
local FACTS_KEPT = 16
local FACT_BYTES_MAX = 65536
local FACTS_BYTES_MAX = 131072
local OPENINGS_KEPT = 16
-- The list in which an intent stands by its status; a claimed one by what its lease end means.
local LIST_OF = {
  park = "expiring", unknown = "unknown", dead_lettered = "dead", sent = "done", cancelled = "done",
}

local function refuse(problem)
  return redis.error_reply("LK_ARGUMENT " .. problem)
end

local function integer(number)
  return string.format("%.0f", number)
end

-- The number that a text of digits stands for, or nil where it is none within the bounds.
local function whole(text, least, most)
  if not string.find(text, "^%d+$") or #text > 16 then
    return nil
  end
  local number = tonumber(text)
  if number < least or number > most then
    return nil
  end
  return number
end

local function is_token(text)
  return #text == TOKEN_LENGTH and not string.find(text, "[^%w_-]")
end

local function is_route(text)
  return string.find(text, "^[%w_~-]+:[%w_~-]+$")
end

local function is_flag(text)
  return text == "0" or text == "1"
end

-- Whether a text stands behind another byte by byte. Lua's own > goes by the server's locale, in
-- which "aa" may stand behind "b" (Danish) and "-" count for nothing (most others). It is fast, and
-- taken where capitals stand before small letters: so they do in the order of bytes alone.
local function is_behind(left, right)
  if "B" < "a" then
    return left > right
  end
  for i = 1, math.min(#left, #right) do
    local ours, theirs = string.byte(left, i), string.byte(right, i)
    if ours ~= theirs then
      return ours > theirs
    end
  end
  return #left > #right
end

-- Now in milliseconds and in microseconds: the server's clock, or the caller's where one is given.
local function clock(now_ms)
  if now_ms == "" then
    local time = redis.call("TIME")
    local micros = tonumber(time[1]) * 1000000 + tonumber(time[2])
    return math.floor(micros / 1000), micros
  end
  local now = whole(now_ms, 0, NOW_MS_MAX)
  if not now then
    return nil
  end
  return now, now * 1000
end

-- The next fence of a tenant: above the last one, and above every one of a lost past.
local function next_fence(fence, micros)
  local last = tonumber(redis.call("GET", fence) or "0")
  if last >= micros then
    return last + 1
  end
  return micros
end

-- Values of many fields: HMGET refuses an empty list.
local function values_of(hash, fields)
  if #fields == 0 then
    return {}
  end
  return redis.call("HMGET", hash, unpack(fields))
end

-- One call for a structure and a flat list of arguments; none for an empty list.
local function write(command, key, arguments)
  if #arguments > 0 then
    redis.call(command, key, unpack(arguments))
  end
end

-- The rank of the first member of a sorted set behind (score, id), also where that one has gone:
-- a page goes on where the one before ended, whatever was added or taken in between.
local function rank_after(members, score, id)
  local low = redis.call("ZCOUNT", members, "-inf", "(" .. score)
  local high = redis.call("ZCOUNT", members, "-inf", score)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if is_behind(redis.call("ZRANGE", members, integer(middle), integer(middle))[1], id) then
      high = middle
    else
      low = middle + 1
    end
  end
  return low
end

-- Tells who listens that a row of a route may be claimed in so many milliseconds. Comes after all
-- writes; its failure (no right to the channel) fails nothing: a hint is no promise.
local function tell(hint, route, delay_ms)
  if hint ~= "" then
    redis.pcall("PUBLISH", hint, route .. " " .. integer(math.max(delay_ms, 0)))
  end
end

-- Adds to one counter of a hash and gives back the sum; no call, and nil, where nothing is added.
-- For two or three counters it costs less than `add`.
local function count_by(tally, field, change)
  if change ~= 0 then
    return redis.call("HINCRBY", tally, field, integer(change))
  end
end

-- Adds to several counters of a hash in two calls; `changes` maps field to what is added.
local function add(tally, changes)
  local fields = {}
  for field, change in pairs(changes) do
    if change ~= 0 then
      fields[#fields + 1] = field
    end
  end
  if #fields == 0 then
    return
  end
  local values, pairs_of = redis.call("HMGET", tally, unpack(fields)), {}
  for i = 1, #fields do
    pairs_of[2 * i - 1] = fields[i]
    pairs_of[2 * i] = integer(tonumber(values[i] or "0") + changes[fields[i]])
  end
  redis.call("HSET", tally, unpack(pairs_of))
end

-- A queue row's state line; PROTOCOL.md, "Outbox: what a row is".
local function read_state(line)
  local status, cause, token, at, size, attempts, claims, fence, claimed_at, consumer =
    string.match(line, "^(%S+) (%S+) (%S+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (.*)$")
  if not consumer then
    return nil
  end
  return {
    status = status, cause = cause, token = token, at = tonumber(at), size = size,
    attempts = tonumber(attempts), claims = claims, fence = fence, claimed_at = claimed_at,
    consumer = consumer,
  }
end

local function state_line(row, status, cause, at)
  return status .. " " .. cause .. " " .. row.token .. " " .. integer(at) .. " " .. row.size
    .. " " .. integer(row.attempts) .. " " .. row.claims .. " " .. row.fence
    .. " " .. row.claimed_at .. " " .. row.consumer
end

-- The words of a document's header line that scripts act on; nil where it cannot be read.
local function read_header(doc)
  local attempts_max, on_expiry, route = string.match(doc, "^%d+ %d+ (%d+) (%S+) (%S+) ")
  return tonumber(attempts_max), on_expiry, route
end

-- The errors of a row with one more, the oldest beyond ERRORS_KEPT left out.
local function with_error(lines, now, kind, row, text)
  local line = integer(now) .. " " .. kind .. " " .. integer(row.attempts) .. " " .. row.fence
    .. " " .. text
  if not lines then
    return line
  end
  local kept, first = 1, 1
  for _ in string.gmatch(lines, "\n") do
    kept = kept + 1
  end
  for _ = ERRORS_KEPT, kept do
    first = string.find(lines, "\n", first, true) + 1
  end
  return string.sub(lines, first) .. "\n" .. line
end

-- Deletes rows outright and remembers the largest id of them as the horizon.
local function delete_rows(ids, rows)
  if #ids == 0 then
    return
  end
  local horizon = redis.call("HGET", rows.tally, "horizon") or ""
  local largest = horizon
  for i = 1, #ids do
    if is_behind(ids[i], largest) then
      largest = ids[i]
    end
  end
  write("HDEL", rows.docs, ids)
  write("HDEL", rows.state, ids)
  write("HDEL", rows.errors, ids)
  if largest ~= horizon then
    redis.call("HSET", rows.tally, "horizon", largest)
  end
end

-- Whether a row that is not there may have been there and been deleted; `horizon` is "" where the
-- caller does not repeat itself, and while nothing was ever deleted.
local function may_be_forgotten(id, horizon)
  return horizon ~= "" and not is_behind(id, horizon)
end

-- Deletes from the oldest end of a list of finished rows (`rows.done` or `rows.dead`): every row
-- that got there at or before `before`, and what is more than `count_max` rows or `bytes_max`
-- bytes. Looks at no more than `budget` rows; gives back how many went. It lets a little gather
-- first (a row in a thousand, a second an hour of `age`, a 64th of the bytes), so that most calls
-- find no work. `bytes_now`: the bytes kept, where the caller knows them.
local function forget(rows, noun, before, count_max, bytes_max, budget, age, bytes_now)
  local finished, bytes_field = rows[noun], noun .. "_bytes"
  local oldest = redis.call("ZRANGE", finished, "0", "0", "WITHSCORES")
  if #oldest == 0 then
    return 0
  end
  local over = redis.call("ZCARD", finished) - count_max
  local bytes = bytes_now or tonumber(redis.call("HGET", rows.tally, bytes_field) or "0")
  local late = tonumber(oldest[2]) <= before - math.floor(age / 3600000) * 1000
  if not late and over <= math.floor(count_max / 1000)
    and bytes <= bytes_max + math.floor(bytes_max / 1048576) * 16384 then
    return 0
  end
  -- Where only their number is too high, their times need not be read.
  budget = math.min(budget, PRUNE_ROWS_MAX)
  local found
  local ids = {}
  if late or bytes > bytes_max then
    found = redis.call("ZRANGE", finished, "0", integer(budget - 1), "WITHSCORES")
    for i = 1, #found, 2 do
      ids[#ids + 1] = found[i]
    end
  else
    ids = redis.call("ZRANGE", finished, "0", integer(math.min(budget, over) - 1))
  end
  local lines = values_of(rows.state, ids)
  local gone, freed = {}, 0
  for i = 1, #ids do
    local is_late = found and tonumber(found[2 * i]) <= before
    local wanted = is_late or i <= over or bytes - freed > bytes_max
    if not wanted or (noun == "dead" and i > 1 and freed > REPLY_BYTES_MAX) then
      break
    end
    local size = string.match(lines[i] or "", "^%S+ %S+ %S+ %d+ (%d+) ")
    freed = freed + (tonumber(size) or 0)
    gone[i] = ids[i]
  end
  local changes = { [bytes_field] = -freed }
  if noun == "dead" then
    local docs = values_of(rows.docs, gone)
    for i = 1, #gone do
      local _, _, route = read_header(docs[i] or "")
      if route then
        local field = "dead_lettered:" .. route
        changes[field] = (changes[field] or 0) - 1
      end
    end
  end
  if #gone > 0 then
    redis.call("ZREMRANGEBYRANK", finished, "0", integer(#gone - 1))
  end
  delete_rows(gone, rows)
  add(rows.tally, changes)
  return #gone
end

-- A lease's line: status token fence acquired_at expires_at owner; nil where there is none.
local function read_lease(line)
  if not line then
    return nil
  end
  local status, token, fence, acquired_at, expires_at, owner =
    string.match(line, "^(%S+) (%S+) (%d+) (%d+) (%d+) (.*)$")
  if not owner then
    return nil
  end
  return {
    status = status, token = token, fence = fence, acquired_at = tonumber(acquired_at),
    expires_at = tonumber(expires_at), owner = owner,
  }
end

local function lease_line(status, token, fence, acquired_at, expires_at, owner)
  return status .. " " .. token .. " " .. fence .. " " .. integer(acquired_at) .. " "
    .. integer(expires_at) .. " " .. owner
end

-- An idempotency record: a line of words, a line of fingerprints, the reservation, the outcome.
-- The first fingerprint is the reservation's own, the others are those that conflicted with it.
local function read_record(doc)
  if not doc then
    return nil
  end
  local status, token, first_seen, last_seen, lease_end, expires_at, conflicts, on_expiry,
    completed_at, fingerprints, reservation, outcome = string.match(doc,
    "^(%S+) (%S+) (%d+) (%d+) (%d+) (%d+) (%d+) (%S+) (%S+)\n([^\n]*)\n([^\n]*)\n(.*)$")
  if not outcome then
    return nil
  end
  return {
    status = status, token = token, first_seen = first_seen, last_seen = last_seen,
    lease_end = tonumber(lease_end), expires_at = tonumber(expires_at),
    conflicts = tonumber(conflicts), on_expiry = on_expiry, completed_at = completed_at,
    fingerprints = fingerprints, reservation = reservation, outcome = outcome,
  }
end

local function record_doc(record)
  return record.status .. " " .. record.token .. " " .. record.first_seen .. " " .. record.last_seen
    .. " " .. integer(record.lease_end) .. " " .. integer(record.expires_at) .. " "
    .. integer(record.conflicts) .. " " .. record.on_expiry .. " " .. record.completed_at .. "\n"
    .. record.fingerprints .. "\n" .. record.reservation .. "\n" .. record.outcome
end

-- The records whose time is over, a few a call, without those that this call is about.
local function records_over(due, now, asked)
  local busy, over = {}, {}
  for i = 1, #asked do
    busy[asked[i]] = true
  end
  local found = redis.call("ZRANGEBYSCORE", due, "-inf", integer(now),
    "LIMIT", "0", integer(math.min(2 * #asked + 10, PRUNE_ROWS_MAX)))
  for i = 1, #found do
    if not busy[found[i]] then
      over[#over + 1] = found[i]
    end
  end
  return over
end

-- An intent's state line; PROTOCOL.md, "Gate". What is counted with is a number, the rest text.
-- `seen_at` and `stood_in` remember where it stood when it was read.
local function read_intent(id, line)
  local status, cause, token, lease_end, updated_at, created_at, revision, attempts, fence,
    claimed_at, on_expiry, asks, ask_token, ask_fence, ask_end, ask_at, run, key_digest,
    arguments_digest, owner = string.match(line, "^(%S+) (%S+) (%S+) (%d+) (%d+) (%d+) (%d+) (%d+) "
    .. "(%d+) (%d+) (%S+) (%d+) (%S+) (%d+) (%d+) (%d+) (%S+) (%S+) (%S+) (.*)$")
  if not owner then
    return nil
  end
  return {
    id = id, status = status, cause = cause, token = token, lease_end = tonumber(lease_end),
    created_at = created_at, revision = tonumber(revision), attempts = tonumber(attempts),
    fence = fence, claimed_at = claimed_at, on_expiry = on_expiry, asks = asks,
    ask_token = ask_token, ask_fence = ask_fence, ask_end = ask_end, ask_at = ask_at, run = run,
    key_digest = key_digest, arguments_digest = arguments_digest, owner = owner,
    updated_at = updated_at, seen_at = updated_at,
    stood_in = LIST_OF[status == "claimed" and on_expiry or status],
  }
end

-- Instants and counts are below 10^14, which `..` writes in full.
local function intent_line(row)
  return row.status .. " " .. row.cause .. " " .. row.token .. " " .. row.lease_end .. " "
    .. row.updated_at .. " " .. row.created_at .. " " .. row.revision .. " " .. row.attempts .. " "
    .. row.fence .. " " .. row.claimed_at .. " " .. row.on_expiry .. " " .. row.asks .. " "
    .. row.ask_token .. " " .. row.ask_fence .. " " .. row.ask_end .. " " .. row.ask_at .. " "
    .. row.run .. " " .. row.key_digest .. " " .. row.arguments_digest .. " " .. row.owner
end

-- What an intent reads as: one that parks is unknown from the end of its lease on, written or not.
local function intent_status(row, now)
  if row.status == "claimed" and row.on_expiry == "park" and row.lease_end <= now then
    return "unknown"
  end
  return row.status
end

-- Its member in the index of runs: the newest of a run come last.
local function run_member(row, updated_at)
  return row.run .. ":" .. string.sub("0000000000000000" .. updated_at, -16) .. ":" .. row.id
end

-- The intents of a call by id, each read once, and changed in place by one item after the other.
local function read_intents(state, ids)
  local lines, rows = values_of(state, ids), {}
  for i = 1, #ids do
    local line = lines[i]
    if line and not rows[ids[i]] then
      rows[ids[i]] = read_intent(ids[i], line) or "damaged"
    end
  end
  return rows
end

-- Writes intents that were changed, with every list that they stand in. Deletes first.
local function save_intents(changed, now, keys)
  local lines, updated, known, gone_runs, runs = {}, {}, {}, {}, {}
  local gone, lists, now_text = {}, {}, integer(now)
  for i = 1, #changed do
    local row = changed[i]
    local id, list = row.id, LIST_OF[row.status == "claimed" and row.on_expiry or row.status]
    if row.seen_at then
      known[#known + 1] = id
    end
    if row.stood_in and row.stood_in ~= list then
      gone[row.stood_in] = gone[row.stood_in] or {}
      gone[row.stood_in][#gone[row.stood_in] + 1] = id
    end
    row.updated_at = row.changed_at or now_text
    local n = 2 * i
    lines[n - 1], lines[n] = id, intent_line(row)
    updated[n - 1], updated[n] = row.updated_at, id
    if row.run ~= "~" then
      if row.seen_at then
        gone_runs[#gone_runs + 1] = run_member(row, row.seen_at)
      end
      n = #runs
      runs[n + 1], runs[n + 2] = "0", run_member(row, row.updated_at)
    end
    if list then
      lists[list] = lists[list] or {}
      n = #lists[list]
      lists[list][n + 1] = list == "expiring" and integer(row.lease_end)
        or list == "unknown" and row.ask_at or row.updated_at
      lists[list][n + 2] = id
    end
  end
  write("ZREM", keys.updated, known)
  write("ZREM", keys.runs, gone_runs)
  for list, ids in pairs(gone) do
    write("ZREM", keys[list], ids)
  end
  write("HSET", keys.state, lines)
  write("ZADD", keys.updated, updated)
  write("ZADD", keys.runs, runs)
  for list, pairs_of in pairs(lists) do
    write("ZADD", keys[list], pairs_of)
  end
end

-- What was said of an intent, with one more: `at kind fence applied text`. What was not applied is
-- not noted twice, and not beyond FACTS_KEPT or FACTS_BYTES_MAX; what was applied pushes the
-- oldest out.
local function with_fact(lines, now, kind, fence, applied, text)
  local tail = " " .. kind .. " " .. fence .. " " .. (applied and "1" or "0") .. " " .. text
  local line = integer(now) .. tail
  if not lines then
    return line
  end
  local kept, first, at = 0, 1, 0
  while at do
    kept, at = kept + 1, string.find(lines, "\n", at + 1, true)
  end
  local fits = kept < FACTS_KEPT and #lines + #line < FACTS_BYTES_MAX
  if not applied and (not fits or string.find(lines .. "\n", tail .. "\n", 1, true)) then
    return lines
  end
  while kept >= FACTS_KEPT or #lines - first + 1 + #line >= FACTS_BYTES_MAX do
    local last = string.find(lines, "\n", first, true)
    if not last then
      return line
    end
    first, kept = last + 1, kept - 1
  end
  return string.sub(lines, first) .. "\n" .. line
end

-- How long after a question that found nothing out the next one may be put.
local function pause_after(asks, first_ms, most_ms)
  return math.floor(math.min(first_ms * 2 ^ math.min(asks - 1, 40), most_ms))
end
