-- Scripts run in Redis: Lua 5.1, no globals but redis, KEYS and ARGV, and the locals of the prelude,
-- which the loader puts in front of every script. Those are read from the prelude itself.
std = "lua51"
max_line_length = 100
read_globals = { "redis", "KEYS", "ARGV" }

for line in io.lines("lua/prelude.lua") do
  local name = line:match("^local function ([%w_]+)") or line:match("^local ([%w_]+) =")
  read_globals[#read_globals + 1] = name
end

files["lua/prelude.lua"] = {
  ignore = { "211" }, -- what the prelude defines is used by the scripts, not by itself
}
