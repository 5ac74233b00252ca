-- Announce jobs whose answers go to an inbox: what the receiver is to be told of them, and how much they will bring.
--
-- KEYS[1]  stream  the inbox
-- KEYS[2]  hash    <request id>:<job> -> bytes its answer will have, a space, and what the receiver is told; and `bytes`,
--                  their sum. A job's field goes when its answer is acknowledged
-- ARGV[1]  string  consumer group of the inbox
-- ARGV[2]  int     milliseconds that the inbox is to live without its senders and receivers; never shortened
-- ARGV[3]  int     most bytes of answers that are not acknowledged
-- ARGV[4…] for each job: field, bytes, what the receiver is told
-- Returns whether it was refused, the bytes of answers before it, and how many of the jobs are new.
local bytes = tonumber(redis.call('HGET', KEYS[2], 'bytes') or 0)
local new, new_bytes = {}, 0
for at = 4, #ARGV, 3 do
  if redis.call('HEXISTS', KEYS[2], ARGV[at]) == 0 then
    new[#new + 1] = at
    new_bytes = new_bytes + tonumber(ARGV[at + 1])
  end
end
-- What is waiting decides, never the request itself: an empty inbox takes every request.
if #new > 0 and bytes > 0 and bytes + new_bytes > tonumber(ARGV[3]) then
  return {1, bytes, 0}
end
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('XADD', KEYS[1], '*', 'p', '')
end
redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0') -- or it is there
for _, at in ipairs(new) do
  redis.call('HSET', KEYS[2], ARGV[at], ARGV[at + 1] .. ' ' .. ARGV[at + 2])
end
redis.call('HINCRBY', KEYS[2], 'bytes', string.format('%.0f', new_bytes))
for _, key in ipairs(KEYS) do
  if redis.call('PTTL', key) < tonumber(ARGV[2]) then
    redis.call('PEXPIRE', key, ARGV[2])
  end
end
return {0, bytes, #new}
