-- Take tokens from the quota of a key, or give them back.
--
-- KEYS[1]  hash    the bucket: n, tokens in it, below 0 after a request larger than the bucket; at, when that was, in
--                  microseconds of this server's clock; expires when it would be full
-- ARGV[1]  number  tokens it grows by in a second
-- ARGV[2]  number  tokens it holds at most
-- ARGV[3]  int     tokens to take; below 0 to give back
-- Returns: 1 when they were taken, else 0; tokens in the bucket now; seconds until a refused request would be taken,
--          else 0. The last two are strings, for a script's numbers lose their fractions.
local RATE, BURST, TAKEN = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local bucket = redis.call('HMGET', KEYS[1], 'n', 'at')
local tokens = BURST
if bucket[1] then -- a clock that was set back adds nothing
  tokens = math.min(BURST, bucket[1] + math.max(0, now - bucket[2]) / 1000000 * RATE)
end
-- A request above what the bucket holds needs it full: else it could never pass.
local missing = math.min(TAKEN, BURST) - tokens
if TAKEN > 0 and missing > 0 then
  return {0, string.format('%.17g', tokens), string.format('%.17g', missing / RATE)}
end
tokens = math.min(BURST, tokens - TAKEN)
redis.call('HSET', KEYS[1], 'n', string.format('%.17g', tokens), 'at', string.format('%.0f', now))
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil((BURST - tokens) / RATE * 1000) + 1000))
return {1, string.format('%.17g', tokens), '0'}
