local TOO_FEW = 1024 -- the first code that is a contract's own

local Stock = {}
Stock.__index = Stock

function Stock.new()
  return setmetatable({ counts = {} }, Stock)
end

function Stock:add(article, count)
  self.counts[article] = (self.counts[article] or 0) + count
end

function Stock:take(article, count)
  local left = (self.counts[article] or 0) - count
  if left < 0 then luacell.fail(TOO_FEW, article .. ": " .. -left .. " too few") end
  self.counts[article] = left
  return left
end

return Stock
