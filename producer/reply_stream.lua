-- Keep the caller's reply stream alive, or create it anew when it is gone; and the lanes with their group.
--
-- KEYS[1]   stream  the reply stream
-- KEYS[2…]  stream  lanes
-- ARGV[1]   int     milliseconds until the reply stream expires without its reader
-- ARGV[2]   string  consumer group of the lanes
-- Returns 1 when the reply stream was created, else 0, and the id of the newest entry it ever had.
local created = 0
if redis.call('PEXPIRE', KEYS[1], ARGV[1]) == 0 then
  redis.call('XADD', KEYS[1], '*', 'p', '')
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
  created = 1
end
for place = 2, #KEYS do
  if redis.call('EXISTS', KEYS[place]) == 0 or #redis.call('XINFO', 'GROUPS', KEYS[place]) == 0 then
    -- Not `call`: when memory is full it is refused, and the reply stream must be renewed all the same.
    redis.pcall('XGROUP', 'CREATE', KEYS[place], ARGV[2], '0', 'MKSTREAM')
  end
end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for place = 1, #info, 2 do
  if info[place] == 'last-generated-id' then
    return {created, info[place + 1]}
  end
end
