-- Take over entries of one lane that nobody works on any more.
--
-- KEYS[1]  stream      the lane
-- KEYS[2]  sorted set  live consumers, by expiry in milliseconds of this server's clock
-- ARGV[1]  string      the group
-- ARGV[2]  string      the consumer that asks
-- ARGV[3]  int         most entries to take
-- ARGV[4]  int         bytes of fields after which no more are taken
-- ARGV[5]  int         milliseconds in one consumer's hands after which an entry is taken whatever the owner does; 0 to
--                      leave the living alone: to find such entries all that are pending are walked through
-- ARGV[6]  int         milliseconds of idleness that only an entry that was given back can show
-- Returns for each entry taken: id, reason, delivery count, its fields.
--
-- The delivery count is kept by hand, for Redis counts deliveries and we count deaths: 0 given back, 1 as delivered,
-- then one more than the consumers that died with the entry. A claim adds nothing to it but the first suspicion.
-- No lock: two consumers that ask at once take turns, and each finds what the other left.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lane, group, me = KEYS[1], ARGV[1], ARGV[2]
local most, most_bytes, backstop, given_back = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local PAGE = 100
local taken, bytes = {}, 0

local function full()
  return #taken >= most or bytes >= most_bytes
end

local function take(pending, dead)
  local id, idle, count = pending[1], tonumber(pending[3]), tonumber(pending[4])
  local reason = (count == 0 or idle >= given_back) and 'released' or dead and 'dead' or 'backstop'
  if count == 0 then
    count = 1
  elseif dead and count == 1 then
    count = 2
  end
  local claimed = redis.call('XCLAIM', lane, group, me, 0, id, 'RETRYCOUNT', count)
  if claimed[1] and claimed[1][2] then
    taken[#taken + 1] = {id, reason, count, claimed[1][2]}
    for _, field in ipairs(claimed[1][2]) do
      bytes = bytes + #field
    end
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
    else
      local page
      repeat -- what is taken is pending for us from then on, so each page is the first
        page = full() and {} or redis.call('XPENDING', lane, group, '-', '+', math.min(PAGE, most - #taken), name)
        for _, entry in ipairs(page) do
          if not full() then
            take(entry, true)
          end
        end
      until #page == 0 or full()
    end
  end
end
local start = '-'
while backstop > 0 and not full() do
  local page = redis.call('XPENDING', lane, group, 'IDLE', backstop, start, '+', PAGE)
  for _, entry in ipairs(page) do
    if entry[2] ~= me and not full() then
      take(entry, false)
    end
  end
  if #page < PAGE then
    break
  end
  start = '(' .. page[#page][1]
end
return taken
