local Problem = luacell.enums.Problem
local LOWEST, HIGHEST = { C = -90, F = -130 }, { C = 60, F = 140 } -- what was ever measured, and a little more

local Validator = {}

local function verdict(problem, text)
  return { problem = problem, text = text or "" }
end

function Validator:check(row)
  local cells = row.cells
  if #cells ~= 4 then return verdict(Problem.WrongColumns, #cells .. " columns, not 4") end
  local value, unit = tonumber(cells[3]), cells[4]
  if not value then return verdict(Problem.NoNumber, "'" .. cells[3] .. "' is no temperature") end
  if not LOWEST[unit] then return verdict(Problem.NoNumber, "'" .. unit .. "' is no unit") end
  if not (value >= LOWEST[unit] and value <= HIGHEST[unit]) then
    return verdict(Problem.OutOfRange, cells[3] .. " " .. unit .. " was never measured")
  end
  return verdict(Problem.Nothing)
end

return Validator
