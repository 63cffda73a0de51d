-- The implementation of host.example, as api.toml declares it.
local Service = {}
Service.__index = Service

-- Each caller has an instance of its own.
function Service.new()
  return setmetatable({ notes = {} }, Service)
end

function Service:add(level, text)
  local number = #self.notes + 1
  self.notes[number] = { number = number, level = level, text = text }
  return number
end

function Service:all()
  return self.notes
end

return Service
