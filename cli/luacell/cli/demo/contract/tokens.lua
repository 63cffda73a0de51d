-- Counts the identifiers of Python source: names that are neither keywords nor part of a string or a comment.
--
-- A name is a run of letters, digits, `_` and bytes above 127 (UTF-8) that does not start with a digit. A run that
-- touches a quote is the prefix of a string: r"…". Malformed source is no error: a string that never ends reaches
-- to the end of its line, or of the text if it has three quotes.

local ffi = require("ffi")

local NEWLINE, DOUBLE_QUOTE, HASH, SINGLE_QUOTE, BACKSLASH = 10, 34, 35, 39, 92

-- What a byte can begin or go on with. Above OTHER: part of a name or a number.
local QUOTE, COMMENT, OTHER, DIGIT, LETTER = 0, 1, 2, 3, 4
local class = ffi.new("uint8_t[256]")
for byte = 0, 255 do
  local char = string.char(byte)
  class[byte] = char:find("[%a_\128-\255]") and LETTER or char:find("%d") and DIGIT or OTHER
end
class[SINGLE_QUOTE], class[DOUBLE_QUOTE], class[HASH] = QUOTE, QUOTE, COMMENT

local KEYWORDS = {}
for word in ([[
  False None True and as assert async await break class continue def del elif else except finally for from global
  if import in is lambda nonlocal not or pass raise return try while with yield
]]):gmatch("%a+") do KEYWORDS[word] = true end

local function end_of_word(text, size, i)
  repeat i = i + 1 until i >= size or class[text[i]] <= OTHER
  return i
end

local function end_of_line(text, size, i)
  while i < size and text[i] ~= NEWLINE do i = i + 1 end
  return i
end

local function is_triple_quote(text, size, i, quote)
  return i + 2 < size and text[i + 1] == quote and text[i + 2] == quote
end

local function end_of_string(text, size, i)
  local quote = text[i]
  local triple = is_triple_quote(text, size, i, quote)
  i = i + (triple and 3 or 1)
  while i < size do
    local byte = text[i]
    if byte == BACKSLASH then
      i = i + 2 -- whatever it escapes, it ends nothing
    elseif byte == quote and not triple then
      return i + 1
    elseif byte == quote and is_triple_quote(text, size, i, quote) then
      return i + 3
    elseif byte == NEWLINE and not triple then
      return i
    else
      i = i + 1
    end
  end
  return size
end

-- The most frequent name; of several the first in byte order.
local function most_frequent(names, counts)
  local top_name, top_count = "", 0
  for i = 1, #names do
    local name = names[i]
    local count = counts[name]
    if count > top_count or (count == top_count and name < top_name) then
      top_name, top_count = name, count
    end
  end
  return top_name, top_count
end

local tokens = {}

-- Returns how many identifiers there are, how many different ones, the most frequent one and how often it occurs.
function tokens.count(text, size)
  local names, counts = {}, {}
  local identifiers, distinct = 0, 0
  local i = 0
  while i < size do
    local kind = class[text[i]]
    if kind == LETTER then
      local start = i
      i = end_of_word(text, size, i)
      local name = ffi.string(text + start, i - start)
      local is_prefix = i < size and class[text[i]] == QUOTE
      if not is_prefix and not KEYWORDS[name] then
        local count = counts[name]
        if not count then
          count = 0
          distinct = distinct + 1
          names[distinct] = name
        end
        counts[name] = count + 1
        identifiers = identifiers + 1
      end
    elseif kind == DIGIT then
      i = end_of_word(text, size, i)
    elseif kind == QUOTE then
      i = end_of_string(text, size, i)
    elseif kind == COMMENT then
      i = end_of_line(text, size, i)
    else
      i = i + 1
    end
  end
  return identifiers, distinct, most_frequent(names, counts)
end

return tokens
