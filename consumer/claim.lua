-- Read again entries of one lane that are pending for us, because the reply to their first read was lost.
--
-- KEYS[1]  stream  the lane
-- ARGV[1]  string  the group
-- ARGV[2]  string  the consumer that asks
-- ARGV[3]  int     bytes of fields after which no more are read
-- ARGV[4…] string  entry ids
-- Returns for each entry that is still ours: id, delivery count, its fields. The count is unchanged but for 0: an entry
-- that we gave back and nobody took is ours again, and may be our end.
local lane, group, me = KEYS[1], ARGV[1], ARGV[2]
local taken, bytes, most_bytes = {}, 0, tonumber(ARGV[3])
for place = 4, #ARGV do
  if bytes >= most_bytes then
    break
  end
  local id = ARGV[place]
  local pending = redis.call('XPENDING', lane, group, id, id, 1, me)
  if pending[1] then
    local count = math.max(1, tonumber(pending[1][4]))
    local claimed = redis.call('XCLAIM', lane, group, me, 0, id, 'RETRYCOUNT', count)
    if claimed[1] and claimed[1][2] then
      taken[#taken + 1] = {id, count, claimed[1][2]}
      for _, field in ipairs(claimed[1][2]) do
        bytes = bytes + #field
      end
    else
      redis.call('XACK', lane, group, id)
    end
  end
end
return taken
