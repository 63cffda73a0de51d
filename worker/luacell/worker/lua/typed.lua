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
local xpcall = xpcall
local floor, huge, format, remove_at = math.floor, math.huge, string.format, table.remove
local band = bit.band
local fail = runtime.api.fail
local new_table = require("table.new")

local int64, uint64, words_pointer = ffi.typeof("int64_t"), ffi.typeof("uint64_t"), ffi.typeof("uint64_t *")
local byte_pointer, address_of = ffi.typeof("uint8_t *"), ffi.typeof("uintptr_t")
local EXACT = 2 ^ 53 -- integers up to here are exact as numbers
local F32_END = 2 ^ 128 - 2 ^ 103 -- from here on numbers are rounded to infinity, as floats of 32 bits
local BUFFER_TOO_SMALL, STALE_HANDLE, FUNCTION_NOT_AVAILABLE = 2, 5, 6
local PAYLOAD_MAX = 64 * 1024 * 1024 -- bytes of a result, as of arguments
local KEPT_MAX = 1024 -- results of one host that wait to be fetched: as many calls as it may have in flight
local KEPT_SHARE = 0.5 -- of the contract's memory, for all that wait
local INSTANCES_MAX = 100000
local IN_INSTANCE = 0x80000000 -- of a function id: the payload begins with the number of an instance
local FUNCTION_MASK = 0xFFFF -- of such an id: the function; bits between the two are the broker's
local HEAD_SIZE = 16 -- bytes of that beginning
local FETCH, CREATE, DESTROY = 0xFFFF, 0xFFFE, 0xFFFD

local SHOWN_MAX = 40 -- bytes of a string in an error text

local typed = { new_table = new_table, ffi = ffi }

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

-- A range of the payload that a host has named. As numbers, 64-bit words lose their last bits but cannot overflow.
local function span(payload, size, offset, length, item_size, what)
  local at, count = tonumber(offset), tonumber(length)
  if at > size or count * item_size > size - at then
    error(format("%s: %.0f items of %d bytes at offset %.0f lie outside the %d bytes of arguments", what, count,
      item_size, at, size), 0)
  end
  return payload + at, count
end

-- The bytes that the two words at `place` name.
function typed.text(payload, size, place, what)
  local words = cast(words_pointer, place)
  if words[1] == 0 then return "" end
  return string_of(span(payload, size, words[0], words[1], 1, what))
end

-- Where the items lie that the two words at `place` name, and how many there are.
function typed.items(payload, size, place, item_size, what, items_max)
  local words = cast(words_pointer, place)
  if words[1] == 0 then return payload, 0 end
  local items, count = span(payload, size, words[0], words[1], item_size, what)
  if count > items_max then error(format("%s: %.0f items; the limit is %d", what, count, items_max), 0) end
  return items, count
end

-- -- into memory -------------------------------------------------------------------------------------------------
-- A value for an error text: what kind it is, and itself where that is short.
local function shown(value)
  local kind = type(value)
  if kind == "number" then return "number " .. format("%.17g", value) end
  if kind == "boolean" then return "boolean " .. tostring(value) end
  if kind == "string" and #value <= SHOWN_MAX then return format("string %q", value) end
  if kind == "string" then return format("string of %d bytes", #value) end
  if kind == "nil" then return "nil" end
  if kind == "cdata" and (istype(int64, value) or istype(uint64, value)) then return "cdata " .. tostring(value) end
  return "a " .. kind
end

local function refuse(what, wanted, value)
  error(format("%s: expected %s, got %s", what, wanted, shown(value)), 0)
end

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

function typed.signed64(value, what, name)
  if istype(int64, value) then return value end
  if istype(uint64, value) then
    if value > 0x7FFFFFFFFFFFFFFFULL then refuse(what, name, value) end
    return cast(int64, value)
  end
  if type(value) ~= "number" or value ~= floor(value) or value < -2 ^ 63 or value >= 2 ^ 63 then
    refuse(what, name, value)
  end
  return cast(int64, value)
end

function typed.unsigned64(value, what, name)
  if istype(uint64, value) then return value end
  if istype(int64, value) then
    if value < 0 then refuse(what, name, value) end
    return cast(uint64, value)
  end
  if type(value) ~= "number" or value ~= floor(value) or value < 0 or value >= 2 ^ 64 then
    refuse(what, name, value)
  end
  return cast(uint64, value)
end

function typed.float(value, what, name)
  if type(value) == "number" then return value end
  if istype(int64, value) or istype(uint64, value) then return tonumber(value) end
  refuse(what, name, value)
end

-- The same for a field of 32 bits, where what is finite must not become infinite.
function typed.float32(value, what, name)
  local number = typed.float(value, what, name)
  if (number >= F32_END or number <= -F32_END) and number ~= huge and number ~= -huge then refuse(what, name, value) end
  return number
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

-- Returns the list and how many items it has.
function typed.list(value, what, name, items_max)
  if type(value) ~= "table" then refuse(what, name, value) end
  local count = #value
  if count > items_max then error(format("%s: %d items; the limit of %s is %d", what, count, name, items_max), 0) end
  return value, count
end

local function aligned(size) return size + band(-size, 7) end

-- Collects what lies behind a fixed struct: strings, and memory with the items of arrays. `add` returns an offset;
-- `finish` writes all of it, with zeros between the parts: the slot holds what earlier calls left there.
local Tail = {}
Tail.__index = Tail

function typed.tail(fixed_size)
  return setmetatable({ size = aligned(fixed_size), count = 0 }, Tail)
end

function Tail:add(part, size)
  local offset = self.size
  local count = self.count + 1
  self.count, self.size = count, aligned(offset + size)
  self[count] = { offset, part, size }
  return offset
end

local function put(target, offset, part, size)
  copy(target + offset, part, size)
  fill(target + offset + size, aligned(size) - size)
end

function Tail:finish(target, fixed, fixed_size)
  if self.count == 0 then
    copy(target, fixed, fixed_size)
    return
  end
  put(target, 0, fixed, fixed_size)
  for index = 1, self.count do
    local part = self[index]
    put(target, part[1], part[2], part[3])
  end
end

-- The bytes of arguments that a contract calls another with.
function typed.packed(tail, fixed, fixed_size)
  local size = tail.count > 0 and tail.size or fixed_size
  local memory = new("uint8_t[?]", size)
  tail:finish(memory, fixed, fixed_size)
  return string_of(memory, size)
end

-- -- raw implementations -----------------------------------------------------------------------------------------
-- A function that was written for memory: offsets become pointers before it is called, and pointers offsets behind it.
local alive -- memory of ours that the running call's pointers lead to

function typed.begin_raw() alive = {} end

-- Zeroed memory, aligned to 8, that lives until the next call; or a copy of what lies at `source`.
function typed.memory(size, source)
  local memory = new("uint64_t[?]", aligned(size) / 8)
  alive[#alive + 1] = memory
  local bytes = cast(byte_pointer, memory)
  if source then copy(bytes, source, size) end
  return bytes
end

local function point(words, target) words[0] = cast(address_of, target) end

-- Let the two words at `place`, a range of the payload, point to it.
function typed.rebase(payload, size, place, item_size, what, items_max)
  point(cast(words_pointer, place), (typed.items(payload, size, place, item_size, what, items_max)))
end

-- The same, of items that hold such words themselves: to a copy of them, which is returned with their count.
function typed.rebase_items(payload, size, place, item_size, what, items_max)
  local items, count = typed.items(payload, size, place, item_size, what, items_max)
  local own = typed.memory(count * item_size, items)
  point(cast(words_pointer, place), own)
  return own, count
end

-- Copy what the two words at `place` point to behind the result, and let them name it there. Returns the copy and the
-- count of its items.
function typed.gather(tail, place, item_size, what, items_max)
  local words = cast(words_pointer, place)
  local count = tonumber(words[1])
  if count > items_max then error(format("%s: %.0f items; the limit is %d", what, count, items_max), 0) end
  local size = count * item_size
  if size > PAYLOAD_MAX - tail.size then
    error(format("%s: the result has more than %d bytes, which is the limit", what, PAYLOAD_MAX), 0)
  end
  if size > 0 and words[0] == 0 then error(format("%s: a null pointer to %d items", what, count), 0) end
  local memory = new("uint8_t[?]", size)
  copy(memory, cast(byte_pointer, words[0]), size)
  words[0] = tail:add(memory, size)
  return memory, count
end

-- A buffer's capacity is its size on the way.
function typed.close(place)
  local words = cast(words_pointer, place)
  words[2] = words[1]
end

-- -- results that did not fit ------------------------------------------------------------------------------------
local kept, kept_order, kept_counts, kept_bytes, last_token = {}, {}, {}, 0, 0
local kept_bytes_max = 0

function typed.limit_memory(size) kept_bytes_max = KEPT_SHARE * size end

local function forget_at(index)
  local token = remove_at(kept_order, index)
  local result = kept[token]
  kept[token] = nil
  kept_bytes = kept_bytes - result.size
  kept_counts[result.arena] = kept_counts[result.arena] - 1
end

-- Forget the oldest of a host, but not its newest; where it has no other, the oldest of all.
local function forget_one(arena)
  for index = 1, #kept_order - 1 do
    if kept[kept_order[index]].arena == arena then return forget_at(index) end
  end
  forget_at(1)
end

-- Give a result to its caller, or keep it and tell where it is. Returns the bytes that were written.
function typed.deliver(arena, out, out_size, tail, fixed, fixed_size, what)
  local size = tail.count > 0 and tail.size or fixed_size
  if size <= out_size then
    tail:finish(out, fixed, fixed_size)
    return size
  end
  if size > PAYLOAD_MAX then error(format("%s: a result of %d bytes; the limit is %d", what, size, PAYLOAD_MAX), 0) end
  local memory = new("uint8_t[?]", size)
  tail:finish(memory, fixed, fixed_size)
  last_token = last_token + 1
  kept[last_token] = { arena = arena, memory = memory, size = size }
  kept_order[#kept_order + 1] = last_token
  kept_bytes = kept_bytes + size
  kept_counts[arena] = (kept_counts[arena] or 0) + 1
  while kept_counts[arena] > KEPT_MAX or (kept_bytes > kept_bytes_max and #kept_order > 1) do forget_one(arena) end
  fail(BUFFER_TOO_SMALL, format("result of %d bytes is kept as %d", size, last_token))
end

local LOST = "the result is no longer kept: too many others wait for their callers, or they are too large for its memory"

local function fetch(arena, payload, args_size, out, out_size)
  if args_size < 8 then error("a fetch names its result by 8 bytes", 0) end
  local token = tonumber(cast(words_pointer, payload)[0])
  local result = kept[token]
  if not result or result.arena ~= arena then fail(STALE_HANDLE, LOST) end
  if result.size > out_size then fail(BUFFER_TOO_SMALL, format("result of %d bytes is kept as %d", result.size, token)) end
  copy(out, result.memory, result.size)
  for index = 1, #kept_order do
    if kept_order[index] == token then
      forget_at(index)
      break
    end
  end
  return result.size
end

-- -- instances ---------------------------------------------------------------------------------------------------
-- By arena, which is a host's, and by the number that the host has chosen. 0 is the host's default one.
local instances, instance_count = {}, 0
local implementation, singleton, title
local declared = {} -- functions of the contract, by name: these are no hooks of its instances

local function make()
  if type(implementation) == "function" or declared.new or type(implementation.new) ~= "function" then
    return implementation
  end
  local instance = implementation.new()
  if type(instance) ~= "table" then refuse(title .. ": new()", "a table", instance) end
  return instance
end

local function destroy(instance)
  local method = instance ~= implementation and not declared.destroy and instance.destroy
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

-- A host is gone: so are its instances, and the results that it did not fetch.
function typed.forget(arena)
  for index = #kept_order, 1, -1 do
    if kept[kept_order[index]].arena == arena then forget_at(index) end
  end
  kept_counts[arena] = nil
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
  if number == 0 then return create(arena, number) end
  fail(STALE_HANDLE, "the instance is gone: its worker was replaced; a new proxy gets a new one")
end

-- -- state -------------------------------------------------------------------------------------------------------
-- A singleton may hand its state to the worker that follows: `save()` returns a string, `restore(text)` takes it up.
local hooks = {}

local function find_hooks()
  for _, name in pairs({ "save", "restore" }) do
    local method = singleton[name]
    if type(method) == "function" and not declared[name] then hooks[name] = method end
  end
end

function typed.saves() return hooks.save ~= nil end
function typed.restores() return hooks.restore ~= nil end

-- Returns the state, or nothing and why there is none.
function typed.save(size_max)
  local fine, state = xpcall(hooks.save, runtime.state_handler, singleton)
  if not fine then return nil, "save() failed: " .. tostring(state) end
  if type(state) ~= "string" then return nil, "save() returned " .. shown(state) .. ", not a string" end
  if #state > size_max then
    return nil, format("save() returned %d bytes; the limit is %d", #state, size_max)
  end
  return state, ""
end

-- Returns why the state could not be taken up, or "".
function typed.restore(state)
  local fine, reason = xpcall(hooks.restore, runtime.state_handler, singleton, state)
  return fine and "" or "restore() failed: " .. tostring(reason)
end

-- -- dispatch ----------------------------------------------------------------------------------------------------
-- `functions` are a binding's, by id: each takes the instance, arena, payload, its size, out and its size, and returns the
-- bytes it wrote.
local function dispatcher(functions, count)
  return function(fn_id, payload, out, args_size, out_size, arena)
    local number = 0
    if fn_id >= IN_INSTANCE then
      fn_id = band(fn_id, FUNCTION_MASK)
      if fn_id == FETCH then return fetch(arena, payload, args_size, out, out_size) end
      if fn_id == DESTROY then
        for index = 0, floor(args_size / 8) - 1 do remove(arena, tonumber(cast(words_pointer, payload)[index])) end
        return 0
      end
      if args_size < HEAD_SIZE then error("the number of an instance is missing", 0) end
      number = tonumber(cast(words_pointer, payload)[0])
      if fn_id == CREATE then
        create(arena, number)
        return 0
      end
      payload, args_size = payload + HEAD_SIZE, args_size - HEAD_SIZE
    end
    local method = functions[fn_id]
    if not method then
      fail(FUNCTION_NOT_AVAILABLE, format("%s has %d functions; there is no function %.0f", title, count, fn_id))
    end
    return method(instance_of(arena, number), arena, payload, args_size, out, out_size)
  end
end

-- Returns the function that a worker calls.
function typed.bind(table_of_methods, is_singleton, functions, names, count, name)
  implementation, title = table_of_methods, name
  for id = 0, count - 1 do
    if type(implementation[names[id]]) ~= "function" then
      return nil, format("%s: the implementation has no function %s", title, names[id])
    end
    declared[names[id]] = true
  end
  if is_singleton then
    singleton = make()
    find_hooks()
  end
  return dispatcher(functions, count)
end

-- The same for an implementation that is one function. It knows no instances: all of them are that function.
function typed.bind_raw(callable, is_singleton, functions, count, name)
  implementation, title = callable, name
  if is_singleton then singleton = callable end
  return dispatcher(functions, count)
end

return typed
