-- ledger/commit: apply a set of changes if all that they were decided on is still so, else none.
--
-- KEYS  1 docs     hash record -> head, places, JSON
--       2 index    zset place of a record in a list -> 0
--       3 guards   hash run -> number of commits that changed records of it
--       4 intents  hash intent id -> the intent as JSON
--       5 state    hash intent id -> state line
--       6 expiring zset intent id -> lease end, of what parks
--       7 unknown  zset intent id -> when the destination may be asked
--       8 dead     zset intent id -> when it got there
--       9 done     zset intent id -> when it was sent or cancelled
--      10 updated  zset intent id -> its last change
--      11 runs     zset run, time of the last change, intent id -> 0
-- ARGV  1 now_ms "" for the server's clock
--       2 commit token: name of this set of changes
-- ITEM  kind name revision words places doc: kind = check | guard | put | drop | intent; revision =
--       that was read, 0 = there was none; words = what pages filter by, or an intent's state
-- REPLY now_ms, for all items together: committed | conflict name
-- ERRORS LK_ARGUMENT
-- FLAGS none
-- COST  O(m log n) for m items
-- WHY   What is to be changed is decided outside, on records that were read before. A record that
--       was not there and is now would change the decision as well: that is what guards are for.
--       What the ledger learns of an intent leaves its sender the token: it may still say more.
local docs, index, guards, intents, state = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local expiring, unknown, dead, done = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local updated, runs = KEYS[10], KEYS[11]
local now_ms, commit = ARGV[1], ARGV[2]

local FIXED, WIDTH = 2, 6
local KINDS = { check = true, guard = true, put = true, drop = true, intent = true }
local STATUS = { pending = true, sent = true, failed = true, kept = true }
local PLACE = "^[^|]+|" .. string.rep("%d", 16) .. "|(.+)$"
local INTENT = "^(%l+) (%d+) (%d+) (%d+) (%d+) ([%w_~-]+) ([%w_~-]+) (.*)$"
-- So many arguments fit on the stack of any server at a time.
local SPREAD = 4000

local function spread(command, key, arguments)
  for first = 1, #arguments, SPREAD do
    redis.call(command, key, unpack(arguments, first, math.min(first + SPREAD - 1, #arguments)))
  end
end

-- What is wrong with an item that is to be written, or nil.
local function problem_of(kind, name, revision, words, stands_in)
  if kind == "intent" then
    local status, attempts, created_at, changed_at, claimed_at = string.match(words, INTENT)
    local is_known = STATUS[status] and (status ~= "kept" or tonumber(revision) > 0)
      and whole(attempts, 0, NEVER_MS) and whole(created_at, 0, NEVER_MS)
      and whole(changed_at, 0, NEVER_MS) and whole(claimed_at, 0, NEVER_MS)
    return name == "" and "name" or not is_known and "words" or nil
  end
  local tail = string.match(name, "^[a-z_]+/([a-z0-9_~.-]+)$")
  if not tail then
    return "name"
  end
  if kind == "put" and not string.find(words, "^%d+ %S+ %S+ [01] %S+$") then
    return "words"
  end
  if string.find(stands_in, "\n", 1, true) then
    return "places"
  end
  for place in string.gmatch(stands_in, "%S+") do
    if string.match(place, PLACE) ~= tail then
      return "places"
    end
  end
end

local now = clock(now_ms)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if not is_token(commit) then
  return refuse("commit")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local names, guarded, ids, is_written = {}, {}, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local kind, name, revision = ARGV[base + 1], ARGV[base + 2], ARGV[base + 3]
  if not KINDS[kind] or not whole(revision, 0, NEVER_MS) then
    return refuse("item")
  end
  if kind == "guard" then
    guarded[#guarded + 1] = name
  elseif kind == "check" then
    names[#names + 1] = name
  else
    local wrong = problem_of(kind, name, revision, ARGV[base + 4], ARGV[base + 5])
    if wrong or is_written[name] then
      return refuse(wrong or "twice")
    end
    is_written[name] = true
    local list = kind == "intent" and ids or names
    list[#list + 1] = name
  end
end
local stored, counts = values_of(docs, names), values_of(guards, guarded)
local rows = read_intents(state, ids)
local heads, known = {}, {}
for i = 1, #names do
  if stored[i] then
    local revision, by, run, places =
      string.match(stored[i], "^(%d+) (%S+) %d+ %S+ %S+ [01] (%S+)\n([^\n]*)\n")
    heads[names[i]] = { revision = revision or "?", by = by, run = run, places = places or "" }
  end
end
for i = 1, #guarded do
  known[guarded[i]] = counts[i] or "0"
end

local problem
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local kind, name, revision = ARGV[base + 1], ARGV[base + 2], ARGV[base + 3]
  local head, row, found = heads[name], rows[name], "0"
  if kind == "guard" then
    found = known[name]
  elseif kind == "intent" then
    found = row and (row == "damaged" and "?" or integer(row.revision)) or found
  elseif head then
    found = head.revision
    if kind == "put" and head.by == commit then
      return { now, "committed" }
    end
  end
  if found ~= revision then
    problem = problem or name
  end
end
if problem then
  return { now, { "conflict", problem } }
end

local doc_pairs, gone, gone_places, places, raised = {}, {}, {}, {}, {}
local intent_pairs, changed, gone_runs = {}, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local kind, name = ARGV[base + 1], ARGV[base + 2]
  local words, stands_in, doc = ARGV[base + 4], ARGV[base + 5], ARGV[base + 6]
  if kind == "put" or kind == "drop" then
    local head = heads[name]
    for place in string.gmatch(head and head.places or "", "%S+") do
      gone_places[#gone_places + 1] = place
    end
    local was_of, is_of = head and head.run, kind == "put" and string.match(words, "(%S+)$")
    if was_of then
      raised[was_of] = (raised[was_of] or 0) + 1
    end
    if is_of and is_of ~= was_of then
      raised[is_of] = (raised[is_of] or 0) + 1
    end
    if kind == "drop" then
      gone[#gone + 1] = name
    else
      local revision = integer(tonumber(ARGV[base + 3]) + 1)
      local n = #doc_pairs
      doc_pairs[n + 1] = name
      doc_pairs[n + 2] = revision .. " " .. commit .. " " .. words .. "\n" .. stands_in .. "\n"
        .. doc
      for place in string.gmatch(stands_in, "%S+") do
        n = #places
        places[n + 1], places[n + 2] = "0", place
      end
    end
  elseif kind == "intent" then
    local status, attempts, created_at, changed_at, claimed_at, run, key_digest, owner =
      string.match(words, INTENT)
    local row = rows[name] or {
      id = name, token = commit, revision = 0, fence = "0", on_expiry = "reclaim", asks = "0",
      ask_token = "~", ask_fence = "0", ask_end = "0", ask_at = "0", run = run, key_digest = "~",
      arguments_digest = "~",
    }
    if status ~= "kept" then
      row.status, row.cause, row.lease_end = status, "ledger", 0
      row.claimed_at, row.owner = claimed_at, owner
    end
    if row.run ~= run and row.run ~= "~" then
      gone_runs[#gone_runs + 1] = run_member(row, row.seen_at)
    end
    row.run, row.key_digest = run, row.key_digest == "~" and key_digest or row.key_digest
    row.attempts, row.created_at, row.changed_at = attempts, created_at, changed_at
    row.revision = row.revision + 1
    changed[#changed + 1] = row
    local n = #intent_pairs
    intent_pairs[n + 1], intent_pairs[n + 2] = name, doc
  end
end

spread("ZREM", index, gone_places)
write("HDEL", docs, gone)
write("HSET", docs, doc_pairs)
spread("ZADD", index, places)
add(guards, raised)
if #changed > 0 then
  write("ZREM", runs, gone_runs)
  write("HSET", intents, intent_pairs)
  save_intents(changed, now, {
    state = state, expiring = expiring, unknown = unknown, dead = dead, done = done,
    updated = updated, runs = runs,
  })
end
return { now, "committed" }
