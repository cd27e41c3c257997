-- gate/complete: record what became of what was granted.
--
-- KEYS  1 docs     hash intent id -> the intent as JSON
--       2 state    hash intent id -> state line
--       3 facts    hash intent id -> what was said of it
--       4 expiring zset intent id -> lease end, of what parks
--       5 unknown  zset intent id -> when the destination may be asked
--       6 dead     zset intent id -> when it got there
--       7 done     zset intent id -> when it was sent or cancelled
--       8 updated  zset intent id -> its last change
--       9 runs     zset run, time of the last change, intent id -> 0
-- ARGV  1 now_ms   "" for the server's clock
--       2 repeated 1 if the caller sent these items before and does not know what became of it
--       3 keep_ms  how long sent and cancelled intents are remembered
-- ITEM  id token result note: token = that of the grant, or "" (nobody's: an event without a
--       receipt); result = succeeded | failed | blocked | left; note = JSON
-- REPLY now_ms, per item: recorded status | kept status | lost status | skipped status | missing
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(m log n) for m items
-- WHY   With its token a sender may say more as long as nobody else was granted the intent, also
--       late: sent beats failed beats cancelled beats unknown, so that no word of a sender makes
--       what was sent look unsent. Without a token nobody knows whose word it is: success and
--       failure end the intent, and neither leads to a new grant; blocked ends a first attempt.
local docs, state, facts, expiring, unknown = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local dead, done, updated, runs = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local now_ms, repeated, keep_ms = ARGV[1], ARGV[2], ARGV[3]

local FIXED, WIDTH = 3, 4
local STATUS = { succeeded = "sent", failed = "failed", blocked = "cancelled", left = "unknown" }
local RANK = {
  pending = 0, claimed = 0, unknown = 1, dead_lettered = 1, cancelled = 2, failed = 3, sent = 4,
}
local now = clock(now_ms)
local age = whole(keep_ms, 1, DURATION_MS_MAX)
local count = (#ARGV - FIXED) / WIDTH
if not now then
  return refuse("now_ms")
end
if not is_flag(repeated) then
  return refuse("repeated")
end
if not age then
  return refuse("keep_ms")
end
if count < 1 or count > ITEMS_MAX or count ~= math.floor(count) then
  return refuse("items")
end
local ids = {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local token, result, note = ARGV[base + 2], ARGV[base + 3], ARGV[base + 4]
  ids[i] = ARGV[base + 1]
  if token ~= "" and not is_token(token) then
    return refuse("token")
  end
  if not STATUS[result] or (token == "" and result == "left") then
    return refuse("result")
  end
  if string.find(note, "\n", 1, true) or #note > FACT_BYTES_MAX then
    return refuse("note")
  end
end
local rows, said = read_intents(state, ids), values_of(facts, ids)
local over = redis.call("ZRANGEBYSCORE", done, "-inf", integer(now - age),
  "LIMIT", "0", integer(math.min(2 * count + 10, PRUNE_ROWS_MAX)))
local over_rows = read_intents(state, over)

local reply, changed, noted, noted_ids, texts = { now }, {}, {}, {}, {}
for i = 1, count do
  local base = FIXED + (i - 1) * WIDTH
  local id, token, result, note = ids[i], ARGV[base + 2], ARGV[base + 3], ARGV[base + 4]
  local row = rows[id]
  if not row or row == "damaged" then
    reply[i + 1] = "missing"
  else
    local lines = texts[id] or said[i] or nil
    local wanted, status = STATUS[result], intent_status(row, now)
    local is_own = token ~= "" and row.token == token
    local fence = is_own and row.fence or "0"
    -- A repeat of what was applied says nothing new, whatever was said since.
    local told = false
    if repeated == "1" and lines and (is_own or token == "") then
      local fact = " " .. result .. " " .. fence .. " 1 " .. note .. "\n"
      told = string.find(lines .. "\n", fact, 1, true)
    end
    local answer, applies
    if is_own then
      local is_again = result == "left" and row.cause == "left"
      -- What a destination or an operator freed, its old sender can only say to be sent.
      local is_freed = row.status == "cancelled" and row.cause ~= "blocked"
      applies = RANK[wanted] > RANK[row.status] and not is_again and not told
        and not (is_freed and result == "failed")
      answer = (applies or is_again or wanted == status) and "recorded" or "kept"
    elseif token ~= "" then
      answer = "lost"
    elseif told then
      answer = "recorded"
    elseif result == "blocked" then
      applies = row.status == "claimed" and row.cause == "granted" and row.attempts == 1
        and row.on_expiry == "reclaim"
      answer = applies and "recorded" or "skipped"
    else
      applies, answer = true, "recorded"
    end
    if applies then
      if wanted == "unknown" and row.on_expiry == "reclaim" then
        -- Whoever lets others try again gives way at once.
        wanted = "claimed"
        row.lease_end = math.min(row.lease_end, now)
      elseif wanted == "unknown" then
        row.lease_end = math.min(row.lease_end, now)
        row.ask_at = integer(row.lease_end)
      end
      row.status, row.cause, row.revision = wanted, result, row.revision + 1
      if not row.is_changed then
        row.is_changed = true
        changed[#changed + 1] = row
      end
      status = wanted
    end
    if applies or (answer ~= "recorded" and not told) then
      local text = with_fact(lines, now, result, fence, applies, note)
      if text ~= lines then
        texts[id] = text
        local n = #noted
        noted[n + 1], noted[n + 2] = id, text
        noted_ids[#noted_ids + 1] = id
      end
    end
    reply[i + 1] = { answer, status }
  end
end
local gone, gone_runs, left = {}, {}, {}
for i = 1, #over do
  local row = over_rows[over[i]]
  if not rows[over[i]] then
    left[#left + 1] = over[i]
    -- Only what is over is forgotten: a list that tells otherwise must not free a key.
    if not row or (row ~= "damaged" and LIST_OF[row.status] == "done") then
      gone[#gone + 1] = over[i]
      if row and row.run ~= "~" then
        gone_runs[#gone_runs + 1] = run_member(row, row.updated_at)
      end
    end
  end
end

write("ZREM", done, left)
write("ZREM", updated, gone)
write("ZREM", runs, gone_runs)
write("HDEL", docs, gone)
write("HDEL", state, gone)
write("HDEL", facts, gone)
if #changed > 0 then
  save_intents(changed, now, {
    state = state, expiring = expiring, unknown = unknown, dead = dead, done = done,
    updated = updated, runs = runs,
  })
end
write("HDEL", facts, noted_ids)
write("HSET", facts, noted)
return reply
