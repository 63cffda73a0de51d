-- The worker's loop inside LuaJIT: receive calls, run them, answer, without a turn through Python.
--
-- It speaks ZMTP on the process's own connection, frame by frame. Whatever is not a call (a contract to load, a pair to
-- map) is handed to the process, which comes back here afterwards.
--
-- Answers are gathered while more calls are at hand, so that a busy broker gets several in one message; never for
-- long: not behind a call that may be slow, and not beyond GATHER_NS.
--
-- Arguments: execute.lua's table, the connection's descriptor, address and size of its inbox, the first bytes of a
-- message with one call, addresses of the records that execute reads, of the reply that it fills (with FRAME_HEAD bytes
-- before it) and of the place where this loop notes how far it is; milliseconds without a call after which the timer is
-- stopped.

local runtime, descriptor, inbox_address, inbox_size, execute_head, records_address, reply_address, progress_address,
  idle_ms = ...

local ffi = require("ffi")
local bit = require("bit")
local cast, copy, errno, band = ffi.cast, ffi.copy, ffi.errno, bit.band
local string_of, byte, rshift = ffi.string, string.byte, bit.rshift
local execute, disarm, clock_ns = runtime.execute, runtime.disarm, runtime.clock_ns

ffi.cdef [[
typedef struct { uint32_t position, count, unsent; } luacell_progress;
typedef struct { long seconds, us; } luacell_timeval;
/* They return ssize_t, of which the lower half is enough here, and is no cdata. */
int luacell_receive(int fd, void *, size_t, int flags) __asm__("recv");
int luacell_send(int fd, const void *, size_t, int flags) __asm__("send");
int luacell_set_option(int fd, int level, int option, const void *, unsigned) __asm__("setsockopt");
void *luacell_move(void *, const void *, size_t) __asm__("memmove");
int luacell_pause(void) __asm__("pause");
]]

local C = ffi.C
local SOL_SOCKET, SO_RCVTIMEO, DONTWAIT, NOSIGNAL, EAGAIN, EINTR = 1, 20, 0x40, 0x4000, 11, 4
local MORE, LONG, COMMAND, SHORT_MAX, SHORT_HEAD, LONG_HEAD = 1, 2, 4, 255, 2, 9 -- of a frame
local ROOM = 65536 -- bytes of the inbox that are there to receive into at least
local PREAMBLE_SIZE, RECORD_SIZE, ANSWER_SIZE = 8, ffi.sizeof("luacell_execute"), ffi.sizeof("luacell_done")
local OP_AT, COUNT_AT = 3, 4 -- of a preamble
local ANSWERS_MAX = 256 -- gathered at most
local GATHER_NS = 100000 -- and for this long at most
local SLOW_NS = 100000 -- a function that took longer the last time is not begun with answers at hand
local AHEAD, RETIRE, NOT_BEGUN = 4, 1, 2
local FUNCTIONS = 255 -- those with equal low bits share what is known of their pace

local inbox = cast("uint8_t *", cast("uintptr_t", inbox_address))
local first, last = 0, 0 -- what has been received and not taken yet lies between these
local record_bytes = cast("uint8_t *", cast("uintptr_t", records_address))
local records = cast("luacell_execute *", record_bytes)
local reply = cast("uint8_t *", cast("uintptr_t", reply_address))
local progress = cast("luacell_progress *", cast("uintptr_t", progress_address))
local HEAD = cast("const uint32_t *", execute_head)[0] -- magic, version and operation
local timeout = ffi.new("luacell_timeval")
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
  timeout.us = guarded and idle_ms * 1000 or 0
  C.luacell_set_option(descriptor, SOL_SOCKET, SO_RCVTIMEO, timeout, ffi.sizeof(timeout))
end

-- The broker has hung up, so whoever ends workers has been told to end this one. It may not say anything of its own.
local function await_death()
  while true do C.luacell_pause() end
end

local function write(data, size)
  while size > 0 do
    local sent = C.luacell_send(descriptor, data, size, NOSIGNAL)
    if sent >= 0 then
      data, size = data + sent, size - sent
    elseif errno() ~= EINTR and errno() ~= EAGAIN then
      await_death()
    end
  end
end

-- Put the head of a frame of `size` bytes right before `body`; returns where the frame begins, and its size.
local function framed(body, size)
  if size <= SHORT_MAX then
    body[-2], body[-1] = 0, size
    return body - SHORT_HEAD, size + SHORT_HEAD
  end
  body[-LONG_HEAD] = LONG
  local rest = size
  for index = -1, 1 - LONG_HEAD, -1 do
    body[index] = band(rest, 255)
    rest = rshift(rest, 8)
  end
  return body - LONG_HEAD, size + LONG_HEAD
end

-- Take the next message of the inbox: its place and size. Nothing when it has not come, or not all of it.
local function take()
  while last - first >= SHORT_HEAD do
    local flags, head, size = inbox[first], SHORT_HEAD, inbox[first + 1]
    if band(flags, LONG) ~= 0 then
      if last - first < LONG_HEAD then return end
      head, size = LONG_HEAD, 0
      for index = 1, 8 do size = size * 256 + inbox[first + index] end
    end
    if head + size > inbox_size then error("a frame of " .. size .. " bytes from the broker", 0) end
    if last - first < head + size then return end
    local body = inbox + first + head
    first = first + head + size
    if band(flags, MORE) ~= 0 then error("a message of several frames from the broker", 0) end
    if band(flags, COMMAND) == 0 then return body, size end
  end
end

-- Receive what has come; with DONTWAIT, or while the timer may be running, it may be nothing, which it returns.
local function fill(flags)
  if first == last then
    first, last = 0, 0
  elseif first > 0 and inbox_size - last < ROOM then
    C.luacell_move(inbox, inbox + first, last - first)
    first, last = 0, last - first
  end
  while true do
    local size = C.luacell_receive(descriptor, inbox + last, inbox_size - last, flags)
    if size > 0 then
      last = last + size
      return true
    end
    if size == 0 then await_death() end
    local code = errno()
    if code == EAGAIN then return false end
    if code ~= EINTR then await_death() end
  end
end

local function answer()
  local count = progress.unsent
  progress.unsent = 0
  cast("uint16_t *", reply + COUNT_AT)[0] = count
  write(framed(reply, PREAMBLE_SIZE + count * ANSWER_SIZE))
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

-- Return place and size of the next message; before waiting for it, answers are sent.
local function receive()
  local data, size = take()
  local may_gather = progress.unsent > 0 and band(records[progress.count - 1].flags, AHEAD) ~= 0
  if progress.unsent > 0 and not may_gather then answer() end
  began_ns = may_gather and began_ns or 0
  while not data do
    if not fill(may_gather and DONTWAIT or 0) then
      if may_gather then
        answer()
        may_gather = false
        began_ns = 0
      else
        disarm()
        set_guarded(false)
      end
    end
    data, size = take()
  end
  return data, size
end

-- Returns "map" or "retire" as `run` does, or address and size of a message for the process, to be read at once.
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
      data, size = receive()
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
    progress.position, progress.count = 0, count
  end
end

-- -- for a call that makes one itself ----------------------------------------------------------------------------
-- Answers for the calls before the running one must not wait for it.
local function send(message)
  if progress.unsent > 0 then answer() end
  local size = #message
  local outgoing = ffi.new("uint8_t[?]", LONG_HEAD + size)
  copy(outgoing + LONG_HEAD, message, size)
  write(framed(outgoing + LONG_HEAD, size))
end

-- Wait for a message of one of the given operations; others are set aside.
local function await(wanted)
  while true do
    local data, size = take()
    if data then
      local message = string_of(data, size)
      local op = byte(message, OP_AT + 1)
      if wanted[op] then return op, message end
      aside_last = aside_last + 1
      set_aside[aside_last] = message
    else
      fill(0)
    end
  end
end

return { serve = serve, send = send, await = await }
