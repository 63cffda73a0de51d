-- CSV as RFC 4180 has it: commas, quotes around cells, doubled quotes within them; line ends are \n or \r\n.
local LINE_MAX = 65536 -- bytes
local ROWS_MAX = 10000 -- complete and not yet taken
local LINE_TOO_LONG, TOO_MANY_ROWS = 1024, 1025

local Decoder = {}
Decoder.__index = Decoder

function Decoder.new()
  return setmetatable({ rest = "", line = 0, first = 1, last = 0, rows = {} }, Decoder)
end

-- Where the line ends that begins at `from`: not at a line end within quotes. nil when it is not complete.
local function line_end(text, from)
  local quoted, at = false, from - 1
  while true do
    at = text:find('["\n]', at + 1)
    if not at then return nil end
    if text:sub(at, at) == '"' then
      quoted = not quoted
    elseif not quoted then
      return at
    end
  end
end

local function cells_of(line)
  local cells, at = {}, 1
  repeat
    local cell, after
    if line:sub(at, at) == '"' then
      local parts = {}
      repeat
        local part, quote = line:match('^([^"]*)()', at + 1)
        parts[#parts + 1] = part
        at = quote
        if line:sub(at + 1, at + 1) == '"' then
          parts[#parts + 1] = '"'
          at = at + 1
        else
          break
        end
      until at > #line
      cell, after = table.concat(parts), at + 1
    else
      cell, after = line:match("^([^,]*)()", at)
    end
    cells[#cells + 1] = cell
    at = after + 1
  until line:sub(after, after) ~= ","
  return cells
end

function Decoder:take_line(line)
  if self.last - self.first + 1 == ROWS_MAX then luacell.fail(TOO_MANY_ROWS, "take the rows that are complete first") end
  self.line = self.line + 1
  line = line:gsub("\r$", "")
  if line == "" then return end
  self.last = self.last + 1
  self.rows[self.last] = { line = self.line, cells = cells_of(line) }
end

function Decoder:feed(data)
  local text, from = self.rest .. data, 1
  while true do
    local stop = line_end(text, from)
    if not stop then break end
    self:take_line(text:sub(from, stop - 1))
    from = stop + 1
  end
  self.rest = text:sub(from)
  if #self.rest > LINE_MAX then
    luacell.fail(LINE_TOO_LONG, "line " .. self.line + 1 .. " is longer than " .. LINE_MAX .. " bytes")
  end
  return self.last - self.first + 1
end

function Decoder:finish()
  local rest = self.rest
  self.rest = ""
  if rest ~= "" then self:take_line(rest) end
  return self.last - self.first + 1
end

function Decoder:next()
  local row = self.rows[self.first]
  if not row then error("no row is complete", 0) end
  self.rows[self.first] = nil
  self.first = self.first + 1
  return row
end

return Decoder
