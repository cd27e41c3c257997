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
local docs, index, guards, intents, state = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local expiring, unknown, dead, done = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local updated, runs = KEYS[10], KEYS[11]
local now_ms, commit = ARGV[1], ARGV[2]

local FIXED, WIDTH = 2, 6
local KINDS = { check = true, guard = true, put = true, drop = true, intent = true }
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
local names, guarded, ids = {}, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local kind, name, words = ARGV[base + 1], ARGV[base + 2], ARGV[base + 4]
  if not KINDS[kind] or not whole(ARGV[base + 3], 0, NEVER_MS) then
    return refuse("item")
  end
  if kind == "put" and not string.find(words, "^%d+ %S+ %S+ [01] %S+$") then
    return refuse("words")
  end
  if kind == "intent" and not string.find(words, "^%S+ %S+ %d+ %d+ %d+ %d+ %d+ %S+ %S+ .*$") then
    return refuse("words")
  end
  if kind == "guard" then
    guarded[#guarded + 1] = name
  elseif kind == "intent" then
    ids[#ids + 1] = name
  else
    names[#names + 1] = name
  end
end
local stored, counts = values_of(docs, names), values_of(guards, guarded)
local lines = values_of(state, ids)
local heads, known = {}, {}
for i = 1, #names do
  heads[names[i]] = stored[i] and { string.match(stored[i], "^(%d+) (%S+) [^\n]*\n([^\n]*)\n") }
end
for i = 1, #guarded do
  known["guard " .. guarded[i]] = counts[i] or "0"
end
local rows = {}
for i = 1, #ids do
  rows[ids[i]] = lines[i] and (read_intent(ids[i], lines[i]) or "damaged")
end

local problem
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local kind, name, revision = ARGV[base + 1], ARGV[base + 2], ARGV[base + 3]
  local found, by
  if kind == "guard" then
    found = known["guard " .. name]
  elseif kind == "intent" then
    local row = rows[name]
    found = row and (row == "damaged" and "?" or integer(row.revision)) or "0"
    by = row and row ~= "damaged" and row.token
  else
    local head = heads[name]
    found, by = head and head[1] or "0", head and kind == "put" and head[2]
  end
  if by == commit then
    return { now, "committed" }
  end
  if found ~= revision then
    problem = problem or name
  end
end
if problem then
  return { now, { "conflict", problem } }
end

local doc_pairs, gone, gone_places, places, raised = {}, {}, {}, {}, {}
local intent_pairs, changed = {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local kind, name, revision = ARGV[base + 1], ARGV[base + 2], ARGV[base + 3]
  local words, stands_in, doc = ARGV[base + 4], ARGV[base + 5], ARGV[base + 6]
  if kind == "put" or kind == "drop" then
    local head = heads[name]
    for place in string.gmatch(head and head[3] or "", "%S+") do
      gone_places[#gone_places + 1] = place
    end
    local run = string.match(words, "(%S+)$")
    if run then
      raised[run] = (raised[run] or 0) + 1
    end
  end
  if kind == "drop" then
    gone[#gone + 1] = name
  elseif kind == "put" then
    local n = #doc_pairs
    doc_pairs[n + 1] = name
    doc_pairs[n + 2] = integer(tonumber(revision) + 1) .. " " .. commit .. " " .. words .. "\n"
      .. stands_in .. "\n" .. doc
    for place in string.gmatch(stands_in, "%S+") do
      n = #places
      places[n + 1], places[n + 2] = "0", place
    end
  elseif kind == "intent" then
    local status, on_expiry, attempts, created_at, changed_at, claimed_at, lease_end, run,
      key_digest, owner = string.match(words,
      "^(%S+) (%S+) (%d+) (%d+) (%d+) (%d+) (%d+) (%S+) (%S+) (.*)$")
    local row = rows[name] or {
      id = name, fence = "0", asks = "0", ask_token = "~", ask_fence = "0", ask_end = "0",
      ask_at = "0", arguments_digest = "~",
    }
    row.status, row.cause, row.token, row.on_expiry = status, "ledger", commit, on_expiry
    row.attempts, row.created_at, row.claimed_at = attempts, created_at, claimed_at
    row.lease_end, row.run, row.key_digest = tonumber(lease_end), run, key_digest
    row.revision, row.owner, row.changed_at = tonumber(revision) + 1, owner, changed_at
    changed[#changed + 1] = row
    local n = #intent_pairs
    intent_pairs[n + 1], intent_pairs[n + 2] = name, doc
  end
end

write("ZREM", index, gone_places)
write("HDEL", docs, gone)
write("HSET", docs, doc_pairs)
write("ZADD", index, places)
for run, times in pairs(raised) do
  redis.call("HINCRBY", guards, run, integer(times))
end
if #changed > 0 then
  write("HSET", intents, intent_pairs)
  save_intents(changed, now, {
    state = state, expiring = expiring, unknown = unknown, dead = dead, done = done,
    updated = updated, runs = runs,
  })
end
return { now, "committed" }
