-- Counts the words of a text. args: u32 length, then the text. out: u32 count.
local ffi = require("ffi")
local is_space = require("spaces")

return function(fn_id, args, out)
  local size, text = ffi.cast("uint32_t *", args)[0], args + 4
  local count, inside = 0, false
  for index = 0, size - 1 do
    local space = is_space(text[index])
    if not space and not inside then count = count + 1 end
    inside = not space
  end
  ffi.cast("uint32_t *", out)[0] = count
end
