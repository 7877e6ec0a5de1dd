"""The Lua scripts. Each declares its keys; time is that of Redis; a script that is repeated does nothing twice."""

from __future__ import annotations

from typing import Final

from .client import Script

KEPT: Final = 7 * 24 * 3600 * 1000
"""Milliseconds after which what nobody renews is forgotten: as long as the records of work that has not ended."""

_MOST_LOGGED: Final = 100_000
_MOST_MAIL: Final = 10_000
_KEY_KEPT: Final = 3600 * 1000

_SHARED: Final = f"""
local KEPT, KEY_KEPT = {KEPT}, {_KEY_KEPT}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function whole(number) return string.format('%.0f', number) end

-- Whether a worker may be taken for dead by `me`, who has renewed its lease without a break for a whole lease: after an
-- outage, the leases of all have run out.
local function is_dead(workers, since, worker, me, lease)
  local till = redis.call('ZSCORE', workers, worker)
  if till and tonumber(till) >= now then return false end
  local mine = redis.call('HGET', since, me)
  return mine and now - tonumber(mine) >= tonumber(lease)
end

-- Whether a worker may hold something. Those who die are found by their leases, and after a loss of all data it has none
-- before its next sign of life, which also sees by `since` that it was forgotten.
local function may_hold(workers, tombstone, worker, lease)
  if redis.call('EXISTS', tombstone) == 1 then return false end
  redis.call('ZADD', workers, 'NX', whole(now + tonumber(lease)), worker)
  return true
end

local function forget(workers, identities, since, inbox, worker)
  redis.call('ZREM', workers, worker)
  redis.call('HDEL', identities, worker)
  redis.call('HDEL', since, worker)
  redis.call('DEL', inbox)
end

-- An index: ids by the time of their creation, beside the times when their records expire.
local function trim(index, expiry, most)
  local old = redis.call('ZRANGEBYSCORE', expiry, '-inf', whole(now), 'LIMIT', 0, 1000)
  local surplus = redis.call('ZCARD', index) - most
  if surplus > 0 then
    for _, id in ipairs(redis.call('ZRANGE', index, 0, math.min(surplus, 1000) - 1)) do old[#old + 1] = id end
  end
  for _, id in ipairs(old) do
    redis.call('ZREM', index, id)
    redis.call('ZREM', expiry, id)
  end
  local last = redis.call('ZREVRANGE', expiry, 0, 0, 'WITHSCORES')[2]
  if last then
    redis.call('PEXPIREAT', index, whole(tonumber(last) + 1000))
    redis.call('PEXPIREAT', expiry, whole(tonumber(last) + 1000))
  end
end

local function note_end(index, expiry, id, ttl, most)
  if redis.call('ZSCORE', index, id) then redis.call('ZADD', expiry, whole(now + ttl), id) end
  trim(index, expiry, most)
end

local function is_set(value) return value and value ~= 'null' end

-- Entries of streams, "ms-number".
local function is_before(one, other)
  local a, b = string.match(one, '(%d+)-(%d+)')
  local c, d = string.match(other, '(%d+)-(%d+)')
  a, b, c, d = tonumber(a), tonumber(b), tonumber(c), tonumber(d)
  return a < c or (a == c and b < d)
end

-- Places of a key: a hash of the holders ("" has the limit), and a sorted set of "worker id" that wait.
local function generation_of(value) return tonumber(string.match(value, '^(%d+) ')) end
local function worker_of(value) return string.match(value, '^%d+ (.*)$') end

local function grant(held, waiting, workers, since, me, lease)
  local granted = {{}}
  local limit = tonumber(redis.call('HGET', held, '') or '1')
  while redis.call('HLEN', held) - redis.call('HEXISTS', held, '') < limit do
    local first = redis.call('ZRANGE', waiting, 0, 0, 'WITHSCORES')
    if not first[1] then break end
    redis.call('ZREM', waiting, first[1])
    local worker, id = string.match(first[1], '^(%S+) (.*)$')
    if not is_dead(workers, since, worker, me, lease) then
      redis.call('HSET', held, id, whole(tonumber(first[2])) .. ' ' .. worker)
      granted[#granted + 1] = worker
      granted[#granted + 1] = id
    end
  end
  if redis.call('HLEN', held) == redis.call('HEXISTS', held, '') and redis.call('EXISTS', waiting) == 0 then
    redis.call('DEL', held)
  end
  return granted
end
"""


def _script(text: str) -> Script:
    return Script.of(_SHARED + text)


BEGIN: Final = _script("""
-- The time, and what Redis does when its memory is full.
local ok, memory = pcall(redis.call, 'INFO', 'memory')
memory = ok and type(memory) == 'string' and memory or ''
local policy = string.match(memory, 'maxmemory_policy:(%S+)') or ''
local most = string.match(memory, 'maxmemory:(%d+)') or '0'
return {whole(now), policy, most}
""")

BROADCAST: Final = _script(f"""
-- KEYS log  ARGV data, id, memory
local oldest = whole(now - tonumber(ARGV[3]))
local position = redis.call('XADD', KEYS[1], 'MINID', '~', oldest, '*', 'i', ARGV[2], 'd', ARGV[1])
if redis.call('XLEN', KEYS[1]) > {_MOST_LOGGED} then redis.call('XTRIM', KEYS[1], 'MAXLEN', '~', {_MOST_LOGGED}) end
redis.call('PEXPIRE', KEYS[1], whole(2 * tonumber(ARGV[3]) + 1000))
return position
""")

SEND: Final = _script(f"""
-- KEYS inbox, workers, since  ARGV data, id, worker, me, lease
if is_dead(KEYS[2], KEYS[3], ARGV[3], ARGV[4], ARGV[5]) then return 0 end
redis.call('XADD', KEYS[1], 'MAXLEN', '~', {_MOST_MAIL}, '*', 'i', ARGV[2], 'd', ARGV[1])
redis.call('PEXPIRE', KEYS[1], whole(2 * tonumber(ARGV[5])))
return 1
""")

MISSING: Final = _script("""
-- KEYS log  ARGV memory, ids...
local wanted = {}
for i = 2, #ARGV do wanted[ARGV[i]] = true end
local position = whole(now - tonumber(ARGV[1]))
while next(wanted) do
  local entries = redis.call('XRANGE', KEYS[1], position, '+', 'COUNT', 1000)
  for _, entry in ipairs(entries) do wanted[entry[2][2]] = nil end
  if #entries < 1000 then break end
  position = '(' .. entries[#entries][1]
end
local missing = {}
for id in pairs(wanted) do missing[#missing + 1] = id end
return missing
""")

BEAT: Final = _script(f"""
-- KEYS workers, identities, since, tombstone, inbox, held, log
-- ARGV me, lease, identity, read to in the log, read to in the inbox, memory
local me, lease, read = ARGV[1], tonumber(ARGV[2]), ARGV[4]
local lost, gap, oldest = 0, 0, whole(now - tonumber(ARGV[6])) .. '-0'
if read ~= '' then
  local last = redis.call('XREVRANGE', KEYS[7], '+', '-', 'COUNT', 1)[1]
  if is_before(oldest, read) and (not last or is_before(last[1], read)) then lost = 1 end
  local first = redis.call('XRANGE', KEYS[7], '-', '+', 'COUNT', 1)[1]
  if first and is_before(read, first[1]) and redis.call('XLEN', KEYS[7]) >= {_MOST_LOGGED} then gap = 1 end
end
local fenced, known = redis.call('EXISTS', KEYS[4]), 1
if fenced == 0 then
  local till = redis.call('ZSCORE', KEYS[1], me)
  known = redis.call('HEXISTS', KEYS[3], me)
  if known == 0 or not till or tonumber(till) < now then redis.call('HSET', KEYS[3], me, whole(now)) end
  redis.call('ZADD', KEYS[1], whole(now + lease), me)
  redis.call('HSET', KEYS[2], me, ARGV[3])
  for i = 1, 3 do redis.call('PEXPIRE', KEYS[i], KEPT) end
  redis.call('PEXPIRE', KEYS[6], KEPT)
  if redis.call('EXISTS', KEYS[5]) == 1 then
    -- After a loss, what has come since may have a place before what was read.
    if known == 1 and lost == 0 then redis.call('XTRIM', KEYS[5], 'MINID', ARGV[5]) end
    redis.call('PEXPIRE', KEYS[5], whole(2 * lease))
  end
end
local alive, dead = {{}}, {{}}
for _, worker in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  if tonumber(redis.call('ZSCORE', KEYS[1], worker)) >= now then
    alive[#alive + 1] = redis.call('HGET', KEYS[2], worker) or ''
  elseif is_dead(KEYS[1], KEYS[3], worker, me, lease) then
    dead[#dead + 1] = worker
  end
end
return {{fenced, known, lost, oldest, gap, alive, dead}}
""")

BURY: Final = _script("""
-- KEYS workers, since, tombstone, held  ARGV worker, me, lease, ms for which the tombstone is kept, how many
-- What a dead worker has held, some of it. From now on it is told that it was given up.
if redis.call('EXISTS', KEYS[3]) == 0 then
  if not is_dead(KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3]) then return {} end
  redis.call('SET', KEYS[3], '1', 'PX', ARGV[4])
end
return redis.call('SRANDMEMBER', KEYS[4], ARGV[5])
""")

FORGET: Final = _script("""
-- KEYS workers, identities, since, inbox, held  ARGV worker
-- A worker that holds nothing any more.
if redis.call('EXISTS', KEYS[5]) == 1 then return 0 end
forget(KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1])
return 1
""")

PART: Final = _script("""
-- KEYS workers, identities, since, inbox, held  ARGV worker
-- A worker that ends. What it holds still is left to the others, at once.
if redis.call('EXISTS', KEYS[5]) == 1 then return redis.call('ZADD', KEYS[1], 'XX', 0, ARGV[1]) end
forget(KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1])
return 0
""")

CREATE: Final = _script("""
-- KEYS op, held, workers, tombstone, index, expiry [, index of the owner, expiry]
-- ARGV id, member of held, ttl, created, most, most of an owner, me, lease, fields and values as JSON
local fields = cjson.decode(ARGV[9])
if redis.call('EXISTS', KEYS[1]) == 1 then
  local worker, created = unpack(redis.call('HMGET', KEYS[1], 'worker', 'created'))
  local given = {}
  for i = 1, #fields, 2 do given[fields[i]] = fields[i + 1] end
  -- This call has come before, and its answer was lost.
  if worker == given.worker and created == given.created and not is_set(redis.call('HGET', KEYS[1], 'ended')) then
    return {1, redis.call('HGETALL', KEYS[1])}
  end
  return {0, redis.call('HGETALL', KEYS[1])}
end
if not may_hold(KEYS[3], KEYS[4], ARGV[7], ARGV[8]) then return {-1, {}} end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('PEXPIRE', KEYS[2], KEPT)
for i = 5, #KEYS, 2 do
  redis.call('ZADD', KEYS[i], ARGV[4], ARGV[1])
  redis.call('ZADD', KEYS[i + 1], whole(now + tonumber(ARGV[3])), ARGV[1])
  trim(KEYS[i], KEYS[i + 1], tonumber(ARGV[i == 5 and 5 or 6]))
end
return {1, {}}
""")

CHANGE: Final = _script("""
-- KEYS op, result, held, tombstone, index, expiry [, index of the owner, expiry]
-- ARGV worker, id, member of held, ttl at the end or '', result or '', ended, most, most of an owner, fields and values as
-- JSON
local worker, ended = unpack(redis.call('HMGET', KEYS[1], 'worker', 'ended'))
if not worker or worker ~= ARGV[1] then return 0 end
if is_set(ended) then return ended == ARGV[6] and 1 or 0 end
if redis.call('EXISTS', KEYS[4]) == 1 then return 0 end
local fields = cjson.decode(ARGV[9])
if #fields > 0 then redis.call('HSET', KEYS[1], unpack(fields)) end
local ttl = tonumber(ARGV[4])
if ttl then
  if ARGV[5] ~= '' then redis.call('SET', KEYS[2], ARGV[5], 'PX', ARGV[4]) end
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
  redis.call('SREM', KEYS[3], ARGV[3])
  for i = 5, #KEYS, 2 do note_end(KEYS[i], KEYS[i + 1], ARGV[2], ttl, tonumber(ARGV[i == 5 and 7 or 8])) end
end
return 1
""")

LOSE: Final = _script("""
-- KEYS op, held, index, expiry [, index of the owner, expiry]  ARGV worker, id, member of held, ttl, most, most of an owner
redis.call('SREM', KEYS[2], ARGV[3])
local worker, ended = unpack(redis.call('HMGET', KEYS[1], 'worker', 'ended'))
if not worker or worker ~= ARGV[1] or is_set(ended) then return 0 end
redis.call('HSET', KEYS[1], 'state', '"lost"', 'ended', string.format('%.3f', now / 1000))
redis.call('PEXPIRE', KEYS[1], ARGV[4])
for i = 3, #KEYS, 2 do
  note_end(KEYS[i], KEYS[i + 1], ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[i == 3 and 5 or 6]))
end
return 1
""")

MARK: Final = _script("""
-- KEYS op  ARGV field, value, ...
if redis.call('EXISTS', KEYS[1]) == 0 then return {} end
if not is_set(redis.call('HGET', KEYS[1], 'ended')) then
  for i = 1, #ARGV, 2 do
    if not is_set(redis.call('HGET', KEYS[1], ARGV[i])) then redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
  end
end
return redis.call('HGETALL', KEYS[1])
""")

LOAD: Final = _script("""
-- KEYS ops, then their results if these are asked for  ARGV how many
local count, found = tonumber(ARGV[1]), {}
for i = 1, count do
  local fields = redis.call('HGETALL', KEYS[i])
  local result = KEYS[count + i] and redis.call('GET', KEYS[count + i])
  if result then
    fields[#fields + 1] = 'result'
    fields[#fields + 1] = result
  end
  found[i] = fields
end
return found
""")

HISTORY: Final = _script("""
-- KEYS index, expiry  ARGV before, how many to skip, how many
trim(KEYS[1], KEYS[2], math.huge)
return redis.call('ZREVRANGEBYSCORE', KEYS[1], '(' .. ARGV[1], '-inf', 'LIMIT', ARGV[2], ARGV[3])
""")

ENTER: Final = _script("""
-- KEYS key, waiting, generations, held of mine, workers, since, tombstone
-- ARGV id, me, member of held, limit, queue, latest, waits, again, lease
local key, waiting = KEYS[1], KEYS[2]
local id, me, limit, queue = ARGV[1], ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[5])
local latest, waits, again, lease = ARGV[6] == '1', ARGV[7] == '1', ARGV[8] == '1', ARGV[9]
if not may_hold(KEYS[5], KEYS[7], me, lease) then return {'given up', '0', {}} end
local last = tonumber(redis.call('GET', KEYS[3]) or '0')
-- Never back, also after a loss of all data.
local generation = math.max(last + 1, time[1] * 1000000 + time[2])
redis.call('SET', KEYS[3], whole(generation), 'PX', KEPT)

local holders, place = {}, me .. ' ' .. id
local values = redis.call('HGETALL', key)
for i = 1, #values, 2 do
  if values[i] ~= '' then
    local worker = worker_of(values[i + 1])
    if worker ~= me and is_dead(KEYS[5], KEYS[6], worker, me, lease) then
      redis.call('HDEL', key, values[i])
    else
      holders[#holders + 1] = {generation_of(values[i + 1]), worker, values[i]}
    end
  end
end
for _, waiter in ipairs(redis.call('ZRANGE', waiting, 0, -1)) do
  local worker = string.match(waiter, '^%S+')
  if worker ~= me and is_dead(KEYS[5], KEYS[6], worker, me, lease) then redis.call('ZREM', waiting, waiter) end
end

local function answer(status, earlier)
  if status ~= 'refused' then
    redis.call('HSET', key, '', ARGV[4])
    redis.call('SADD', KEYS[4], ARGV[3])
    redis.call('PEXPIRE', KEYS[4], KEPT)
  end
  redis.call('PEXPIRE', key, KEY_KEPT)
  redis.call('PEXPIRE', waiting, KEY_KEPT)
  return {status, whole(generation), earlier or {}}
end
local function hold() redis.call('HSET', key, id, whole(generation) .. ' ' .. me) end
local function wait() redis.call('ZADD', waiting, whole(generation), place) end

-- A call that is repeated because its answer was lost, or to see whether the turn has come.
if redis.call('HEXISTS', key, id) == 1 then return answer('admitted') end
if redis.call('ZSCORE', waiting, place) then
  -- Those before it may have been dropped just now.
  if #holders < limit and redis.call('ZRANK', waiting, place) == 0 then
    redis.call('ZREM', waiting, place)
    hold()
    return answer('admitted')
  end
  return answer('waiting')
end
if again then
  hold()
  return answer('admitted')
end
if latest then
  table.sort(holders, function(a, b) return a[1] < b[1] end)
  local earlier = {}
  for _, holder in ipairs(holders) do
    earlier[#earlier + 1] = holder[2]
    earlier[#earlier + 1] = holder[3]
  end
  for _, waiter in ipairs(redis.call('ZRANGE', waiting, 0, -1)) do
    local worker, other = string.match(waiter, '^(%S+) (.*)$')
    earlier[#earlier + 1] = worker
    earlier[#earlier + 1] = other
  end
  redis.call('DEL', waiting)
  if waits and #holders > 0 then
    wait()
    return answer('waiting', earlier)
  end
  hold()
  return answer('admitted', earlier)
end
local count = redis.call('ZCARD', waiting)
if #holders < limit and count == 0 then
  hold()
  return answer('admitted')
end
if count < queue then
  wait()
  return answer('waiting')
end
return answer('refused')
""")

LEAVE: Final = _script("""
-- KEYS key, waiting, held of its worker, workers, since  ARGV id, its worker, member of held, me, lease
redis.call('SREM', KEYS[3], ARGV[3])
local value = redis.call('HGET', KEYS[1], ARGV[1])
if value and worker_of(value) == ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
redis.call('ZREM', KEYS[2], ARGV[2] .. ' ' .. ARGV[1])
return grant(KEYS[1], KEYS[2], KEYS[4], KEYS[5], ARGV[4], ARGV[5])
""")

RENEW: Final = _script("""
-- KEYS keys and those that wait for them
for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, KEY_KEPT) end
return #KEYS
""")
