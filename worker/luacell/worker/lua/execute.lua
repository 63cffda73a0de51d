-- The worker's half of a call, inside LuaJIT: checks, the marks in the slot, the guarded call, the answer.
--
-- `execute(index, place)` is the only way a contract is entered. It reads record `index` of the EXECUTE message in
-- `records`, works in the slot that the record names, and leaves a DONE record at `place` of `answers`.
-- Everything it needs of the standard library is captured before any contract code runs.

local ffi = require("ffi")
local bit = require("bit")

local cast, copy, fill, C = ffi.cast, ffi.copy, ffi.fill, ffi.C
local band, rshift = bit.band, bit.rshift
local xpcall, pcall, type, tostring, tonumber, error = xpcall, pcall, type, tostring, tonumber, error
local sub, find, traceback, floor, stderr = string.sub, string.find, debug.traceback, math.floor, io.stderr
local min, max, format, create = math.min, math.max, string.format, coroutine.create
local setmetatable, collectgarbage = setmetatable, collectgarbage

ffi.cdef [[
typedef struct {
  uint64_t sequence, deadline_ns;
  uint32_t fn_id, limit_us, arena, slot, generation, flags, args_size, out_size;
  uint64_t reserved;
} luacell_execute;
typedef struct { uint64_t sequence; uint32_t code, out_size, error_size, flags; } luacell_done;
typedef struct { uint64_t begun, done; uint32_t code, out_size, error_size, flags; uint64_t cpu_us; } luacell_answer;
typedef struct { int64_t seconds, nanoseconds; } luacell_timespec;
typedef struct { int64_t interval_s, interval_us, value_s, value_us; } luacell_itimer;
typedef struct { uint64_t words[8]; } luacell_mutex;
int luacell_clock(int, luacell_timespec *) __asm__("clock_gettime");
int luacell_timer(int, const luacell_itimer *, void *) __asm__("setitimer");
int luacell_lock(luacell_mutex *) __asm__("pthread_mutex_lock");
int luacell_unlock(luacell_mutex *) __asm__("pthread_mutex_unlock");
void *luacell_at_panic(void *, void *) __asm__("lua_atpanic");
int64_t luacell_read_at(int, void *, size_t, int64_t) __asm__("pread");
]]

local OK, STALE_HANDLE, CALL_FAILED, OUT_OF_MEMORY, BAD_REQUEST = 0, 5, 102, 258, 263
local RETIRE, NOT_BEGUN, RECYCLE, PROCESS_FULL = 1, 2, 4, 8
local HAS_ARGS, HAS_OUT = 1, 2
local PAYLOAD, WITHDRAWN = 128, 64
local ERROR_TEXT_MAX = 4096 -- bytes
local MESSAGE_MAX = 3072 -- of these for the message, so that a traceback fits behind it
local TRUNCATED = " … (truncated)"
local TIMER_SLACK_NS = 1e9 -- the worker's own timer fires this long after the limit, when the broker has not
local TIMER_STEP_NS = 1e8 -- and is set anew only when it moves by more than this
local FORGET_LIMIT_S = 1 -- for what a typed contract does when a host is gone
local CLOCK_MONOTONIC, CLOCK_PROCESS_CPUTIME_ID, ITIMER_REAL = 1, 2, 0
local CPU_STEP_NS = 1e7 -- the process's CPU time is read anew after this long: a call's is told no finer
local LOOK_CALLS, LOOK_NS = 64, 1e7 -- between two looks at how worn this process is, whichever comes first
local RSS_HARD_FACTOR = 2 -- at so many times its limit the process must not be used any more
local STATM_SIZE = 128
local CONTRACT_CODE_MIN, CODE_MAX = 1024, 4294967295

local records, answers
local pairs_by_key = {}
local target -- the contract's function
local is_typed = false -- whether it is a binding, which is told sizes and arena and returns the bytes that it wrote
local forget_arena -- told when a host is gone, where the contract is typed
local deadline_ns = 0 -- of the running call
local running = false -- id of the function that it runs, while there is one
local began_ns, limit_ns, waited_ns = 0, 0, 0 -- of it; waiting for calls of its own is no running
local timer_ns = 0 -- when the timer fires; 0: not set
local cpu_us, cpu_read_ns = 0, 0 -- CPU time of this process, and when it was that
local max_calls, max_pages = 0, 0 -- at which another worker should follow this one; 0: never
local statm = -1 -- descriptor of /proc/self/statm
local heap_max, data_max, page_size = 0, 0, 0 -- bytes of the Lua heap, and of the process's data, 0 where not known
local served, granted, calls_left = 0, 0, 0 -- calls until the last look; after it, until the next one
local look_ns = 0 -- when there is one in any case
local handled -- whether the handler saw the error: LuaJIT does not call it when memory is out
local chosen_code -- by the luacell.fail that ended the call
local failures = setmetatable({}, { __mode = "k" }) -- code and text by what luacell.fail raises; contracts cannot alter them
local warned = false

local now = ffi.new("luacell_timespec")
local timer = ffi.new("luacell_itimer")
local fence = ffi.new("luacell_mutex")
local statm_text = ffi.new("uint8_t[?]", STATM_SIZE)
local statm_fields = ffi.new("double[8]") -- seven, and one beyond what follows them

local function clock_ns()
  C.luacell_clock(CLOCK_MONOTONIC, now)
  return tonumber(now.seconds) * 1e9 + tonumber(now.nanoseconds)
end

-- The CPU time of this process, which is a system call to find out.
local function cpu_time_us(at_ns)
  if at_ns - cpu_read_ns > CPU_STEP_NS then
    C.luacell_clock(CLOCK_PROCESS_CPUTIME_ID, now)
    cpu_us, cpu_read_ns = tonumber(now.seconds) * 1e6 + floor(tonumber(now.nanoseconds) / 1e3), at_ns
  end
  return cpu_us
end

-- A full memory barrier: the locked instruction in a mutex that nobody else knows.
local function barrier()
  C.luacell_lock(fence)
  C.luacell_unlock(fence)
end

local function set_timer(delay_ns)
  local delay_us = floor(delay_ns / 1000)
  timer.value_s = floor(delay_us / 1000000)
  timer.value_us = delay_us % 1000000
  C.luacell_timer(ITIMER_REAL, timer, nil)
end

-- Let the kernel kill this process if the call outlives its limit and nobody else has done it.
local function arm(at_ns, limit_ns)
  local fires_ns = at_ns + limit_ns + TIMER_SLACK_NS
  if fires_ns - timer_ns > TIMER_STEP_NS or timer_ns > fires_ns then
    timer_ns = fires_ns
    set_timer(fires_ns - at_ns)
  end
end

local function arm_for(limit_s)
  arm(clock_ns(), limit_s * 1e9)
end

local function disarm()
  timer_ns = 0
  set_timer(0)
end

local function cut(text, length)
  if #text <= length then return text end
  return sub(text, 1, length - #TRUNCATED) .. TRUNCATED
end

local function described(value)
  local kind = type(value)
  if kind == "string" then return value end
  if kind == "table" and failures[value] then return failures[value].text end
  if kind == "number" or kind == "boolean" or kind == "nil" then return tostring(value) end
  local fine, text = pcall(tostring, value)
  if fine and type(text) == "string" then return text end
  return "(error object of type " .. kind .. ")"
end

-- The traceback is made apart from the text: what stands behind a zero byte would be lost to it.
local function handler(value)
  handled = true
  local failure = type(value) == "table" and failures[value]
  if failure then
    chosen_code = failure.code
    return failure.text
  end
  local text = "Lua exception: " .. cut(described(value), MESSAGE_MAX)
  return cut(text .. traceback("", 2), ERROR_TEXT_MAX)
end

local Failure = { __tostring = function(failure) return tostring(failure.message) end }

-- What is raised to refuse a call, or where a call of the contract's own was not answered. Uncaught, its code is the
-- call's own; that is read from what contracts cannot alter.
local function make_failure(code, text, kind, began)
  text = cut(text, ERROR_TEXT_MAX)
  local failure = setmetatable({ code = code, message = text, kind = kind, began = began }, Failure)
  failures[failure] = { code = code, text = text }
  return failure
end

local function fail(code, message)
  if type(code) ~= "number" or code % 1 ~= 0 or not ((code >= 1 and code <= 9) or
      (code >= CONTRACT_CODE_MIN and code <= CODE_MAX)) then
    error("luacell.fail: code " .. described(code) .. " is neither in 1..9 nor from 1024 on", 2)
  end
  error(make_failure(code, message == nil and "" or described(message), "", "yes"), 0)
end

-- The timer of a worker that waits for a call of its own: no longer than until its own call's deadline.
local function begin_waiting()
  timer_ns = deadline_ns + TIMER_SLACK_NS
  local at_ns = clock_ns()
  set_timer(max(timer_ns - at_ns, 1000))
  return at_ns
end

local function end_waiting(since_ns)
  local at_ns = clock_ns()
  waited_ns = waited_ns + at_ns - since_ns
  timer_ns = began_ns + waited_ns + limit_ns + TIMER_SLACK_NS
  set_timer(max(timer_ns - at_ns, 1000))
end

-- Read how many pages this process has, by kind, as proc_pid_statm(5) numbers them; false where that is not known.
local function read_statm()
  local length = tonumber(C.luacell_read_at(statm, statm_text, STATM_SIZE, 0))
  local field, value = 0, 0
  for index = 0, length - 1 do
    local digit = statm_text[index] - 48
    if digit >= 0 and digit <= 9 then
      value = value * 10 + digit
    else
      statm_fields[field] = value
      field, value = min(field + 1, 7), 0
    end
  end
  return field == 7
end

-- Pages that this process holds for itself, which those of arenas and libraries are not; 0 where that is not known.
local function own_pages()
  return read_statm() and statm_fields[1] - statm_fields[2] or 0
end

-- Whether it is the process that had no more memory, not the Lua heap: `is_full` of memory.py.
local function is_process_full()
  return data_max > 0 and read_statm() and
    data_max - statm_fields[5] * page_size < heap_max - collectgarbage("count") * 1024
end

-- Look at how worn this process is; returns what the answer is to say of it.
local function look_at_wear(at_ns)
  served = served + granted - calls_left
  granted = served < max_calls and min(LOOK_CALLS, max_calls - served) or LOOK_CALLS
  calls_left, look_ns = granted, at_ns + LOOK_NS
  local pages = max_pages > 0 and own_pages() or 0
  if pages > 0 and pages >= RSS_HARD_FACTOR * max_pages then return RETIRE end
  local is_worn = (max_calls > 0 and served >= max_calls) or (pages > 0 and pages >= max_pages)
  return is_worn and RECYCLE or 0
end

-- Seconds that the running call has left; negative when it is past its deadline.
local function deadline()
  return (deadline_ns - clock_ns()) / 1e9
end

local function finish(answer, slot, sequence, code, out_size, text, flags)
  local error_size = 0
  if text then
    error_size = #text
    copy(slot + PAYLOAD, text, error_size)
  end
  local words = cast("luacell_answer *", slot)
  words.code, words.out_size, words.error_size, words.flags = code, out_size, error_size, flags
  barrier()
  words.done = sequence
  answer.code, answer.out_size, answer.error_size, answer.flags = code, out_size, error_size, flags
end

-- What a failed call is told: code, text, flags.
local function judged(text)
  if not handled then
    -- LuaJIT skips the handler for two errors: no memory is left, or a compiled trace ended without room for its frames.
    if type(text) == "string" and find(text, "stack overflow", 1, true) then
      return CALL_FAILED, "Lua exception: " .. cut(text, MESSAGE_MAX), 0
    end
    local why = is_process_full() and PROCESS_FULL or 0
    return OUT_OF_MEMORY, "Lua exception: " .. cut(described(text), MESSAGE_MAX), RETIRE + why
  end
  if chosen_code then return chosen_code, text, 0 end
  return CALL_FAILED, type(text) == "string" and text or "Lua exception: error in error handling", 0
end

local function warn_of_result(value)
  warned = true
  stderr:write("luacell: the contract returned a ", type(value), ", which raw contracts' callers never see: write to out\n")
end

-- Run one call. Returns nothing when its pair of segments is unknown, else the flags of the answer that is in place.
local function execute(index, place)
  local record, answer = records[index], answers[place]
  local sequence = record.sequence
  answer.sequence, answer.code, answer.out_size, answer.error_size, answer.flags = sequence, OK, 0, 0, 0
  local pair = pairs_by_key[record.arena * 65536 + rshift(record.slot, 16)]
  if not pair then return end
  local position = band(record.slot, 0xffff)
  local args_size, out_size = record.args_size, record.out_size
  if position >= pair.count or args_size > pair.args_stride - PAYLOAD or out_size > pair.out_stride - PAYLOAD then
    answer.code = BAD_REQUEST
    return 0
  end
  local args_slot, out_slot = pair.args + position * pair.args_stride, pair.out + position * pair.out_stride
  -- One that was taken back in time is left alone altogether: its slot may be another worker's by now.
  if cast("uint64_t *", args_slot + WITHDRAWN)[0] >= sequence then
    answer.flags = NOT_BEGUN
    return NOT_BEGUN
  end
  if cast("uint64_t *", args_slot)[0] ~= record.generation then
    finish(answer, out_slot, sequence, STALE_HANDLE, 0, "the slot's generation is not the call's", 0)
    return 0
  end
  local words = cast("luacell_answer *", out_slot)
  words.begun = sequence
  barrier()
  local at_ns = clock_ns()
  deadline_ns = tonumber(record.deadline_ns)
  if at_ns >= deadline_ns or cast("uint64_t *", args_slot + WITHDRAWN)[0] >= sequence then
    words.begun = 0
    finish(answer, out_slot, sequence, OK, 0, nil, NOT_BEGUN)
    return NOT_BEGUN
  end
  words.cpu_us = cpu_time_us(at_ns)
  began_ns, limit_ns, waited_ns = at_ns, record.limit_us * 1e3, 0
  arm(at_ns, limit_ns)
  local flags = record.flags
  local args = band(flags, HAS_ARGS) ~= 0 and args_slot + PAYLOAD or nil
  local out
  if band(flags, HAS_OUT) ~= 0 then
    out = out_slot + PAYLOAD
    if out_size > 0 and not is_typed then fill(out, out_size) end
  end
  handled, chosen_code, running = false, nil, record.fn_id
  local fine, result
  if is_typed then
    fine, result = xpcall(target, handler, record.fn_id, args, out, args_size, out_size, record.arena)
  else
    fine, result = xpcall(target, handler, record.fn_id, args, out)
    if fine then
      if result ~= nil and not warned then warn_of_result(result) end
      result = out_size
    end
  end
  running = false
  local wear = 0
  calls_left = calls_left - 1
  if calls_left <= 0 or at_ns >= look_ns then wear = look_at_wear(at_ns) end
  if fine then
    finish(answer, out_slot, sequence, OK, result, nil, wear)
    return wear
  end
  local code, text, verdict = judged(result)
  if verdict == 0 then verdict = wear end
  finish(answer, out_slot, sequence, code, 0, text, verdict)
  return band(verdict, RETIRE) ~= 0 and RETIRE or verdict
end

local function byte_pointer(address)
  return cast("uint8_t *", cast("uintptr_t", address))
end

return {
  set_buffers = function(records_address, answers_address)
    records = cast("luacell_execute *", cast("uintptr_t", records_address))
    answers = cast("luacell_done *", cast("uintptr_t", answers_address))
  end,
  add_pair = function(arena, index, args_address, out_address, count, args_stride, out_stride)
    pairs_by_key[arena * 65536 + index] = {
      args = byte_pointer(args_address), out = byte_pointer(out_address),
      count = count, args_stride = args_stride, out_stride = out_stride,
    }
  end,
  remove_pair = function(arena, index)
    pairs_by_key[arena * 65536 + index] = nil
  end,
  -- A host is gone, and all its pairs were removed.
  forget = function(arena)
    if not forget_arena then return end
    arm_for(FORGET_LIMIT_S)
    forget_arena(arena)
    disarm()
  end,
  -- Bound how long this process is used: calls, 0 for no bound; pages, 0 likewise, as a descriptor tells them.
  limit_wear = function(calls, pages, descriptor) max_calls, max_pages, statm = calls, pages, descriptor end,
  -- Have a function of C called before LuaJIT ends the process: it does where it cannot make machine code writable again.
  set_panic = function(address)
    local state = tonumber(format("%p", create(type))) -- of any coroutine: they share what is set
    C.luacell_at_panic(cast("void *", cast("uintptr_t", state)), cast("void *", cast("uintptr_t", address)))
  end,
  -- Tell what memory there is: bytes of Lua beyond what it has now, bytes of data of the process, bytes of a page.
  limit_memory = function(lua, data, page)
    heap_max, data_max, page_size = lua + collectgarbage("count") * 1024, data, page
  end,
  set_target = function(callable) target = callable end,
  set_typed_target = function(callable, forget)
    target, is_typed, forget_arena = callable, true, forget
  end,
  execute = execute,
  clock_ns = clock_ns,
  arm_for = arm_for,
  disarm = disarm,
  begin_waiting = begin_waiting,
  end_waiting = end_waiting,
  time_left_ns = function() return running and deadline_ns - clock_ns() or nil end,
  function_id = function() return running or nil end,
  make_failure = make_failure,
  described = described,
  cut = cut,
  api = { fail = fail, deadline = deadline },
}
