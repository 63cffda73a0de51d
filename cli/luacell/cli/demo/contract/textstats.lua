-- host.textstats@1: statistics of Python source, and three ways to die.
--
--   0  count            args: u32 length, then that many bytes of source; out: Result, below
--   1  dereference null  segmentation fault
--   2  os.exit(0)        the process ends, and looks as if all were well
--   3  loop for ever     no answer, ever
--
-- args and out are `uint8_t *`, NULL when the caller gave none.

local ffi = require("ffi")
local tokens = require("tokens")

local NEWLINE, SPACE, TAB, CARRIAGE_RETURN = 10, 32, 9, 13

-- An anonymous struct: unlike a name given to ffi.cdef it can be defined again when the file is loaded again.
local Bytes = ffi.typeof("const uint8_t *")
local Length = ffi.typeof("const uint32_t *")
local Result = ffi.typeof([[
  struct {
    uint64_t lines;           // the last one may lack its newline
    uint64_t blank_lines;     // nothing but white space
    uint64_t words;           // runs of bytes other than white space
    uint64_t identifiers;
    uint64_t distinct_identifiers;
    uint64_t longest_line;    // bytes, the newline not counted
    uint64_t top_count;
    char top_name[64];        // the most frequent identifier; NUL-terminated, cut at 63 bytes
  } *
]])
local NAME_MAX = 63

local function count_lines_and_words(text, size)
  local lines, blank_lines, words, longest_line = 0, 0, 0, 0
  local line_start, words_before_line, in_word = 0, 0, false

  for i = 0, size - 1 do
    local byte = text[i]
    if byte == NEWLINE then
      lines = lines + 1
      if words == words_before_line then blank_lines = blank_lines + 1 end
      longest_line = math.max(longest_line, i - line_start)
      line_start, words_before_line, in_word = i + 1, words, false
    elseif byte == SPACE or (byte >= TAB and byte <= CARRIAGE_RETURN) then
      in_word = false
    elseif not in_word then
      in_word = true
      words = words + 1
    end
  end

  if line_start < size then
    lines = lines + 1
    if words == words_before_line then blank_lines = blank_lines + 1 end
    longest_line = math.max(longest_line, size - line_start)
  end
  return lines, blank_lines, words, longest_line
end

local function count(args, out)
  if args == nil or out == nil then
    luacell.fail(8, "count needs a text in args and room for its result in out; one of them is NULL")
  end
  local size = ffi.cast(Length, args)[0]
  local text = ffi.cast(Bytes, args) + ffi.sizeof("uint32_t")

  local lines, blank_lines, words, longest_line = count_lines_and_words(text, size)
  local identifiers, distinct, top_name, top_count = tokens.count(text, size)

  local result = ffi.cast(Result, out)
  result.lines, result.blank_lines, result.words = lines, blank_lines, words
  result.longest_line = longest_line
  result.identifiers, result.distinct_identifiers = identifiers, distinct
  result.top_count = top_count
  -- What a contract leaves unwritten in out reads as zero: the name is terminated.
  ffi.copy(result.top_name, top_name, math.min(#top_name, NAME_MAX))
end

local function dereference_null() ffi.cast("uint8_t *", 0)[0] = 1 end
local function exit() os.exit(0) end
local function loop() while true do end end

local functions = { [0] = count, dereference_null, exit, loop }

return function(fn_id, args, out)
  local called = functions[fn_id]
  if not called then luacell.fail(6, "host.textstats has functions 0 to 3, not " .. tostring(fn_id)) end
  called(args, out)
end
