-- Add the jobs of several requests to their lanes; each request is accepted or refused as a whole.
--
-- KEYS[1]  stream  interactive lane
-- KEYS[2]  stream  bulk lane
-- ARGV[1]  string  reply stream of the caller
-- ARGV[2]  int     most jobs on one lane
-- ARGV[3…] for each request: place of its lane in KEYS, 1 to ask for admission or 0 when it was given before,
--          number of jobs, then header and body of each job
-- Returns for each request a list of entry ids, or, when it is refused, the length of its lane.
local out, at, limit = {}, 3, tonumber(ARGV[2])
while at <= #ARGV do
  local lane, ask, count = KEYS[tonumber(ARGV[at])], ARGV[at + 1] == '1', tonumber(ARGV[at + 2])
  at = at + 3
  local waiting = ask and redis.call('XLEN', lane) or 0
  -- The work ahead decides, never the request itself: an empty lane takes every legal request.
  if ask and waiting >= limit then
    out[#out + 1] = waiting
  else
    local ids = {}
    for job = at, at + 2 * count - 2, 2 do
      ids[#ids + 1] = redis.call('XADD', lane, '*', 'h', ARGV[job], 'b', ARGV[job + 1], 'rt', ARGV[1])
    end
    out[#out + 1] = ids
  end
  at = at + 2 * count
end
return out
