-- `luacell.call`: a contract calls another, through the broker, and waits for the answer.
--
-- To the broker this is a host without shared memory: CALL_INLINE, the rest of the arguments piece by piece, then
-- RESULT_INLINE and its pieces, or FAILURE. Who may call whom, and for how long, the broker decides; here is checked only
-- what could not be sent. Control messages are read and written by nested.py, which gives errors their form, too.
--
-- Arguments: execute.lua's table, serve.lua's, typed.lua's, and `describer`: called with the name of a contract it
-- returns a table with `id`, its 8 bytes, and `request`, the message that asks what it is like; `describer` with a reply
-- and the name returns a table with `source` (of what nested.py calls a caller's binding) and `sum`; and with a FAILURE
-- one with `call_id`; all of them may have an error in place of that: `code`, `message`, `kind`, `began`.

local runtime, serving, typed, named, described, failed, kinds = ...

local ffi = require("ffi")
local cast, new, string_of = ffi.cast, ffi.new, ffi.string
local load, type, error, pcall, tonumber, select = load, type, error, pcall, tonumber, select
local sub, match, format, concat, floor, min = string.sub, string.match, string.format, table.concat, math.floor, math.min
local send, await = serving.send, serving.await
local make_failure, time_left_ns = runtime.make_failure, runtime.time_left_ns

ffi.cdef [[
typedef struct {
  uint32_t head; uint16_t count, reserved;
  uint64_t call_id, contract;
  uint32_t fn_id, budget_us, flags, args_size, out_size, sum;
} luacell_call_inline;
typedef struct { uint32_t head; uint16_t count, reserved; uint64_t call_id; uint32_t offset, size; } luacell_piece;
typedef struct {
  uint32_t head; uint16_t count, reserved; uint64_t call_id; uint32_t code, out_size, error_size, flags;
} luacell_result_inline;
]]

local MAGIC_AND_VERSION = 0x0001434C -- 'L', 'C', 1
local CALL_INLINE, RESULT_INLINE, FAILURE, REPLY, PIECE, MORE = 12, 38, 34, 36, 192, 193
local ANSWERS = { [RESULT_INLINE] = true, [FAILURE] = true, [PIECE] = true, [MORE] = true }
local REPLIES = { [REPLY] = true, [FAILURE] = true }
local RESULT_SIZE, PIECE_SIZE = ffi.sizeof("luacell_result_inline"), ffi.sizeof("luacell_piece")
local INLINE_PIECE, INLINE_SMALL_MAX = 256 * 1024, 16 * 1024
local PAYLOAD_MAX = 1024 * 1024
local BUDGET_MAX_US = 60e6
local HAS_ARGS, HAS_OUT = 1, 2
local BUFFER_TOO_SMALL, STALE_HANDLE, CALL_FAILED, DEADLINE_EXCEEDED, TOO_LARGE = 2, 5, 102, 256, 264
local FETCH = 0xFFFFFFFF -- a function id of typed contracts: a result that did not fit
local STALE_DESCRIPTION = "StaleDescription"
local ROOM_FIRST = 1024 -- bytes for what varies in a result

local call_record, piece_record = new("luacell_call_inline"), new("luacell_piece")
local token = new("uint64_t[1]")
local last_id = 0
local ids, callers = {}, {} -- by name of contract: its 8 bytes; how its functions are called

local function head_of(op) return MAGIC_AND_VERSION + op * 0x1000000 end

local function raise(problem) error(make_failure(problem.code, problem.message, problem.kind, problem.began), 0) end

local function piece_of(op, offset, size)
  local record = piece_record
  record.head, record.count, record.call_id, record.offset, record.size = head_of(op), 1, last_id, offset, size
  return string_of(record, PIECE_SIZE)
end

-- Make one call; returns its results, or nothing and the error.
local function exchange(id, fn_id, args, out_size, sum)
  local left_ns = time_left_ns()
  if left_ns <= 0 then
    return nil, { code = DEADLINE_EXCEEDED, message = "luacell.call: the deadline of the calling call is over",
                  kind = kinds[DEADLINE_EXCEEDED], began = "no" }
  end
  last_id = last_id + 1
  local record, args_size = call_record, args and #args or 0
  record.head, record.count, record.call_id = head_of(CALL_INLINE), 1, last_id
  record.contract = cast("const uint64_t *", id)[0]
  record.fn_id, record.budget_us = fn_id, min(floor(left_ns / 1000) + 1, BUDGET_MAX_US)
  record.flags = (args and HAS_ARGS or 0) + (out_size and HAS_OUT or 0)
  record.args_size, record.out_size, record.sum = args_size, out_size or 0, sum or 0
  local head = string_of(record, ffi.sizeof(record))
  send(args_size > 0 and head .. sub(args, 1, INLINE_PIECE) or head)
  local parts, count, got, total, code = {}, 0, 0, nil, 0
  repeat
    local op, message = await(ANSWERS)
    if op == FAILURE then
      local problem = failed(message)
      if problem.call_id == last_id then return nil, problem end
    elseif cast("const luacell_piece *", message).call_id == last_id then
      local piece = cast("const luacell_piece *", message)
      if op == MORE then
        local offset = piece.offset
        if offset < args_size then
          local part = sub(args, offset + 1, offset + INLINE_PIECE)
          send(piece_of(PIECE, offset, #part) .. part)
        end
      else
        local start = PIECE_SIZE
        if op == RESULT_INLINE then
          local result = cast("const luacell_result_inline *", message)
          code, total, start = result.code, result.out_size + result.error_size, RESULT_SIZE
        end
        count, got = count + 1, got + #message - start
        parts[count] = sub(message, start + 1)
      end
    end
  until total and got >= total
  if total > INLINE_SMALL_MAX then send(piece_of(MORE, total, 0)) end
  local bytes = count == 1 and parts[1] or concat(parts)
  if code ~= 0 then
    return nil, { code = code, message = bytes, kind = kinds[code] or "CallError", began = "yes" }
  end
  return bytes
end

local function ask(request, name)
  send(request)
  local _, message = await(REPLIES)
  return described(message, name)
end

local function id_of(name)
  local id = ids[name]
  if not id then
    if type(name) ~= "string" then error("luacell.call: a contract is named by a string such as 'host.kv@1'", 3) end
    local found = named(name)
    if found.message then error("luacell.call: " .. found.message, 3) end
    id = found.id
    ids[name] = id
  end
  return id
end

-- How the functions of a typed contract are called, by name.
local function caller_of(name)
  local caller = callers[name]
  if caller then return caller end
  local found = ask(named(name).request, name)
  if found.message then raise(found) end
  caller = { functions = load(found.source, "=caller", "t")(typed), sum = found.sum, rooms = {} }
  callers[name] = caller
  return caller
end

local function call_typed(name, id, function_name, ...)
  local caller = caller_of(name)
  local called = caller.functions[function_name]
  if not called then
    error(make_failure(6, format("%s has no function %s", name, function_name), kinds[6], "no"), 0)
  end
  local given = select("#", ...)
  if given ~= called.count then
    error(format("luacell.call: %s %s takes %d arguments, got %d", name, function_name, called.count, given), 0)
  end
  local payload = called.pack(...)
  local room = called.size + (called.varies and (caller.rooms[function_name] or ROOM_FIRST) or 0)
  local has_result = called.unpack ~= nil
  local bytes, problem = exchange(id, called.id, payload, has_result and min(room, PAYLOAD_MAX) or nil, caller.sum)
  if problem and problem.kind == STALE_DESCRIPTION then
    callers[name] = nil
    return nil, true
  end
  if problem and problem.code == BUFFER_TOO_SMALL then
    local size, number = match(problem.message, "^result of (%d+) bytes is kept as (%d+)$")
    size = tonumber(size)
    if size and size > PAYLOAD_MAX then
      error(make_failure(TOO_LARGE, format("%s %s: a result of %d bytes is over the limit of %d for calls between contracts",
        name, function_name, size, PAYLOAD_MAX), kinds[TOO_LARGE], "yes"), 0)
    elseif size then
      caller.rooms[function_name] = 2 * size
      token[0] = tonumber(number)
      bytes, problem = exchange(id, FETCH, string_of(token, 8), size)
    end
  end
  if problem then raise(problem) end
  if not has_result then return nil end
  return called.unpack(bytes)
end

local function check_size(what, size)
  if size > PAYLOAD_MAX then
    local text = format("luacell.call: %s of %.0f bytes is over the limit of %d", what, size, PAYLOAD_MAX)
    error(make_failure(TOO_LARGE, text, kinds[TOO_LARGE], "no"), 0)
  end
end

local function call_raw(id, fn_id, args, out_size)
  if args ~= nil and type(args) ~= "string" then -- told where the contract calls: over pcall and api.call
    error("luacell.call: arguments of a raw function are one string", 4)
  end
  if out_size ~= nil and (type(out_size) ~= "number" or out_size % 1 ~= 0 or out_size < 0) then
    error("luacell.call: the size of the result is a whole number of bytes", 4)
  end
  check_size("args", args and #args or 0)
  check_size("out", out_size or 0)
  local bytes, problem = exchange(id, fn_id, args, out_size)
  if problem then raise(problem) end
  return bytes
end

function runtime.api.call(contract, fn, ...)
  if not time_left_ns() then error("luacell.call: only while a call runs", 2) end
  local id = id_of(contract)
  local since_ns = runtime.begin_waiting()
  if type(fn) == "number" then
    if fn % 1 ~= 0 or fn < 0 or fn > 0xFFFFFFFF then error("luacell.call: function id " .. fn .. " is no u32", 2) end
    local fine, result = pcall(call_raw, id, fn, ...)
    runtime.end_waiting(since_ns)
    if not fine then error(result, 0) end
    return result
  end
  if type(fn) ~= "string" then error("luacell.call: a function is named by its name, or its number", 2) end
  local fine, result, is_stale = pcall(call_typed, contract, id, fn, ...)
  if fine and is_stale then fine, result, is_stale = pcall(call_typed, contract, id, fn, ...) end
  runtime.end_waiting(since_ns)
  if not fine then error(result, 0) end
  if is_stale then
    error(make_failure(STALE_HANDLE, contract .. " is replaced too often to be called", kinds[STALE_HANDLE], "no"), 0)
  end
  return result
end
