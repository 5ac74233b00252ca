-- Take over entries of one lane that nobody works on any more.
--
-- KEYS[1]  stream      the lane
-- KEYS[2]  sorted set  live consumers, by expiry in milliseconds of this server's clock
-- ARGV[1]  string      the group
-- ARGV[2]  string      the consumer that asks
-- ARGV[3]  int         most entries to take
-- ARGV[4]  int         milliseconds in one consumer's hands after which an entry is taken whatever the owner does
-- Returns for each entry taken: id, reason, delivery count, its fields.
--
-- The delivery count is kept by hand, for Redis counts deliveries and we count deaths: 0 given back, 1 as delivered,
-- then one more than the consumers that died with the entry. A claim adds nothing to it but the first suspicion.
-- No lock: two consumers that ask at once take turns, and each finds what the other left.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lane, group, me, most = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local taken = {}

local function take(pending, dead)
  local id, count = pending[1], tonumber(pending[4])
  local reason = count == 0 and 'released' or dead and 'dead' or 'backstop'
  if count == 0 then
    count = 1
  elseif dead and count == 1 then
    count = 2
  end
  local claimed = redis.call('XCLAIM', lane, group, me, 0, id, 'RETRYCOUNT', count)
  if claimed[1] and claimed[1][2] then
    taken[#taken + 1] = {id, reason, count, claimed[1][2]}
  else
    redis.call('XACK', lane, group, id) -- deleted while it was pending: Redis 6.2 keeps such ids for ever
  end
end

local consumers = redis.pcall('XINFO', 'CONSUMERS', lane, group)
if consumers.err then
  return taken -- no lane or no group yet: readers make them anew
end
for _, consumer in ipairs(consumers) do
  local name, pending = consumer[2], consumer[4]
  local expiry = redis.call('ZSCORE', KEYS[2], name)
  if name ~= me and (not expiry or tonumber(expiry) <= now) then
    if pending == 0 then
      redis.call('XGROUP', 'DELCONSUMER', lane, group, name)
    elseif #taken < most then
      for _, entry in ipairs(redis.call('XPENDING', lane, group, '-', '+', most - #taken, name)) do
        take(entry, true)
      end
    end
  end
end
if #taken < most then
  for _, entry in ipairs(redis.call('XPENDING', lane, group, 'IDLE', ARGV[4], '-', '+', most)) do
    if entry[2] ~= me and #taken < most then
      take(entry, false)
    end
  end
end
return taken
