-- Forget answers that their receiver has done with, and the entry that held the last of them.
--
-- KEYS[1]  stream  the inbox
-- KEYS[2]  hash    what is told of each job; see forward.lua
-- ARGV[1]  string  consumer group of the inbox
-- ARGV[2]  string  id of the entry, when no other answer in it is left; else empty
-- ARGV[3…] string  fields of the jobs
local bytes = 0
for at = 3, #ARGV do
  local told = redis.call('HGET', KEYS[2], ARGV[at])
  if told then
    bytes = bytes + (tonumber(string.match(told, '^%d+')) or 0)
    redis.call('HDEL', KEYS[2], ARGV[at])
  end
end
if ARGV[2] ~= '' then
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
  redis.call('XDEL', KEYS[1], ARGV[2])
end
if redis.call('HLEN', KEYS[2]) == 1 then
  redis.call('HDEL', KEYS[2], 'bytes') -- nothing waits, whatever the sum says
elseif bytes > 0 then
  -- Not `call`: when memory is full it is refused. Then the sum is too high until nothing waits.
  redis.pcall('HINCRBY', KEYS[2], 'bytes', string.format('%.0f', -bytes))
end
