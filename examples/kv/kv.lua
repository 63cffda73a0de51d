local KEYS_MAX = 10000
local TOO_MANY_KEYS = 1024 -- the first code that is a contract's own

local Store = {}
Store.__index = Store

function Store.new()
  return setmetatable({ entries = {}, count = 0, revision = 0 }, Store)
end

function Store:put(key, value)
  if not self.entries[key] then
    if self.count == KEYS_MAX then luacell.fail(TOO_MANY_KEYS, "the store holds " .. KEYS_MAX .. " keys already") end
    self.count = self.count + 1
  end
  self.revision = self.revision + 1
  self.entries[key] = { found = true, revision = self.revision, value = value }
  return self.revision
end

function Store:get(key)
  return self.entries[key] or { found = false, revision = 0, value = "" }
end

function Store:remove(key)
  if not self.entries[key] then return false end
  self.entries[key] = nil
  self.count = self.count - 1
  return true
end

function Store:keys()
  local keys = {}
  for key in pairs(self.entries) do keys[#keys + 1] = key end
  table.sort(keys)
  return keys
end

-- Deployed anew, the store goes on where it was: what the old one saves, the new one restores. An entry is three numbers
-- (bytes of the key, bytes of the value, revision) in a line, the key, and the value.
function Store:save()
  local parts = { string.format("%.0f\n", self.revision) }
  for key, entry in pairs(self.entries) do
    parts[#parts + 1] = string.format("%d %d %.0f\n", #key, #entry.value, entry.revision) .. key .. entry.value
  end
  return table.concat(parts)
end

function Store:restore(text)
  local revision, at = text:match("^(%d+)\n()")
  self.revision = tonumber(revision)
  while at <= #text do
    local key_size, value_size, entry_revision, key_at = text:match("^(%d+) (%d+) (%d+)\n()", at)
    local value_at = key_at + key_size
    at = value_at + value_size
    self.entries[text:sub(key_at, value_at - 1)] =
      { found = true, revision = tonumber(entry_revision), value = text:sub(value_at, at - 1) }
    self.count = self.count + 1
  end
end

return Store
