local Transformer = {}

function Transformer:transform(row)
  local station, day, value, unit = unpack(row.cells)
  local celsius = tonumber(value)
  if unit == "F" then celsius = (celsius - 32) / 1.8 end
  return { station = station, day = day, celsius = celsius }
end

return Transformer
