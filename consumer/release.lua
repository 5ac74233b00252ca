-- Give back entries that were not begun: others take them at their next look, and nobody holds them against anybody.
--
-- KEYS[1]  stream  the lane
-- KEYS[2]  stream  notices to all consumers
-- ARGV[1]  string  the group
-- ARGV[2]  string  the consumer that gives back
-- ARGV[3]  int     milliseconds the entries are to look idle for
-- ARGV[4…] string  entry ids
-- Returns how many were still ours.
local lane, group, me, idle = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local released = 0
for place = 4, #ARGV do
  local id = ARGV[place]
  local pending = redis.call('XPENDING', lane, group, id, id, 1, me)
  if pending[1] then
    local count = tonumber(pending[1][4])
    if count == 1 then
      count = 0
    end
    redis.call('XCLAIM', lane, group, me, 0, id, 'IDLE', idle, 'RETRYCOUNT', count, 'JUSTID')
    released = released + 1
  end
end
if released > 0 then
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', 2000, '*', 'w', me)
  redis.call('PEXPIRE', KEYS[2], 3600000)
end
return released
