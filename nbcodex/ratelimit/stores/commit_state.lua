-- Commits a state if the stored version is still the known one. Otherwise, or if another store has
-- a claim, or without a new version, it returns the stored state. The reply is a list: 1 if
-- committed, Redis's time in seconds and microseconds, and if not committed the version, the state,
-- and 1 if another store has a claim. ARGV: the known version, the new version, the new state, the
-- expiry in ms, this store, and the duration of its claim or ''.
local max_state_bytes = 1000000  -- a larger one is dropped; that of a thousand machines is smaller
local now = redis.call('TIME')
local instant = now[1] + now[2] / 1000000
local key = KEYS[1]
local stored = redis.pcall('HMGET', key, 'version', 'state', 'claimed_by', 'claimed_until')
if stored.err or redis.call('HSTRLEN', key, 'state') > max_state_bytes then
  redis.call('DEL', key)
  stored = {}
end
local claim_end = tonumber(stored[4] or 0) or 0  -- one in the far future is damaged
local claimed = stored[3] ~= ARGV[5] and claim_end > instant and claim_end < instant + 1
if ARGV[2] == '' or claimed or (stored[1] or '') ~= ARGV[1] then
  if ARGV[6] ~= '' and not claimed then
    redis.call('HSET', key, 'claimed_by', ARGV[5], 'claimed_until', instant + ARGV[6])
    redis.call('PEXPIRE', key, ARGV[4])
  end
  return {0, now[1], now[2], stored[1] or '', stored[2] or '', claimed and 1 or 0}
end
redis.call('HSET', key, 'version', ARGV[2], 'state', ARGV[3], 'claimed_until', 0)
redis.call('PEXPIRE', key, ARGV[4])
return {1, now[1], now[2]}
