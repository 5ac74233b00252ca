-- Keep the caller's reply stream alive, or create it anew when it is gone.
--
-- KEYS[1]  stream  the reply stream
-- ARGV[1]  int     milliseconds until it expires without its reader
-- Returns the id after which the reader has to go on: of the last entry, or of the marker it now begins with.
if redis.call('PEXPIRE', KEYS[1], ARGV[1]) == 1 then
  return {0, ''}
end
local id = redis.call('XADD', KEYS[1], '*', 'p', '')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return {1, id}
