-- Tell which entries are still on a lane, without sending their bodies back.
--
-- KEYS[1]  stream  a lane
-- ARGV     string  entry ids
-- Returns for each id 1 when the entry is there, else 0.
local out = {}
for place, id in ipairs(ARGV) do
  out[place] = #redis.call('XRANGE', KEYS[1], id, id)
end
return out
