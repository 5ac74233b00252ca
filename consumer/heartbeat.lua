-- Renew a consumer's claim to be alive.
--
-- KEYS[1]  string      its announcement
-- KEYS[2]  sorted set  live consumers, by expiry in milliseconds of this server's clock
-- KEYS[3]  string      first piece of its model card
-- ARGV[1]  string      the announcement, JSON
-- ARGV[2]  int         milliseconds until it counts as dead
-- ARGV[3]  string      its name
-- Returns the server's time in milliseconds, and 1 when the model card is there, else 0.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', '(' .. now)
return {now, redis.call('EXISTS', KEYS[3])}
