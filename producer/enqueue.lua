-- Add the jobs of several requests to their lanes; each request is accepted or refused as a whole.
--
-- KEYS[1]  stream  interactive lane
-- KEYS[2]  stream  bulk lane
-- KEYS[3]  hash    all that was ever put on the lanes: i:jobs i:tokens i:bytes, b:jobs b:tokens b:bytes; it only grows
-- ARGV[1]  string  reply stream of the caller
-- ARGV[2]  number  how many times slower than the whole the bulk lane is at most: 1 / its guaranteed share
-- ARGV[3]  int     tokens of a job, where nothing is known of it
-- ARGV[4]  int     bytes of such a job
-- ARGV[5…7]   int  what had left the interactive lane when the caller looked: jobs, tokens, bytes
-- ARGV[8…10]  int  the same of the bulk lane
-- ARGV[11…] for each request: place of its lane in KEYS, 1 to ask for admission or 0 when it was given before,
--          most tokens ahead of it (-1: any number), most bytes on its lane, tokens and bytes to reserve (a request of
--          several calls reserves all with the first), number of jobs, then header and body of each job
-- Returns for each request: 0, or why it is refused (1 too much work ahead of it, 2 too many bytes on its lane);
--          tokens ahead of it; bytes on its lane before it; the list of its entry ids.
local SLOWER, GUESSED_TOKENS, GUESSED_BYTES = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local NAMES = {'i', 'b'}
local sums = redis.call('HMGET', KEYS[3], 'i:jobs', 'i:tokens', 'i:bytes', 'b:jobs', 'b:tokens', 'b:bytes')

-- What is on a lane now: what came since the base, for the base's jobs left first. Since the caller looked, further
-- jobs may have left; of the tokens they take their part, of the bytes nothing is taken off, for those are a hard bound.
local function on_lane(lane)
  local waiting = redis.call('XLEN', KEYS[lane])
  if waiting == 0 then
    return {waiting = 0, tokens = 0, bytes = 0}
  end
  local at = 3 * lane - 2
  local jobs, tokens, bytes = tonumber(sums[at]) or 0, tonumber(sums[at + 1]) or 0, tonumber(sums[at + 2]) or 0
  local left = {tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6])}
  if jobs > left[1] and tokens >= left[2] and bytes >= left[3] then
    jobs, tokens, bytes = jobs - left[1], tokens - left[2], bytes - left[3]
  end -- else the totals began anew after a loss, or others add without them: the mean of all must do
  if jobs <= 0 then
    return {waiting = waiting, tokens = waiting * GUESSED_TOKENS, bytes = waiting * GUESSED_BYTES}
  end
  local scale = waiting / jobs
  return {waiting = waiting, tokens = tokens * scale, bytes = bytes * math.max(1, scale)}
end

local there = {on_lane(1), on_lane(2)}
local added = {{jobs = 0, tokens = 0, bytes = 0}, {jobs = 0, tokens = 0, bytes = 0}}
local out, at = {}, 11
while at <= #ARGV do
  local lane, ask, most_tokens, most_bytes = tonumber(ARGV[at]), ARGV[at + 1] == '1', tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local tokens, bytes, count = tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6])
  at = at + 7
  local own = there[lane]
  local ahead = own.tokens
  if lane == 2 then -- interactive goes first, but only as far as the bulk lane's share
    ahead = math.min(own.tokens + there[1].tokens, own.tokens * SLOWER)
  end
  -- The work ahead decides, never the request itself: an empty lane takes every legal request.
  local refused = 0
  if ask and own.waiting > 0 then
    if own.bytes + bytes > most_bytes then
      refused = 2
    elseif most_tokens >= 0 and ahead > most_tokens then
      refused = 1
    end
  end
  local ids, on_it = {}, own.bytes
  if refused == 0 then
    for job = at, at + 2 * count - 2, 2 do
      ids[#ids + 1] = redis.call('XADD', KEYS[lane], '*', 'h', ARGV[job], 'b', ARGV[job + 1], 'rt', ARGV[1])
    end
    own.waiting, own.tokens, own.bytes = own.waiting + count, own.tokens + tokens, own.bytes + bytes
    local sum = added[lane]
    sum.jobs, sum.tokens, sum.bytes = sum.jobs + count, sum.tokens + tokens, sum.bytes + bytes
  end
  out[#out + 1] = {refused, ahead, on_it, ids}
  at = at + 2 * count
end
for lane, sum in ipairs(added) do
  for name, value in pairs(sum) do
    if value > 0 then
      redis.call('HINCRBY', KEYS[3], NAMES[lane] .. ':' .. name, string.format('%.0f', value))
    end
  end
end
return out
