-- The worker's loop inside LuaJIT: receive calls, run them, answer, without a turn through Python.
--
-- It speaks to the libzmq that the process has loaded already. Whatever is not a call (a contract to load, a pair to
-- map) is handed to the process, which comes back here afterwards.
--
-- Answers are gathered while more calls are at hand, so that a busy broker gets several in one message; never for
-- long: not behind a call that may be slow, and not beyond GATHER_NS.
--
-- Arguments: execute.lua's table, path of libzmq, the socket's address, the first bytes of a message with one call,
-- addresses of the records that execute reads, of the reply that it fills and of the place where this loop notes how
-- far it is; milliseconds without a call after which the timer is stopped.

local runtime, library, socket_address, execute_head, records_address, reply_address, progress_address, idle_ms = ...

local ffi = require("ffi")
local bit = require("bit")
local cast, copy, errno, band = ffi.cast, ffi.copy, ffi.errno, bit.band
local string_of, byte = ffi.string, string.byte
local execute, disarm, clock_ns = runtime.execute, runtime.disarm, runtime.clock_ns

ffi.cdef [[
typedef struct { uint64_t words[8]; } luacell_frame;
typedef struct { uint32_t position, count, unsent; } luacell_progress;
int luacell_frame_init(luacell_frame *) __asm__("zmq_msg_init");
int luacell_frame_receive(luacell_frame *, void *socket, int flags) __asm__("zmq_msg_recv");
void *luacell_frame_data(luacell_frame *) __asm__("zmq_msg_data");
size_t luacell_frame_size(const luacell_frame *) __asm__("zmq_msg_size");
int luacell_frame_close(luacell_frame *) __asm__("zmq_msg_close");
int luacell_send(void *socket, const void *, size_t, int flags) __asm__("zmq_send");
int luacell_set_option(void *socket, int option, const void *, size_t) __asm__("zmq_setsockopt");
]]

local zmq = ffi.load(library)
local RCVTIMEO, DONTWAIT, EAGAIN, EINTR = 27, 1, 11, 4
local PREAMBLE_SIZE, RECORD_SIZE, ANSWER_SIZE = 8, ffi.sizeof("luacell_execute"), ffi.sizeof("luacell_done")
local OP_AT, COUNT_AT = 3, 4 -- of a preamble
local ANSWERS_MAX = 256 -- gathered at most
local GATHER_NS = 100000 -- and for this long at most
local SLOW_NS = 100000 -- a function that took longer the last time is not begun with answers at hand
local AHEAD, RETIRE, NOT_BEGUN = 4, 1, 2
local FUNCTIONS = 255 -- those with equal low bits share what is known of their pace

local socket = cast("void *", cast("uintptr_t", socket_address))
local record_bytes = cast("uint8_t *", cast("uintptr_t", records_address))
local records = cast("luacell_execute *", record_bytes)
local reply = cast("uint8_t *", cast("uintptr_t", reply_address))
local progress = cast("luacell_progress *", cast("uintptr_t", progress_address))
local frame = ffi.new("luacell_frame")
local HEAD = cast("const uint32_t *", execute_head)[0] -- magic, version and operation
local timeout = ffi.new("int[1]")
local is_guarded = false
local is_slow = ffi.new("uint8_t[?]", FUNCTIONS + 1, 1) -- by function: until it is known, every one may be
local gathering_ns = 0 -- since when answers are at hand
local began_ns, began_function = 0, 0 -- the last call's
local set_aside, aside_first, aside_last = {}, 1, 0 -- messages that came while a call waited for one of its own
local aside -- the one that is being acted on

-- While the timer may be running, receiving wakes up to stop it.
local function set_guarded(guarded)
  if guarded == is_guarded then return end
  is_guarded = guarded
  timeout[0] = guarded and idle_ms or -1
  zmq.luacell_set_option(socket, RCVTIMEO, timeout, 4)
end

local function answer()
  local count = progress.unsent
  progress.unsent = 0
  cast("uint16_t *", reply + COUNT_AT)[0] = count
  while zmq.luacell_send(socket, reply, PREAMBLE_SIZE + count * ANSWER_SIZE, 0) < 0 do
    if errno() ~= EINTR then error("zmq_send failed with errno " .. errno(), 0) end
  end
end

-- Run the calls at hand. Returns nothing when all are done, "map" when one names a pair that is not mapped (it is the
-- first one of the next turn), and "retire" when the VM must not be used again; then everything is answered.
local function run()
  while progress.position < progress.count do
    local position = progress.position
    local fn = band(records[position].fn_id, FUNCTIONS)
    if band(records[position].flags, AHEAD) ~= 0 or progress.unsent > 0 then
      local now_ns = clock_ns()
      if began_ns ~= 0 then is_slow[began_function] = now_ns - began_ns > SLOW_NS and 1 or 0 end
      began_ns, began_function = now_ns, fn
      if progress.unsent > 0 and
          (is_slow[fn] ~= 0 or now_ns - gathering_ns > GATHER_NS or progress.unsent >= ANSWERS_MAX) then
        answer()
      end
      if progress.unsent == 0 then gathering_ns = now_ns end
    end
    local flags = execute(position, progress.unsent)
    if not flags then
      if progress.unsent > 0 then answer() end
      return "map"
    end
    progress.position = position + 1
    progress.unsent = progress.unsent + 1
    if flags == RETIRE then
      answer()
      return "retire"
    end
    if flags == NOT_BEGUN then answer() end -- the broker cannot see it in the slot, and waits for it
  end
end

-- Take a message into the frame; false when none is there and answers are to be sent first.
local function receive()
  local may_gather = progress.unsent > 0 and band(records[progress.count - 1].flags, AHEAD) ~= 0
  if progress.unsent > 0 and not may_gather then answer() end
  began_ns = may_gather and began_ns or 0
  while true do
    zmq.luacell_frame_init(frame)
    if zmq.luacell_frame_receive(frame, socket, may_gather and DONTWAIT or 0) >= 0 then return end
    local code = errno()
    if code == EAGAIN and may_gather then
      answer()
      may_gather = false
      began_ns = 0
    elseif code == EAGAIN then
      disarm()
      set_guarded(false)
    elseif code ~= EINTR then
      error("zmq_msg_recv failed with errno " .. code, 0)
    end
  end
end

-- Returns "map" or "retire" as `run` does, or address and size of a message for the process, which must call
-- `done_with` afterwards.
local function serve()
  while true do
    local reason = run()
    if reason then return reason end
    local data, size
    if aside_first <= aside_last then
      aside = set_aside[aside_first]
      set_aside[aside_first] = nil
      aside_first = aside_first + 1
      data, size = cast("uint8_t *", aside), #aside
    else
      receive()
      data, size = cast("uint8_t *", zmq.luacell_frame_data(frame)), tonumber(zmq.luacell_frame_size(frame))
    end
    set_guarded(true)
    local count = 0
    if size >= PREAMBLE_SIZE and cast("uint32_t *", data)[0] == HEAD then
      count = cast("uint16_t *", data + COUNT_AT)[0]
    end
    if count == 0 or size ~= PREAMBLE_SIZE + count * RECORD_SIZE then
      if progress.unsent > 0 then answer() end
      return tonumber(cast("uintptr_t", data)), size
    end
    copy(record_bytes, data + PREAMBLE_SIZE, count * RECORD_SIZE)
    if aside then aside = nil else zmq.luacell_frame_close(frame) end
    progress.position, progress.count = 0, count
  end
end

-- -- for a call that makes one itself ----------------------------------------------------------------------------
local inner_frame = ffi.new("luacell_frame")

-- Answers for the calls before the running one must not wait for it.
local function send(message)
  if progress.unsent > 0 then answer() end
  while zmq.luacell_send(socket, message, #message, 0) < 0 do
    if errno() ~= EINTR then error("zmq_send failed with errno " .. errno(), 0) end
  end
end

-- Wait for a message of one of the given operations; others are set aside.
local function await(wanted)
  while true do
    zmq.luacell_frame_init(inner_frame)
    if zmq.luacell_frame_receive(inner_frame, socket, 0) >= 0 then
      local message = string_of(zmq.luacell_frame_data(inner_frame), zmq.luacell_frame_size(inner_frame))
      zmq.luacell_frame_close(inner_frame)
      local op = byte(message, OP_AT + 1)
      if wanted[op] then return op, message end
      aside_last = aside_last + 1
      set_aside[aside_last] = message
    else
      local code = errno()
      if code ~= EINTR and code ~= EAGAIN then error("zmq_msg_recv failed with errno " .. code, 0) end
    end
  end
end

local function done_with()
  if aside then aside = nil else zmq.luacell_frame_close(frame) end
end

return { serve = serve, done_with = done_with, send = send, await = await }
