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

return Store
