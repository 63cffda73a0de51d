local Reporter = {}
Reporter.__index = Reporter

function Reporter.new()
  return setmetatable({ stations = {} }, Reporter)
end

function Reporter:add(reading)
  local celsius = reading.celsius
  local station = self.stations[reading.station]
  if not station then
    station = { count = 0, sum = 0, lowest = celsius, highest = celsius }
    self.stations[reading.station] = station
  end
  station.count, station.sum = station.count + 1, station.sum + celsius
  station.lowest, station.highest = math.min(station.lowest, celsius), math.max(station.highest, celsius)
end

function Reporter:report()
  local summaries = {}
  for name, station in pairs(self.stations) do
    summaries[#summaries + 1] = {
      station = name, count = station.count, lowest = station.lowest, highest = station.highest,
      mean = station.sum / station.count,
    }
  end
  table.sort(summaries, function(one, other) return one.station < other.station end)
  return summaries
end

return Reporter
