-- The scratch VM behind LuaHostBridge.lua(): evaluates text and writes a tagged value.
-- args: u32 length of the source, u32 size of out, the source. out: one tag byte, u32 length, the value as text.
local ffi = require("ffi")

local function number_text(value)
  local text = tostring(value)
  return (text:gsub("U?LL$", ""))
end

local function encoded(value)
  local kind = type(value)
  if kind == "nil" then return "n", "" end
  if kind == "boolean" then return "b", value and "1" or "0" end
  if kind == "string" then return "s", value end
  if kind == "number" then return "f", string.format("%.17g", value) end
  if kind == "cdata" and (ffi.istype("int64_t", value) or ffi.istype("uint64_t", value)) then
    return "i", number_text(value)
  end
  error("a " .. kind .. " cannot leave the VM: return nil, a boolean, a number or a string", 0)
end

return function(fn_id, args, out)
  local size = ffi.cast("uint32_t *", args)[0]
  local capacity = ffi.cast("uint32_t *", args)[1]
  local source = ffi.string(args + 8, size)
  local chunk, problem = load("return " .. source, "=eval", "t")
  if not chunk then chunk, problem = load(source, "=eval", "t") end
  if not chunk then error(problem, 0) end
  local tag, text = encoded((chunk()))
  if #text + 5 > capacity then
    luacell.fail(2, "the value has " .. #text .. " bytes; the limit is " .. (capacity - 5))
  end
  out[0] = string.byte(tag)
  ffi.cast("uint32_t *", out + 1)[0] = #text
  ffi.copy(out + 5, text, #text)
end
