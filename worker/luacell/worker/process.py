"""The worker process: from its fork to its death, one contract, one call at a time.

It connects, confines itself, reports that it is blank, is given a contract, and then answers calls until it is
killed. It never exits in an orderly way: finalizers of a Lua state may hang. What it says is checked by the broker.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from luacell.protocol import headers, messages, zmtp
from luacell.protocol.api import ApiError, find_contract, parse
from luacell.protocol.confinement import UNTRUSTED, Confinement, stricter, written
from luacell.protocol.errors import AbiErrorCode, ProtocolError
from luacell.protocol.headers import Op
from luacell.protocol.limits import (
    CALLS_PER_MESSAGE_MAX,
    CARRY_LIMIT_NS,
    LOAD_LIMIT_NS,
    MESSAGE_MAX,
    MIB,
    NS_PER_S,
    STATE_MAX,
)
from luacell.protocol.memory.channel import ChannelClosed, close_all, receive_message
from luacell.protocol.memory.segments import Mapping
from luacell.protocol.memory.stream import connect_stream
from luacell.protocol.messages import API_MODULE, decode, encode, id_of
from luacell.protocol.slots import DONE_OFFSET, PAYLOAD_OFFSET, SLOT_SHIFT, read_answer
from luacell.worker.binding import binding_source
from luacell.worker.raw_binding import raw_binding_source
from luacell.worker.sandbox import memory
from luacell.worker.sandbox.attributes import SandboxUnavailable, die_with_parent, limit_memory, trim_heap
from luacell.worker.sandbox.levels import Preparation, Sandbox
from luacell.worker.vm import OutOfLuaMemory, Vm

CONNECT_LIMIT_S: Final = 5.0
MAP_LIMIT_S: Final = 5.0  # a pair named by a call is on its way already
IDLE_BEFORE_DISARM_MS: Final = 500
DESCRIPTORS_MAX: Final = 1024  # as usual; the worker host has raised its own
_UNBUFFERED: Final = 2  # _IONBF of stdio.h
EXIT_BROKEN: Final = 70  # the worker itself cannot go on (EX_SOFTWARE)
OUT_OF_MEMORY_TEXT: Final = b"Lua exception: not enough memory"
_LATE: Final = frozenset({Op.RESULT_INLINE, Op.PIECE, Op.MORE, Op.FAILURE, Op.REPLY})  # for whom nobody waits any more
STATM_SIZE: Final = 128  # bytes; seven numbers
# Bytes that nobody touches: given back when a contract has left no memory, so that Python, which asks for 1 MiB at a
# time, can say so.
RESERVE_SIZE: Final = 4 * MIB
_INBOX_SIZE: Final = MESSAGE_MAX + (64 << 10)  # bytes; the largest message, and what has come with its end
LARGE_MESSAGE: Final = 64 << 10  # bytes; such as a registration's source, which comes once
_FRAME_HEAD: Final = 16  # bytes before the reply, of which the head of a frame takes the last 2 or 9
_RECORD_SIZE: Final = headers.EXECUTE.size
_POSITION_MASK: Final = (1 << SLOT_SHIFT) - 1


_PANIC: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)  # lua_CFunction


class _ManySingletons(Exception):
    """A contract of one instance is to have several workers."""


class _Progress(ctypes.Structure):
    """How far serve.lua is: the call that it runs, those at hand, and answers that are not sent."""

    _fields_ = (("position", ctypes.c_uint32), ("count", ctypes.c_uint32), ("unsent", ctypes.c_uint32))


class WorkerProcess:
    """One worker.

    Args:
        broker_socket: path of the ROUTER.
        routing_id: the identity the broker gave us.
        channel: our end of the socketpair.
        sandbox: what has begun to confine this process.
        c_modules: paths of C modules that are loaded already, for contracts that cannot load any.
        statm: descriptor of this process's /proc/self/statm; -1 where there is none.
    """

    def __init__(
        self,
        broker_socket: Path,
        routing_id: bytes,
        channel: socket.socket,
        sandbox: Sandbox,
        c_modules: Sequence[str],
        statm: int,
    ) -> None:
        self._sandbox = sandbox
        self._c_modules = c_modules
        self._statm = statm
        self._channel = channel
        self._channel.settimeout(MAP_LIMIT_S)
        self._pairs: dict[tuple[int, int], tuple[Mapping, Mapping, int]] = {}  # args, out, stride of out
        self._records = ctypes.create_string_buffer(CALLS_PER_MESSAGE_MAX * headers.EXECUTE.size)
        reply_size = headers.PREAMBLE_SIZE + CALLS_PER_MESSAGE_MAX * headers.DONE.size
        self._reply = ctypes.create_string_buffer(_FRAME_HEAD + reply_size)
        self._limits = memory.UNLIMITED  # until there is a contract
        self._reserve = mmap.mmap(-1, RESERVE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._progress = _Progress()
        self._reply_view = memoryview(self._reply).cast("B")[_FRAME_HEAD:]
        self._reply_address = ctypes.addressof(self._reply) + _FRAME_HEAD
        self._inbox = mmap.mmap(-1, _INBOX_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._inbox_address = ctypes.addressof(ctypes.c_char.from_buffer(self._inbox))
        self._vm = Vm(ctypes.addressof(self._records), self._reply_address + headers.PREAMBLE_SIZE)
        self._panic = _PANIC(self._end_without_memory)  # LuaJIT calls it, so it must live as long
        self._vm.set_panic(ctypes.cast(self._panic, ctypes.c_void_p).value)
        self._stream = connect_stream(broker_socket, routing_id, CONNECT_LIMIT_S)
        self._loop = self._make_loop()

    def run(self) -> NoReturn:
        """Serve until killed."""
        loop = self._loop
        sandbox = self._sandbox
        ready = messages.Ready(
            pid=os.getpid(),
            posture=written(sandbox.layers),
            sandbox=sandbox.confinement.level,
            c_modules="\n".join(self._c_modules),
        )
        self._send(encode(ready))
        while True:
            try:
                found = loop.serve()
                if found == "map":
                    self._receive_map()
                elif found == "retire":
                    _await_death()
                else:
                    self._handle(self._taken(*map(int, found)))
            except OutOfLuaMemory:
                self._answer_out_of_memory()
                _await_death()

    def _taken(self, address: int, size: int) -> bytes:
        """Return the message that lies there; the inbox does not keep the memory of a large one."""
        message = ctypes.string_at(address, size)
        page = mmap.PAGESIZE
        begin = address - self._inbox_address  # elsewhere, where it was set aside
        if size > LARGE_MESSAGE and 0 <= begin < _INBOX_SIZE:
            first, last = -(-begin // page) * page, (begin + size) // page * page
            self._inbox.madvise(mmap.MADV_DONTNEED, first, last - first)
        return message

    def _end_without_memory(self, _state: int) -> int:
        """Answer the running call before LuaJIT ends the process, which has no memory left for machine code."""
        if self._progress.position < self._progress.count:
            self._answer_out_of_memory()
            _await_death()
        return 0

    def _make_loop(self) -> Any:
        """Return the loop that runs inside LuaJIT; its buffers are ours."""
        self._reply_view[: headers.PREAMBLE_SIZE] = headers.head(Op.DONE)
        return self._vm.make_loop(
            self._stream.fileno(),
            self._inbox_address,
            _INBOX_SIZE,
            headers.head(Op.EXECUTE),
            ctypes.addressof(self._records),
            self._reply_address,
            ctypes.addressof(self._progress),
            IDLE_BEFORE_DISARM_MS,
        )

    def _send(self, message: bytes) -> None:
        """Say something that is no answer; waits where the broker is slow to read."""
        self._stream.sendall(zmtp.frame(message), socket.MSG_NOSIGNAL)

    def _handle(self, message: bytes) -> None:
        """Act on a message that has no calls."""
        op, _ = headers.parse_preamble(message)
        if op is Op.LOAD:
            self._load(decode(messages.Load, message))
        elif op is Op.UNMAP:
            self._unmap(decode(messages.Unmap, message))
        elif op is Op.FORGET:
            self._vm.forget(decode(messages.Forget, message).arena)
        elif op is Op.SAVE:
            self._save(decode(messages.Save, message))
        elif op is Op.RESTORE:
            self._restore(decode(messages.Restore, message))
        elif op not in _LATE:
            raise ProtocolError(f"operation {op.name}, or its size, is not for workers")

    def _answer_out_of_memory(self) -> None:
        """Answer in the VM's place, which has no memory left even for that, and must not be used again."""
        flags = headers.RETIRE | (headers.PROCESS_FULL if self._ran_out() else 0)
        progress = self._progress
        record = headers.Execute._make(headers.EXECUTE.unpack_from(self._records, progress.position * _RECORD_SIZE))
        sequence, slot = record.sequence, record.slot
        _, out, stride = self._pairs[record.arena, slot >> SLOT_SHIFT]
        start = (slot & _POSITION_MASK) * stride
        if progress.position < progress.count and read_answer(out.view, start).done != sequence:
            done = (sequence, int(AbiErrorCode.OUT_OF_MEMORY), 0, len(OUT_OF_MEMORY_TEXT), flags)
            payload = start + PAYLOAD_OFFSET
            out.view[payload : payload + len(OUT_OF_MEMORY_TEXT)] = OUT_OF_MEMORY_TEXT
            headers.DONE.pack_into(out.view, start + DONE_OFFSET, *done)  # the words behind `begun` have the same form
            headers.DONE.pack_into(self._reply_view, headers.PREAMBLE_SIZE + progress.unsent * headers.DONE.size, *done)
            progress.unsent += 1
        if progress.unsent:
            answers = self._reply_view[headers.PREAMBLE_SIZE :][: progress.unsent * headers.DONE.size]
            self._send(headers.head(Op.DONE, progress.unsent) + answers)

    def _load(self, load: messages.Load) -> None:
        self._vm.arm_for(LOAD_LIMIT_NS // NS_PER_S)
        try:
            problem, reason = "load", self._objection_to(load)
            if not reason:
                self._limits = memory.limits(self._use(), load.memory, load.max_rss)
                limit_memory(*self._limits)
                self._vm.limit_memory(load.memory, self._limits.data, resource.getpagesize())
                problem, reason = self._vm.load(
                    load.source,
                    load.chunk_name,
                    load.modules,
                    load.memory,
                    *_bindings_of(load),
                    sandbox=self._sandbox.confinement.level,
                    c_modules=self._c_modules,
                )
                if not problem and (reason := self._excess(load.max_rss)):
                    problem = "load"
                self._vm.limit_wear(load.max_calls, -(-load.max_rss // resource.getpagesize()), self._statm)
        except (ApiError, _ManySingletons) as error:
            problem, reason = "load", str(error)
        except OutOfLuaMemory:
            bound = f"memory {load.memory / MIB:g} MiB"
            if self._ran_out():
                bound = f"process memory {memory.headroom(load.memory, load.max_rss) / MIB:g} MiB"
            problem, reason = "load", f"it used more than its {bound} while loading"
        loaded = messages.Loaded(
            problem=problem,
            reason=reason[: messages.REASON_MAX],
            saves=not problem and self._vm.saves,
            restores=not problem and self._vm.restores,
        )
        self._send(encode(loaded))
        if problem:
            _await_death()

    def _use(self) -> memory.Use:
        """Return what this process has of memory by now."""
        statm = os.pread(self._statm, STATM_SIZE, 0) if self._statm >= 0 else b""
        return memory.use(statm, resource.getpagesize())

    def _ran_out(self) -> bool:
        """Make room to tell that Lua could have no memory; return whether the process had no more, or its Lua heap."""
        self._reserve.close()
        return memory.is_full(self._use(), self._limits.less(RESERVE_SIZE), self._vm.heap_left)

    def _excess(self, max_rss: int) -> str:
        """Tell why the contract, which has loaded, is too large to be served, or ""; frees what only loading took."""
        if memory.excess(self._use(), max_rss):
            self._vm.collect()
            trim_heap()
        return memory.excess(self._use(), max_rss)

    def _save(self, asked: messages.Save) -> None:
        """Give the state of the singleton to the broker, for the worker that follows this one."""
        self._vm.arm_for(CARRY_LIMIT_NS // NS_PER_S)
        state, problem = self._vm.save(STATE_MAX)
        self._send(encode(messages.Saved(state=state, problem=problem[: messages.REASON_MAX])))
        _await_death()

    def _restore(self, given: messages.Restore) -> None:
        """Take up the state of the worker before this one."""
        self._vm.arm_for(CARRY_LIMIT_NS // NS_PER_S)
        problem = self._vm.restore(given.state)
        self._vm.disarm()
        self._send(encode(messages.Restored(problem=problem[: messages.REASON_MAX])))
        if problem:
            _await_death()

    def _objection_to(self, load: messages.Load) -> str:
        """Tell why a contract must not run here, or ""; whoever gave it to this worker has not the last word."""
        mine = self._sandbox.confinement
        wanted = Confinement(load.sandbox, load.read, load.write, load.network)
        if self._sandbox.objection:
            return self._sandbox.objection
        if wanted.at_least(mine.level).objection():
            return f"{wanted.at_least(mine.level).objection()} (the service's floor is {mine.level!r})"
        if stricter(mine.level, wanted.level) != mine.level or wanted[1:] != mine[1:]:
            return f"it is to be confined as {wanted}, its worker is as {mine}"
        if mine.level == UNTRUSTED and API_MODULE not in load.modules:
            return f"sandbox level {UNTRUSTED!r} is for typed contracts only: raw ones need FFI; give it an api.toml"
        return ""

    def _receive_map(self) -> None:
        message, descriptors = receive_message(self._channel)
        try:
            op, _ = headers.parse_preamble(message)
            if op is not Op.MAP or len(descriptors) != 2:
                raise ProtocolError(f"operation {op.name} with {len(descriptors)} descriptors is not expected")
            self._map(decode(messages.Map, message), *descriptors)
        finally:
            close_all(descriptors)

    def _map(self, pair: messages.Map, args_fd: int, out_fd: int) -> None:
        args = Mapping(args_fd, pair.count * pair.args_stride, writable=False)
        out = Mapping(out_fd, pair.count * pair.out_stride, writable=True)
        self._pairs[pair.arena, pair.index] = args, out, pair.out_stride
        self._vm.add_pair(
            pair.arena, pair.index, args.address, out.address, pair.count, pair.args_stride, pair.out_stride
        )

    def _unmap(self, pair: messages.Unmap) -> None:
        mappings = self._pairs.pop((pair.arena, pair.index), None)
        if mappings is None:  # MAP was sent, but no call has made us read it
            self._receive_map()
            mappings = self._pairs.pop((pair.arena, pair.index))
        self._vm.remove_pair(pair.arena, pair.index)
        args, out, _ = mappings
        args.close()
        out.close()


def _bindings_of(load: messages.Load) -> tuple[str | None, Callable[[], str] | None]:
    """Return the binding of a typed contract, and what makes that of a raw function; Nones for a raw contract.

    Raises:
        ApiError: its description is malformed, or does not describe it.
        _ManySingletons: it is a singleton and is to have several workers.
    """
    text = load.modules.get(API_MODULE)
    if text is None:
        return None, None
    api = parse(text.decode("utf-8", "replace"), "api.toml")
    contract = find_contract(api, id_of(load.contract))
    if contract.singleton and load.workers > 1:
        raise _ManySingletons(f"{contract} is a singleton, which has one worker, not {load.workers}")
    return binding_source(contract, api.enums), lambda: raw_binding_source(contract)


def _await_death() -> NoReturn:
    """Do nothing more: the broker has been told, and ends us. LuaJIT without memory would do it before it has heard."""
    while True:
        signal.pause()


def unbuffer_stdio() -> None:
    """Let C write at once what a contract prints: what it said before it crashed is what people need.

    Called in the worker host, for its workers.
    """
    libc = ctypes.CDLL(None)
    for name in ("stdout", "stderr"):
        libc.setvbuf(ctypes.c_void_p.in_dll(libc, name), None, _UNBUFFERED, ctypes.c_size_t(0))


def run_worker(
    parent_pid: int,
    broker_socket: Path,
    routing_id: bytes,
    channel: socket.socket,
    output: tuple[int, int],
    preparation: Preparation,
    c_modules: Sequence[str] = (),
) -> NoReturn:
    """Be a worker, right after the fork; never returns.

    Args:
        parent_pid: of the worker host.
        broker_socket: path of the ROUTER.
        routing_id: the identity the broker gave us.
        channel: our end of the socketpair.
        output: pipes to become stdout and stderr.
        preparation: of its sandbox; stays the worker host's.
        c_modules: paths of C modules that the worker host has loaded.
    """
    try:
        die_with_parent(parent_pid)
        for descriptor, pipe in zip((1, 2), output, strict=True):
            os.dup2(pipe, descriptor)
        ruleset = preparation.ruleset
        _become_quiet(channel.fileno(), *(() if ruleset is None else (ruleset.descriptor,)))
        statm = _open_statm()
        sandbox = Sandbox(preparation)
        sandbox.begin()
        preparation.close()
        process = WorkerProcess(broker_socket, routing_id, channel, sandbox, c_modules, statm)
        sandbox.finish()
        process.run()
    except (ChannelClosed, ProtocolError, OSError, ValueError, SandboxUnavailable) as error:
        os.write(2, f"luacell worker {os.getpid()}: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(EXIT_BROKEN)


def _open_statm() -> int:
    """Return a descriptor that tells of this process's memory, later too when no file can be opened; -1 for none."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _become_quiet(*kept: int) -> None:
    """Drop what was inherited: signal handlers, descriptors but for those to be kept, the working directory."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    first = 3
    for descriptor in sorted(kept):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, min(limit, 1 << 20))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The hard limit too: pipes and messages under way are the kernel's memory, which no other limit counts.
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTORS_MAX, hard),) * 2)
    os.chdir("/")
