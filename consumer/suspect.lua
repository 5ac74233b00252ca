-- Book an attempt: these entries are about to run apart from others, and may kill the consumer.
--
-- KEYS[1]  stream  the lane
-- ARGV[1]  string  the group
-- ARGV[2]  string  the consumer that asks
-- ARGV[3…] string, int  for each entry its id and its new delivery count
-- Returns the ids that are still ours, each with that count. It is given, not added to: a call whose reply was lost is
-- made again, and must not count twice.
local lane, group, me = KEYS[1], ARGV[1], ARGV[2]
local ours = {}
for place = 3, #ARGV, 2 do
  local id = ARGV[place]
  local pending = redis.call('XPENDING', lane, group, id, id, 1, me)
  if pending[1] then
    redis.call('XCLAIM', lane, group, me, 0, id, 'RETRYCOUNT', ARGV[place + 1], 'JUSTID')
    ours[#ours + 1] = id
  end
end
return ours
