-- Take tokens from the quotas of keys, or give them back: all requests of a moment, one after the other.
--
-- KEYS[i]        hash    the bucket of request i, which others may share: n, tokens in it, below 0 after a request larger
--                        than the bucket; at, when that was, in microseconds of this server's clock; expires when full
-- ARGV[3i - 2]   number  tokens it grows by in a second
-- ARGV[3i - 1]   number  tokens it holds at most
-- ARGV[3i]       int     tokens to take; below 0 to give back
-- Returns for each request: 1 when they were taken, else 0; tokens in the bucket now; seconds until a refused request
--          would be taken, else 0. The last two are strings, for a script's numbers lose their fractions.
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]

local function take(key, rate, burst, taken)
  local bucket = redis.call('HMGET', key, 'n', 'at')
  local tokens = burst
  if bucket[1] then -- a clock that was set back adds nothing
    tokens = math.min(burst, bucket[1] + math.max(0, now - bucket[2]) / 1000000 * rate)
  end
  -- A request above what the bucket holds needs it full: else it could never pass.
  local missing = math.min(taken, burst) - tokens
  if taken > 0 and missing > 0 then
    return 0, tokens, missing / rate
  end
  tokens = math.min(burst, tokens - taken)
  redis.call('HSET', key, 'n', string.format('%.17g', tokens), 'at', string.format('%.0f', now))
  redis.call('PEXPIRE', key, string.format('%.0f', math.ceil((burst - tokens) / rate * 1000) + 1000))
  return 1, tokens, 0
end

local out = {}
for i, key in ipairs(KEYS) do
  local taken, tokens, wait = take(key, tonumber(ARGV[3 * i - 2]), tonumber(ARGV[3 * i - 1]), tonumber(ARGV[3 * i]))
  out[i] = {taken, string.format('%.17g', tokens), string.format('%.17g', wait)}
end
return out
