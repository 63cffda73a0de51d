-- What generated bindings of typed contracts stand on: values to and from memory, checks, and the instances.
--
-- A binding (see binding.py) knows the contract's types; this file knows how a value of each kind is read and written.
-- Whatever lies behind a fixed struct (strings, buffers, items of arrays) is named in it by offset from the start of the
-- payload; offsets and lengths that hosts send are checked before they are used.
--
-- Results go into `out` where they fit. One that does not is kept as it is, and its caller is told its size: it fetches
-- the result with a larger buffer, and the function is not run again.

local runtime = ...

local ffi = require("ffi")
local bit = require("bit")

local cast, copy, fill, istype, new, string_of = ffi.cast, ffi.copy, ffi.fill, ffi.istype, ffi.new, ffi.string
local type, tostring, tonumber, error, pcall, pairs, setmetatable = type, tostring, tonumber, error, pcall, pairs, setmetatable
local floor, format, remove_at = math.floor, string.format, table.remove
local band = bit.band
local fail, described = runtime.api.fail, runtime.described

local int64, uint64 = ffi.typeof("int64_t"), ffi.typeof("uint64_t")
local EXACT = 2 ^ 53 -- integers up to here are exact as numbers
local BUFFER_TOO_SMALL, STALE_HANDLE, FUNCTION_NOT_AVAILABLE = 2, 5, 6
local KEPT_MAX = 16 -- results that wait to be fetched
local KEPT_BYTES_MAX = 64 * 1024 * 1024 -- and their bytes
local INSTANCES_MAX = 100000
local IN_INSTANCE = 0x80000000 -- of a function id: the payload begins with the number of an instance
local HEAD_SIZE = 16 -- bytes of that beginning
local FETCH, CREATE, DESTROY = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD

local typed = { IN_INSTANCE = IN_INSTANCE, HEAD_SIZE = HEAD_SIZE }

-- -- from memory -------------------------------------------------------------------------------------------------
-- A 64-bit integer as a number where that is exact, else as it is.
function typed.number64(value)
  if value <= EXACT and value >= -EXACT then return tonumber(value) end
  return value
end

function typed.number64u(value)
  if value <= EXACT then return tonumber(value) end
  return value
end

-- A range of the payload that a host has named.
local function span(payload, size, offset, length, item_size, what)
  local at, count = tonumber(offset), tonumber(length)
  if at > size or count * item_size > size - at then
    error(format("%s: %.0f items of %d bytes at offset %.0f lie outside the %d bytes of arguments", what, count,
      item_size, at, size), 0)
  end
  return payload + at, count
end
typed.span = span

function typed.text(payload, size, offset, length, what)
  if length == 0 then return "" end
  local at, count = span(payload, size, offset, length, 1, what)
  return string_of(at, count)
end

-- -- into memory -------------------------------------------------------------------------------------------------
local function refuse(what, wanted, value)
  error(format("%s: expected %s, got %s", what, wanted, described(value)), 0)
end
typed.refuse = refuse

-- An integer that a field holds; exact beyond 2^53 only as cdata.
function typed.integer(value, low, high, what, name)
  if type(value) == "number" then
    if value ~= floor(value) or value < low or value > high then refuse(what, name, value) end
    return value
  end
  if istype(int64, value) then
    if value < low or (value > 0 and value > cast(int64, high)) then refuse(what, name, value) end
    return value
  end
  if istype(uint64, value) then
    if value > cast(uint64, high) then refuse(what, name, value) end
    return value
  end
  refuse(what, name, value)
end

function typed.signed64(value, what)
  if istype(int64, value) then return value end
  if istype(uint64, value) then
    if value > 0x7FFFFFFFFFFFFFFFULL then refuse(what, "i64", value) end
    return cast(int64, value)
  end
  if type(value) ~= "number" or value ~= floor(value) or value < -2 ^ 63 or value >= 2 ^ 63 then
    refuse(what, "i64", value)
  end
  return cast(int64, value)
end

function typed.unsigned64(value, what)
  if istype(uint64, value) then return value end
  if istype(int64, value) then
    if value < 0 then refuse(what, "u64", value) end
    return cast(uint64, value)
  end
  if type(value) ~= "number" or value ~= floor(value) or value < 0 or value >= 2 ^ 64 then
    refuse(what, "u64", value)
  end
  return cast(uint64, value)
end

function typed.float(value, what, name)
  if type(value) == "number" then return value end
  if istype(int64, value) or istype(uint64, value) then return tonumber(value) end
  refuse(what, name, value)
end

function typed.boolean(value, what)
  if type(value) ~= "boolean" then refuse(what, "bool", value) end
  return value and 1 or 0
end

function typed.bytes(value, what, name)
  if type(value) ~= "string" then refuse(what, name, value) end
  return value
end

function typed.record(value, what, name)
  if type(value) ~= "table" then refuse(what, name, value) end
  return value
end

function typed.list(value, what, name, items_max)
  if type(value) ~= "table" then refuse(what, name, value) end
  if #value > items_max then refuse(what, format("%s of at most %d items", name, items_max), format("%d items", #value)) end
  return value
end

local function aligned(size) return size + band(-size, 7) end

-- Collects what lies behind a fixed struct. `bytes` and `room` return an offset; `finish` writes all of it.
local Tail = {}
Tail.__index = Tail

function typed.tail(fixed_size)
  return setmetatable({ size = aligned(fixed_size), count = 0 }, Tail)
end

function Tail:bytes(value)
  local offset = self.size
  self.count = self.count + 1
  self[self.count] = { offset, value, #value }
  self.size = aligned(offset + #value)
  return offset
end

function Tail:room(memory, size)
  local offset = self.size
  self.count = self.count + 1
  self[self.count] = { offset, memory, size }
  self.size = aligned(offset + size)
  return offset
end

function Tail:finish(target, fixed, fixed_size)
  copy(target, fixed, fixed_size)
  if self.count > 0 then fill(target + fixed_size, aligned(fixed_size) - fixed_size) end
  for index = 1, self.count do
    local part = self[index]
    copy(target + part[1], part[2], part[3])
  end
end

-- -- results that did not fit ------------------------------------------------------------------------------------
local kept, kept_order, kept_bytes, last_token = {}, {}, 0, 0

local function forget_oldest()
  local token = remove_at(kept_order, 1)
  local result = kept[token]
  if result then
    kept[token] = nil
    kept_bytes = kept_bytes - result.size
  end
end

-- Give a result to its caller, or keep it and tell where it is. Returns the bytes that were written.
function typed.deliver(arena, out, out_size, tail, fixed, fixed_size)
  local size = tail.count > 0 and tail.size or fixed_size
  if size <= out_size then
    tail:finish(out, fixed, fixed_size)
    return size
  end
  local memory = new("uint8_t[?]", size)
  tail:finish(memory, fixed, fixed_size)
  last_token = last_token + 1
  kept[last_token] = { arena = arena, memory = memory, size = size }
  kept_order[#kept_order + 1] = last_token
  kept_bytes = kept_bytes + size
  while #kept_order > 1 and (#kept_order > KEPT_MAX or kept_bytes > KEPT_BYTES_MAX) do forget_oldest() end
  fail(BUFFER_TOO_SMALL, format("result of %d bytes is kept as %d", size, last_token))
end

local function fetch(arena, payload, args_size, out, out_size)
  if args_size < 8 then error("a fetch names its result by 8 bytes", 0) end
  local token = tonumber(cast("uint64_t *", payload)[0])
  local result = kept[token]
  if not result or result.arena ~= arena then fail(STALE_HANDLE, "the result is no longer kept") end
  if result.size > out_size then fail(BUFFER_TOO_SMALL, format("result of %d bytes is kept as %d", result.size, token)) end
  copy(out, result.memory, result.size)
  kept[token] = nil
  kept_bytes = kept_bytes - result.size
  for index = 1, #kept_order do
    if kept_order[index] == token then
      remove_at(kept_order, index)
      break
    end
  end
  return result.size
end

-- -- instances ---------------------------------------------------------------------------------------------------
-- By arena, which is a host's, and by the number that the host has chosen. 0 is the host's default one.
local instances, instance_count = {}, 0
local implementation, singleton

local function make()
  if type(implementation.new) ~= "function" then return implementation end
  local instance = implementation.new()
  if type(instance) ~= "table" then refuse("new()", "a table", instance) end
  return instance
end

local function destroy(instance)
  local method = instance ~= implementation and instance.destroy
  if type(method) == "function" then pcall(method, instance) end
end

local function create(arena, number)
  local mine = instances[arena]
  if not mine then
    mine = {}
    instances[arena] = mine
  end
  if mine[number] then return mine[number] end
  if instance_count >= INSTANCES_MAX then error(format("there are %d instances, which is the limit", INSTANCES_MAX), 0) end
  local instance = make()
  mine[number] = instance
  instance_count = instance_count + 1
  return instance
end

local function remove(arena, number)
  local mine = instances[arena]
  local instance = mine and mine[number]
  if not instance then return end
  mine[number] = nil
  instance_count = instance_count - 1
  destroy(instance)
end

-- A host is gone: so are its instances.
function typed.forget(arena)
  local mine = instances[arena]
  if not mine then return end
  instances[arena] = nil
  for _, instance in pairs(mine) do
    instance_count = instance_count - 1
    destroy(instance)
  end
end

local function instance_of(arena, number)
  if singleton then return singleton end
  local mine = instances[arena]
  local instance = mine and mine[number]
  if instance then return instance end
  if number == "0" then return create(arena, number) end
  fail(STALE_HANDLE, "the instance is gone: its worker was replaced; a new proxy gets a new one")
end

-- -- dispatch ----------------------------------------------------------------------------------------------------
-- Returns the function that a worker calls. `functions` are the binding's, by id: each takes the instance, arena,
-- payload, its size, out and its size, and returns the bytes it wrote.
function typed.bind(table_of_methods, is_singleton, functions, names, title)
  implementation = table_of_methods
  for id = 0, #names do
    if type(implementation[names[id]]) ~= "function" then
      return nil, format("%s: the implementation has no function %s", title, names[id])
    end
  end
  if is_singleton then singleton = make() end
  return function(fn_id, payload, out, args_size, out_size, arena)
    local number = "0"
    if fn_id >= IN_INSTANCE then
      if fn_id == FETCH then return fetch(arena, payload, args_size, out, out_size) end
      if args_size < HEAD_SIZE then error("the number of an instance is missing", 0) end
      number = tostring(cast("uint64_t *", payload)[0])
      if fn_id == CREATE then
        create(arena, number)
        return 0
      end
      if fn_id == DESTROY then
        remove(arena, number)
        return 0
      end
      fn_id, payload, args_size = fn_id - IN_INSTANCE, payload + HEAD_SIZE, args_size - HEAD_SIZE
    end
    local method = functions[fn_id]
    if not method then
      fail(FUNCTION_NOT_AVAILABLE, format("%s has %d functions; there is no function %d", title, #names + 1, fn_id))
    end
    return method(instance_of(arena, number), arena, payload, args_size, out, out_size)
  end
end

return typed
