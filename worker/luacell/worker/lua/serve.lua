-- The worker's loop inside LuaJIT: receive a call, run it, answer, without a turn through Python.
--
-- It speaks to the libzmq that the process has loaded already. Whatever is not a single call (a contract to load, a
-- pair to map, several calls at once) is handed to the process, which comes back here afterwards.
--
-- Arguments: execute.lua's table, path of libzmq, the socket's address, the first bytes of a message with one call,
-- addresses of the record that execute reads and of the reply that it fills, sizes of both messages, milliseconds
-- without a call after which the timer is stopped.

local runtime, library, socket_address, execute_head, record_address, reply_address, message_size, reply_size, idle_ms = ...

local ffi = require("ffi")
local cast, copy, errno = ffi.cast, ffi.copy, ffi.errno
local execute, disarm = runtime.execute, runtime.disarm

ffi.cdef [[
typedef struct { uint64_t words[8]; } luacell_frame;
int luacell_frame_init(luacell_frame *) __asm__("zmq_msg_init");
int luacell_frame_receive(luacell_frame *, void *socket, int flags) __asm__("zmq_msg_recv");
void *luacell_frame_data(luacell_frame *) __asm__("zmq_msg_data");
size_t luacell_frame_size(const luacell_frame *) __asm__("zmq_msg_size");
int luacell_frame_close(luacell_frame *) __asm__("zmq_msg_close");
int luacell_send(void *socket, const void *, size_t, int flags) __asm__("zmq_send");
int luacell_set_option(void *socket, int option, const void *, size_t) __asm__("zmq_setsockopt");
]]

local zmq = ffi.load(library)
local RCVTIMEO, EAGAIN, EINTR = 27, 11, 4
local PREAMBLE_SIZE = 8

local socket = cast("void *", cast("uintptr_t", socket_address))
local record = cast("uint8_t *", cast("uintptr_t", record_address))
local reply = cast("uint8_t *", cast("uintptr_t", reply_address))
local frame = ffi.new("luacell_frame")
local head = ffi.new("uint64_t[1]")
copy(head, execute_head, PREAMBLE_SIZE)
local record_size = message_size - PREAMBLE_SIZE
local timeout = ffi.new("int[1]")
local is_guarded = false
local is_waiting_for_map = false

-- While the timer may be running, receiving wakes up to stop it.
local function set_guarded(guarded)
  if guarded == is_guarded then return end
  is_guarded = guarded
  timeout[0] = guarded and idle_ms or -1
  zmq.luacell_set_option(socket, RCVTIMEO, timeout, 4)
end

local function answer()
  while zmq.luacell_send(socket, reply, reply_size, 0) < 0 do
    if errno() ~= EINTR then error("zmq_send failed with errno " .. errno(), 0) end
  end
end

-- Returns address and size of a message for the process, which must call `done_with` afterwards; or nothing when a
-- call names a pair that is not mapped: when it is, `serve` goes on with that call.
local function serve()
  if is_waiting_for_map then
    if not execute(0) then return end
    is_waiting_for_map = false
    answer()
  end
  while true do
    zmq.luacell_frame_init(frame)
    if zmq.luacell_frame_receive(frame, socket, 0) < 0 then
      local code = errno()
      if code == EAGAIN then
        disarm()
        set_guarded(false)
      elseif code ~= EINTR then
        error("zmq_msg_recv failed with errno " .. code, 0)
      end
    else
      local data, size = cast("uint8_t *", zmq.luacell_frame_data(frame)), tonumber(zmq.luacell_frame_size(frame))
      if size ~= message_size or cast("uint64_t *", data)[0] ~= head[0] then
        set_guarded(true)
        return tonumber(cast("uintptr_t", data)), size
      end
      copy(record, data + PREAMBLE_SIZE, record_size)
      zmq.luacell_frame_close(frame)
      set_guarded(true)
      if not execute(0) then
        is_waiting_for_map = true
        return
      end
      answer()
    end
  end
end

return { serve = serve, done_with = function() zmq.luacell_frame_close(frame) end }
