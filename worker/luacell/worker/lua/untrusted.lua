-- Level `untrusted`: takes from Lua whatever leads out of it, before the contract's first line.
--
-- With FFI a contract is all of its process; without it, it is what its own values allow. So it sees a list of what is
-- harmless, not everything without what is known to be harmful. Among what is gone: ffi; jit and jit.util (constants and
-- machine code of functions, `jit.attach` is handed our own); string.buffer (pointers); debug (upvalues, the registry);
-- io, package, module, newproxy, getfenv, setfenv; bytecode, in and out (string.dump; `load` takes text).
--
-- Called with execute.lua's table; returns a function that is given a finder of the contract's own modules, as
-- load.lua makes it.

local runtime = ...

local globals = _G
local load, type, error, tostring, pairs = load, type, error, tostring, pairs
local format = string.format
local table_new, table_clear = require("table.new"), require("table.clear")

local KEPT = {
  assert = true, collectgarbage = true, error = true, ipairs = true, next = true, pairs = true, pcall = true, print = true,
  rawequal = true, rawget = true, rawlen = true, rawset = true, select = true, tonumber = true, tostring = true, type = true,
  unpack = true, xpcall = true, getmetatable = true, setmetatable = true, _G = true, _VERSION = true,
  bit = true, coroutine = true, math = true, string = true, table = true, luacell = true,
}
local STRING = {
  byte = true, char = true, find = true, format = true, gmatch = true, gsub = true, len = true, lower = true, match = true,
  rep = true, reverse = true, sub = true, upper = true,
}

local function keep(from, kept)
  local names = {}
  for name in pairs(from) do
    if not kept[name] then names[#names + 1] = name end
  end
  for index = 1, #names do from[names[index]] = nil end
end

-- Text only, whatever the mode; an environment may be given.
local function load_text(chunk, name, mode, ...)
  if mode == "b" then return nil, "attempt to load a binary chunk (sandbox level untrusted)" end
  return load(chunk, name, "t", ...)
end

local function loadstring_text(text, name)
  return load(text, name, "t")
end

return function(find)
  local os = globals.os
  local time = { time = os.time, clock = os.clock, date = os.date, difftime = os.difftime }
  keep(globals, KEPT)
  keep(globals.string, STRING)
  globals.load, globals.loadstring, globals.os = load_text, loadstring_text, time
  local loaded = {
    _G = globals, bit = globals.bit, coroutine = globals.coroutine, math = globals.math, os = time,
    string = globals.string, table = globals.table, luacell = runtime.api,
    ["table.new"] = table_new, ["table.clear"] = table_clear,
  }
  local loading = {}
  globals.package = { loaded = loaded }
  function globals.require(name)
    if type(name) ~= "string" then error("require: expected the name of a module, got a " .. type(name), 2) end
    local module = loaded[name]
    if module == loading then error(format("loop in loading module %q", name), 2) end
    if module ~= nil then return module end
    local chunk = find(name)
    if type(chunk) ~= "function" then
      error(format("module %q not found:%s\n\tsandbox level untrusted has no other modules", name, tostring(chunk)), 2)
    end
    loaded[name] = loading
    local result = chunk(name)
    if result ~= nil then
      loaded[name] = result
    elseif loaded[name] == loading then
      loaded[name] = true
    end
    return loaded[name]
  end
end
