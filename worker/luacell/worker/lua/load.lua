-- Loading a contract: its own modules for `require`, the chunk in its two forms, and the check that it is a function.
--
-- Called once per worker with the table that execute.lua returned. Chunks are loaded in text mode only: malformed
-- bytecode crashes LuaJIT.

local runtime = ...

local load, type, xpcall, error, table_insert = load, type, xpcall, error, table.insert
local described, cut = runtime.described, runtime.cut
local traceback, gsub, sub = debug.traceback, string.gsub, string.sub
local package, loadlib, ipairs = package, package.loadlib, ipairs

local REASON_MAX = 3072 -- bytes
local NO_MEMORY = "not enough memory" -- LuaJIT's own words

-- The system's modules, pure Lua and C; never the current directory.
package.path = "/usr/local/share/lua/5.1/?.lua;/usr/local/share/lua/5.1/?/init.lua;" ..
  "/usr/share/lua/5.1/?.lua;/usr/share/lua/5.1/?/init.lua"
package.cpath = "/usr/local/lib/lua/5.1/?.so;/usr/lib/x86_64-linux-gnu/lua/5.1/?.so;" ..
  "/usr/lib/aarch64-linux-gnu/lua/5.1/?.so;/usr/lib/lua/5.1/?.so"

python = nil
package.loaded.python = nil
luacell = runtime.api
package.loaded.luacell = luacell

-- How `require` finds the directory's own modules.
local function finder(sources)
  return function(name)
    local source = sources[name] or sources[name .. ".init"]
    if source == nil then return "\n\tno module '" .. name .. "' in the contract's directory" end
    local chunk, problem = load(source, "@" .. gsub(name, "%.", "/") .. ".lua", "t")
    if not chunk then error(problem, 0) end
    return chunk
  end
end

-- How it finds the operator's C modules where no file can be opened: the worker host has loaded them, and the very
-- same path leads to them.
local function c_finder(paths)
  return function(name)
    local wanted = "/" .. gsub(name, "%.", "/") .. ".so"
    for _, path in ipairs(paths) do
      if sub(path, -#wanted) == wanted then
        local opener, problem = loadlib(path, "luaopen_" .. gsub(name, "%.", "_"))
        if not opener then error(problem, 0) end
        return opener
      end
    end
    return "\n\tno C module '" .. name .. "' among those of the worker host (--c-module)"
  end
end

-- Let `require` find the directory's own modules before any of the system's; or, given the paths of C modules, nothing
-- of the system's but these.
local function offer_modules(sources, c_paths)
  if c_paths then
    package.path, package.cpath = "", ""
    for index = #package.loaders, 2, -1 do package.loaders[index] = nil end
    package.loaders[2] = c_finder(c_paths)
  end
  table_insert(package.loaders, 2, finder(sources))
end

-- `function … end` is an expression, `return function … end` a statement: the first form is tried first. When neither
-- parses, the second form's message is the one that fits a whole file. Parentheses keep an expression that is a call
-- from being a tail call, which would cost its errors their line; the text must be an expression without them as well.
-- What editors and shells put before a file's first line is no part of it, as for Lua's own loadfile.
local function compiled(source, chunk_name)
  source = gsub(source, "^\239\187\191", "")
  source = gsub(source, "^#[^\n]*", "")
  local plain = load("return " .. source, chunk_name, "t")
  if plain then return load("return (" .. source .. "\n)", chunk_name, "t") or plain end
  return load(source, chunk_name, "t")
end

local function handler(value)
  return cut(cut(described(value), REASON_MAX - 1024) .. traceback("", 2), REASON_MAX)
end
runtime.state_handler = handler

-- Problem and reason of an error that `handler` has seen; LuaJIT does not show it the one that there is no memory.
local function failed(value)
  if value == NO_MEMORY then return "memory", value end
  return "load", type(value) == "string" and value or "error in error handling"
end

-- The implementation of a typed contract is a table of functions, which a binding puts between it and memory; or one raw
-- function, for which `raw_binding` returns another binding.
local function bind(typed, binder, raw_binding, implementation)
  if type(implementation) == "function" and raw_binding then
    local chunk, problem = load(raw_binding(), "=binding", "t")
    if not chunk then return "load", problem end
    binder = chunk(typed)
  elseif type(implementation) ~= "table" then
    return "type", "table " .. type(implementation)
  end
  local fine, bound, reason = xpcall(function() return binder(implementation) end, handler)
  if not fine then return failed(bound) end
  if not bound then return "load", reason end
  runtime.set_typed_target(bound, typed.forget)
  return "", ""
end

-- Returns problem ("", "type", "load" or "memory") and reason, which for "type" is the type that the chunk gave, behind
-- "table" where that is wanted. `typed` and `binding` are given for typed contracts; the enums of their description
-- are `luacell.enums`; `raw_binding` where the implementation may be a raw function. `c_paths` are given for contracts
-- that can open no file, and `strip`, which
-- takes from Lua what leads out of it, for untrusted ones: once everything of ours has what it needs.
local function load_contract(source, chunk_name, sources, typed, binding, raw_binding, c_paths, strip)
  offer_modules(sources, c_paths)
  local binder
  if binding then
    local chunk, problem = load(binding, "=binding", "t")
    if not chunk then return "load", problem end
    runtime.api.enums, binder = chunk(typed)
  end
  if strip then strip(finder(sources)) end
  local chunk, problem = compiled(source, chunk_name)
  if not chunk then return "load", cut(described(problem), REASON_MAX) end
  local fine, value = xpcall(chunk, handler)
  if not fine then return failed(value) end
  if binder then return bind(typed, binder, raw_binding, value) end
  if type(value) ~= "function" then return "type", type(value) end
  runtime.set_target(value)
  return "", ""
end

return load_contract
