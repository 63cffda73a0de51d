local LogLevel = luacell.enums.LogLevel
local LINES_MAX = 100

local Logger = {}
Logger.__index = Logger

function Logger.new()
  return setmetatable({ threshold = LogLevel.Info, kept = {} }, Logger)
end

function Logger:log(message)
  self:log_with_level(LogLevel.Info, message)
end

function Logger:log_with_level(level, message)
  if level < self.threshold then return end
  if #self.kept == LINES_MAX then table.remove(self.kept, 1) end
  self.kept[#self.kept + 1] = LogLevel[level] .. ": " .. message
end

function Logger:set_threshold(level)
  self.threshold = level
end

function Logger:lines()
  return self.kept
end

return Logger
