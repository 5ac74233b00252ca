-- Put a dead letter back on its lane: added, counted and deleted at once, so it is never in both places or in neither.
--
-- KEYS[1]  stream  dead letters
-- KEYS[2]  stream  the lane
-- KEYS[3]  hash    all that was ever put on the lanes, see producer/enqueue.lua
-- KEYS[4]  hash    the result of its request
-- ARGV[1]  string  id of the dead letter
-- ARGV[2]  string  the header to send
-- ARGV[3]  string  i or b: the lane's fields in KEYS[3]
-- ARGV[4]  int     tokens of the job
-- ARGV[5]  string  beginning of the names under which KEYS[4] holds parts of this job
-- ARGV[6]  string  field of KEYS[4] that tells how many jobs the request has
-- ARGV[7]  int     how many that are
-- ARGV[8]  string  field of KEYS[4] that tells that the request was cancelled
-- ARGV[9]  int     seconds to keep KEYS[4]
-- Returns the id on the lane, or nil when there is no such dead letter any more.
local entry = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not entry then
  return nil
end
local body, reply = '', ''
for at = 1, #entry[2], 2 do
  if entry[2][at] == 'b' then
    body = entry[2][at + 1]
  elseif entry[2][at] == 'rt' then
    reply = entry[2][at + 1]
  end
end
-- First of all, for a server without memory refuses the first write of a script, and then nothing was done.
local id = redis.call('XADD', KEYS[2], '*', 'h', ARGV[2], 'b', body, 'rt', reply)
redis.call('HINCRBY', KEYS[3], ARGV[3] .. ':jobs', 1)
redis.call('HINCRBY', KEYS[3], ARGV[3] .. ':tokens', ARGV[4])
redis.call('HINCRBY', KEYS[3], ARGV[3] .. ':bytes', #ARGV[2] + #body)
redis.call('XDEL', KEYS[1], ARGV[1])
-- Whoever picks the result up waits for the new one, and does not meet the failure of the old.
for _, name in ipairs(redis.call('HKEYS', KEYS[4])) do
  if string.sub(name, 1, #ARGV[5]) == ARGV[5] then
    redis.call('HDEL', KEYS[4], name)
  end
end
redis.call('HDEL', KEYS[4], ARGV[8])
redis.call('HSET', KEYS[4], ARGV[6], ARGV[7])
redis.call('EXPIRE', KEYS[4], ARGV[9])
return id
