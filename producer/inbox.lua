-- Keep an inbox, and a receiver's claim on what it has in hand; make the inbox where it is gone.
--
-- KEYS[1]  stream  the inbox
-- KEYS[2]  hash    what is told of each job; see forward.lua
-- ARGV[1]  string  consumer group of the inbox
-- ARGV[2]  int     milliseconds that the inbox is to live without its senders and receivers; never shortened
-- ARGV[3]  string  the receiver
-- ARGV[4]  int     milliseconds after which a receiver that holds nothing and asks for nothing is forgotten
-- ARGV[5…] string  ids of the entries it has in hand
-- Returns the ids of those that are not its own any more.
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('XADD', KEYS[1], '*', 'p', '')
end
redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0') -- or it is there
for _, key in ipairs(KEYS) do
  local left = redis.call('PTTL', key)
  if left ~= -2 and left < tonumber(ARGV[2]) then
    redis.call('PEXPIRE', key, ARGV[2])
  end
end
for _, receiver in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local about = {}
  for at = 1, #receiver, 2 do
    about[receiver[at]] = receiver[at + 1]
  end
  if about['pending'] == 0 and about['idle'] > tonumber(ARGV[4]) and about['name'] ~= ARGV[3] then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], about['name'])
  end
end
local lost = {}
for at = 5, #ARGV do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[at], ARGV[at], 1)
  if pending[1] and pending[1][2] == ARGV[3] then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, ARGV[at], 'JUSTID')
  else
    lost[#lost + 1] = ARGV[at]
  end
end
return lost
