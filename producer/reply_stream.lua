-- Keep the caller's reply stream alive, or create it anew when it is gone.
--
-- KEYS[1]  stream  the reply stream
-- ARGV[1]  int     milliseconds until it expires without its reader
-- Returns 1 when it was created, else 0, and the id of the newest entry it ever had.
local created = 0
if redis.call('PEXPIRE', KEYS[1], ARGV[1]) == 0 then
  redis.call('XADD', KEYS[1], '*', 'p', '')
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
  created = 1
end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for place = 1, #info, 2 do
  if info[place] == 'last-generated-id' then
    return {created, info[place + 1]}
  end
end
