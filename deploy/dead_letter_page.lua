-- Read some dead letters without their bodies, of which each may have 256 KB.
--
-- KEYS[1]  stream  dead letters
-- ARGV[1]  string  XRANGE (oldest first) or XREVRANGE (newest first)
-- ARGV[2]  string  id where reading begins
-- ARGV[3]  string  id where it ends
-- ARGV[4]  int     most entries
-- ARGV[5]  int     longest value in bytes: a valid field is shorter, and what anybody wrote into the stream is cut
-- Returns a list of {id, {field, value, …}}; the value of the field b is its length.
local longest = tonumber(ARGV[5])
local entries = redis.call(ARGV[1], KEYS[1], ARGV[2], ARGV[3], 'COUNT', ARGV[4])
for _, entry in ipairs(entries) do
  local fields = entry[2]
  for at = 1, #fields, 2 do
    if fields[at] == 'b' then
      fields[at + 1] = tostring(#fields[at + 1])
    else
      fields[at + 1] = string.sub(fields[at + 1], 1, longest)
    end
  end
end
return entries
