-- `luacell.log`: a record of the service's log, written by a contract.
--
-- It is a line on stderr that the broker knows from others by how it begins, so it takes no round trip and comes in
-- order with what the contract prints; broker/contract_log.py reads it. What is bounded about prints is about this.
--
-- Argument: execute.lua's table.

local runtime = ...

local ffi = require("ffi")
local C, type, error, format, gsub = ffi.C, type, error, string.format, string.gsub
local described, cut, function_id = runtime.described, runtime.cut, runtime.function_id

ffi.cdef [[intptr_t luacell_write(int, const char *, size_t) __asm__("write");]]

local STDERR = 2
local LEVELS = { debug = true, info = true, warning = true, error = true }
local TEXT_MAX = 2000 -- bytes; escaped they are 4000 at most, so that the line is one write of no more than PIPE_BUF, 4096
local ESCAPES = { ["\\"] = "\\\\", ["\n"] = "\\n", ["\30"] = "\\e" }

function runtime.api.log(level, text)
  if type(level) ~= "string" or not LEVELS[level] then
    error(format("luacell.log: level %q is none of debug, info, warning, error", described(level)), 2)
  end
  local fn_id = function_id()
  local escaped = gsub(cut(described(text), TEXT_MAX), "[\\\n\30]", ESCAPES)
  local line = format("\30log %s %s ", level, fn_id and format("%.0f", fn_id) or "-") .. escaped .. "\n"
  C.luacell_write(STDERR, line, #line) -- what a full pipe refuses is lost, as of prints
end
