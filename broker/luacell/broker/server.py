"""The broker's loop: one ROUTER, one blocking receive; events go to the dispatcher, effects come back and are done.

It owns the sockets and the order of things: hosts and workers speak over the ROUTER, what the watcher thread hears
arrives there as well. Nothing here decides about calls; every send is non-blocking, because a send that waits for a
dead peer would stop the service for all.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from struct import Struct
from typing import Any, Final

import zmq

from luacell.broker import model
from luacell.broker.books import Books, Pair, PairState, Refusal
from luacell.broker.causes import UNKNOWN, Cause
from luacell.broker.dispatcher import Dispatcher
from luacell.broker.model import Effect, Request, SendFailure, SendReply, Worker
from luacell.broker.registry import ContractRecord, Registry
from luacell.broker.rundir import RunDirectory
from luacell.broker.store import SegmentStore, create_descriptors
from luacell.broker.watcher import Connected, Disconnected, Ended, Received, Watcher, WorkDone
from luacell.protocol import headers, messages
from luacell.protocol.errors import AbiErrorCode, ProtocolError
from luacell.protocol.headers import Op
from luacell.protocol.limits import MESSAGE_MAX, NS_PER_MS, SESSIONS_MAX
from luacell.protocol.memory.channel import (
    ChannelClosed,
    close_all,
    peer_pidfd,
    send_message,
)
from luacell.protocol.messages import ROUTING_ID_SIZE, decode, encode, id_of
from luacell.protocol.slots import SlotShape

log = logging.getLogger("luacell.broker")

HIGH_WATER_MARK: Final = 4096  # messages per peer; four times what a host may have in flight
TICK_IDLE_MS: Final = 1000
TICK_BUSY_MS: Final = 20  # while something has a deadline: lateness of a deadline, far below the promise of 250 ms
TIME_STEP_NS: Final = 4 * NS_PER_MS  # between looks at the deadlines while messages keep coming
CLOSING_WAIT_NS: Final = 20 * NS_PER_MS  # a dying process closes its descriptors just before its pidfd tells
CAUSE_WAIT_NS: Final = 250 * NS_PER_MS  # a pidfd may be faster than the worker host's report of the cause
GREETINGS_MAX: Final = 256  # descriptor channels that have not said who they are

_SEND_FIRST: Final = int(zmq.SNDMORE | zmq.NOBLOCK)  # plain integers: pyzmq's enums cost microseconds
_SEND_LAST: Final = int(zmq.NOBLOCK)
_send: Final = zmq.backend.Socket.send  # without the wrapper's handling of options that we do not use
_CALL_HEAD: Final = headers.head(Op.CALL)
_CALL_SIZE: Final = headers.PREAMBLE_SIZE + headers.CALL.size
_DONE_HEAD: Final = headers.head(Op.DONE)
_DONE_SIZE: Final = headers.PREAMBLE_SIZE + headers.DONE.size
_PREAMBLE_SIZE: Final = headers.PREAMBLE_SIZE
_unpack_call: Final = headers.CALL.unpack_from
_unpack_done: Final = headers.DONE.unpack_from
_new_call: Final = partial(tuple.__new__, headers.Call)  # NamedTuple._make without its frame
_new_done: Final = partial(tuple.__new__, headers.Done)
_EXECUTE: Final = Struct(f"<{headers.PREAMBLE_SIZE}s" + headers.EXECUTE.format.removeprefix("<"))
_EXECUTE_HEAD: Final = headers.head(Op.EXECUTE)
_RESULT: Final = Struct(f"<{headers.PREAMBLE_SIZE}s" + headers.RESULT.format.removeprefix("<"))
_RESULT_HEAD: Final = headers.head(Op.RESULT)


@dataclass(slots=True, eq=False)
class HostLink:
    """A local host: its descriptor channel and its pidfd."""

    routing_id: bytes
    channel: socket.socket
    pidfd: int


@dataclass(slots=True, eq=False)
class WorkerLink:
    """What the broker holds of a worker process: a pidfd and one end of its socketpair."""

    worker: Worker
    pidfd: int
    channel: socket.socket
    closed_ns: int = 0  # when the socketpair was found closed
    died_ns: int = 0  # when the pidfd reported its death, while the cause is awaited


class Server:
    """One broker.

    Args:
        run_directory: held by this process; the server binds its sockets there.
        spares: blank workers to keep.
    """

    def __init__(self, run_directory: RunDirectory, spares: int) -> None:
        self._run_directory = run_directory
        self._epoch = secrets.token_bytes(8)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._store = SegmentStore()
        self._books = Books()
        self._registry = Registry()
        self._dispatcher = Dispatcher(self._store, self._books, self._registry, _new_routing_id, spares)
        self._workforce = self._dispatcher.workforce
        self._workers = self._workforce.by_routing_id
        self._sessions = self._dispatcher.sessions
        self._watcher_id = _new_routing_id()
        self._listener = run_directory.listen()
        self._greeting: dict[socket.socket, None] = {}  # in order of arrival
        self._hosts: dict[bytes, HostLink] = {}
        self._host_of_channel: dict[socket.socket, HostLink] = {}
        self._links: dict[int, WorkerLink] = {}
        self._ready_early: set[Worker] = set()
        self._worker_host: socket.socket | None = None
        self._closing: dict[int, WorkerLink] = {}
        self._dying: dict[int, WorkerLink] = {}
        self._tick_ms = 0  # how long `recv` waits
        self._tick_ns = 0  # when to look at deadlines next
        self._bind()
        self._watcher = Watcher(self._context, "inproc://watcher", self._watcher_id, self._listener)
        self._from_host: dict[Op, Callable[[bytes, int, bytes], None]] = {
            Op.CALL: self._on_call,
            Op.CANCEL: self._on_cancel,
            Op.HELLO: self._on_hello,
            Op.REGISTER: self._on_register,
            Op.UNREGISTER: self._on_unregister,
            Op.LIST: self._on_list,
            Op.HEALTH: self._on_health,
            Op.LEASE: self._on_lease,
            Op.MAPPED: self._on_mapped,
            Op.GIVE_BACK: self._on_give_back,
            Op.BYE: self._on_bye,
        }
        self._performers: dict[type[Any], Callable[[Any], None]] = {
            model.SendCall: self._send_call,
            model.SendResult: self._send_result,
            model.SendFailure: self._send_failure,
            model.SendReleased: self._send_released,
            model.SendReply: self._send_reply,
            model.StartWorker: self._start_worker,
            model.LoadWorker: self._load_worker,
            model.KillWorker: self._kill_worker,
            model.DropPair: lambda effect: self._drop_pair(effect.pair),
            model.Record: _write_record,
        }

    def _bind(self) -> None:
        router = self._router
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.ROUTER_HANDOVER, 0)
        router.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        router.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        router.setsockopt(zmq.MAXMSGSIZE, MESSAGE_MAX)
        router.setsockopt(zmq.HANDSHAKE_IVL, 2000)
        router.setsockopt(zmq.LINGER, 0)
        router.bind("inproc://watcher")
        previous = os.umask(0o177)
        try:
            router.bind(f"ipc://{self._run_directory.broker_socket}")
        finally:
            os.umask(previous)

    def run(self) -> None:
        """Serve until an exception ends it (the signal handlers and `stop` raise SystemExit)."""
        self._watcher.start()
        receive, clock = self._router.recv, time.monotonic_ns
        while True:
            try:
                peer = receive()
                message = receive()  # a ROUTER gives every message at least one frame behind the identity
            except zmq.Again:
                self._pass_time(clock())
                self._choose_tick()
                continue
            now_ns = clock()
            self._handle(peer, message, now_ns)
            if now_ns >= self._tick_ns:
                self._pass_time(now_ns)

    def stop(self) -> None:
        """Make `run` raise SystemExit; may be called from another thread."""
        self._watcher.order(lambda: WorkDone(_leave_loop))

    def close(self) -> None:
        """Close every socket, descriptor and mapping."""
        self._watcher.stop()
        for host in list(self._hosts.values()):
            self._close_host(host)
        for link in list(self._links.values()):
            self._close_link(link)
        for channel in [*self._greeting, *([self._worker_host] if self._worker_host else [])]:
            channel.close()
        self._watcher.close()
        self._listener.close()
        self._store.close()
        self._router.close()
        self._context.term()

    # -- the loop -------------------------------------------------------------------------------------------------
    def _choose_tick(self) -> None:
        """After a quiet tick: wake up often only while something has a deadline."""
        is_quiet = self._dispatcher.next_deadline() is None and not self._dying and not self._closing
        self._set_tick(TICK_IDLE_MS if is_quiet else TICK_BUSY_MS)

    def _set_tick(self, tick_ms: int) -> None:
        if tick_ms != self._tick_ms:
            self._tick_ms = tick_ms
            self._router.setsockopt(zmq.RCVTIMEO, tick_ms)

    def _pass_time(self, now_ns: int) -> None:
        """Act on deadlines; at most once per TIME_STEP_NS while messages keep coming."""
        self._tick_ns = now_ns + TIME_STEP_NS
        next_ns = self._dispatcher.next_deadline()
        if next_ns is not None and next_ns <= now_ns:
            self._perform(self._dispatcher.time_passed(now_ns))
        if self._closing:
            for link in [link for link in self._closing.values() if now_ns - link.closed_ns >= CLOSING_WAIT_NS]:
                del self._closing[link.worker.id]
                self._perform(self._dispatcher.worker_lost(link.worker, now_ns))
        if self._dying:
            for link in [link for link in self._dying.values() if now_ns - link.died_ns >= CAUSE_WAIT_NS]:
                self._worker_died(link.worker, UNKNOWN)

    def _handle(self, peer: bytes, message: bytes, now_ns: int) -> None:
        """Act on one message; the two kinds that make up a call are recognised by size and first bytes."""
        if self._tick_ms != TICK_BUSY_MS:
            self._set_tick(TICK_BUSY_MS)
        dispatcher = self._dispatcher
        worker = self._workers.get(peer)
        if worker is not None and len(message) == _DONE_SIZE and message.startswith(_DONE_HEAD):
            done = _new_done(_unpack_done(message, _PREAMBLE_SIZE))
            call = dispatcher.quick_done(worker, done)
            if call is not None:
                self._send_answer(call, done.code, done.out_size, done.error_size, headers.SLOT_FREE)
            else:
                self._perform(dispatcher.worker_done(worker, done, now_ns))
        elif len(message) == _CALL_SIZE and message.startswith(_CALL_HEAD) and peer in self._sessions:
            header = _new_call(_unpack_call(message, _PREAMBLE_SIZE))
            call = dispatcher.quick_call(peer, header, now_ns)
            if call is not None:
                self._send_execute(call)
            else:
                self._perform(dispatcher.call_arrived(peer, header, now_ns))
        elif peer == self._watcher_id:
            for item in self._watcher.take():
                self._on_item(item)
        else:
            self._handle_other(peer, message, worker)

    def _handle_other(self, peer: bytes, message: bytes, worker: Worker | None) -> None:
        """Act on a message that is not one of the two; find back into step where it is none at all."""
        if worker is None and peer not in self._hosts:
            self._find_step(peer, message)
            return
        try:
            op, count = headers.parse_preamble(message)
            if worker is not None:
                self._on_worker_message(worker, op, count, message)
            else:
                self._on_host_message(peer, op, count, message)
        except ProtocolError as error:
            self._find_step(peer, message)
            self._refuse_peer(peer, str(error))

    def _find_step(self, peer: bytes, message: bytes) -> None:
        """Deal with frames that are not (identity, one frame).

        Frames are read in pairs without asking libzmq for the end of each message, which would cost a tenth of the
        loop. A peer that sends a message of two frames shifts the pairs: its second frame is taken for an identity and
        the next message's identity for a frame. Routing ids are random and made by this broker, so both are
        recognised here: the rest of the malformed message is dropped, the next one is handled as what it is.
        """
        more = bool(self._router.getsockopt(zmq.RCVMORE))
        if more and (message in self._workforce.by_routing_id or message in self._hosts or message == self._watcher_id):
            self._handle(message, self._router.recv(), time.monotonic_ns())
            return
        while more:
            self._router.recv()
            more = bool(self._router.getsockopt(zmq.RCVMORE))
        if peer not in self._hosts and peer not in self._workforce.by_routing_id:
            self._refuse_peer(peer, "unknown peer: connect to the descriptor socket first")

    def _perform(self, effects: Iterable[Effect]) -> None:
        performers = self._performers
        for effect in effects:
            performers[type(effect)](effect)

    def _send(self, peer: bytes, message: bytes) -> bool:
        """Send without waiting; tell whether it left."""
        router = self._router
        try:
            _send(router, peer, _SEND_FIRST)
            _send(router, message, _SEND_LAST)
        except zmq.ZMQError as error:
            self._not_sent(peer, error)
            return False
        return True

    def _not_sent(self, peer: bytes, error: zmq.ZMQError) -> None:
        """A peer that is gone is not missed, its death will be told; one that does not read must go."""
        if error.errno == zmq.EAGAIN:
            log.warning("peer does not read; dropping it", extra={"fields": {"peer": peer.hex()}})
            self._expel(peer)
        elif error.errno != zmq.EHOSTUNREACH:
            raise error

    def _expel(self, peer: bytes) -> None:
        if peer in self._hosts:
            self._host_left(peer)
        elif (worker := self._workforce.by_routing_id.get(peer)) is not None:
            self._perform(self._dispatcher.worker_lost(worker, time.monotonic_ns()))

    def _refuse_peer(self, peer: bytes, reason: str) -> None:
        """Answer something that is no valid message: hosts are told, workers must go."""
        worker = self._workforce.by_routing_id.get(peer)
        if worker is not None:
            log.warning("worker broke the protocol", extra={"fields": {"worker": worker.id, "reason": reason}})
            self._perform(self._dispatcher.worker_lost(worker, time.monotonic_ns()))
        else:
            self._send_failure(SendFailure(peer, 0, AbiErrorCode.BAD_REQUEST, reason))

    # -- what hosts say -------------------------------------------------------------------------------------------
    def _on_host_message(self, peer: bytes, op: Op, count: int, message: bytes) -> None:
        handler = self._from_host.get(op)
        if handler is None:
            raise ProtocolError(f"operation {op.name} is not for hosts")
        if peer not in self._dispatcher.sessions and op is not Op.HELLO:
            raise ProtocolError(f"operation {op.name} before HELLO")
        handler(peer, count, message)

    def _on_call(self, peer: bytes, count: int, message: bytes) -> None:
        now_ns = time.monotonic_ns()
        for record in headers.parse_records(Op.CALL, count, message):
            if peer not in self._hosts:  # expelled in the middle: it does not read what it is answered
                return
            self._perform(self._dispatcher.call_arrived(peer, headers.Call._make(record), now_ns))

    def _on_cancel(self, peer: bytes, count: int, message: bytes) -> None:
        now_ns = time.monotonic_ns()
        for (call_id,) in headers.parse_records(Op.CANCEL, count, message):
            if peer not in self._hosts:
                return
            self._perform(self._dispatcher.call_cancelled(peer, call_id, now_ns))

    def _on_hello(self, peer: bytes, count: int, message: bytes) -> None:
        role = decode(messages.Hello, message).role
        if role != "host":
            raise ProtocolError(f"role {role!r} is not 'host'; nobody else speaks here")
        self._dispatcher.host_joined(peer)
        self._send(peer, encode(messages.Welcome(routing_id=b"", epoch=self._epoch, broker_pid=os.getpid())))

    def _on_register(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Register, message)
        request = Request(peer, asked.request_id)
        try:
            record = ContractRecord.from_message(asked, peer)
        except ValueError as error:
            self._send_reply(SendReply(request, "BadRequest", AbiErrorCode.BAD_REQUEST, str(error)))
            return
        effects: list[Effect] = []
        now_ns = time.monotonic_ns()
        self._dispatcher.catalogue.register(request, record, replace=asked.replace, now_ns=now_ns, effects=effects)
        self._perform(effects)

    def _on_unregister(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Unregister, message)
        contract_id = id_of(asked.contract)
        request = Request(peer, asked.request_id)
        contract = self._dispatcher.catalogue.serving.get(contract_id)
        if contract is None or contract.record.owner not in (None, peer):
            self._send_reply(_not_found(request))
            return
        self._perform(self._dispatcher.unregister(contract_id, time.monotonic_ns()))
        self._send_reply(SendReply(request))

    def _on_list(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.List, message)
        page, total = self._registry.page(asked.first)
        self._send_reply(SendReply(Request(peer, asked.request_id), body={"contracts": page, "total": total}))

    def _on_health(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Health, message)
        body = self._dispatcher.snapshot() | {"epoch": self._epoch.hex(), "broker_pid": os.getpid()}
        self._send_reply(SendReply(Request(peer, asked.request_id), body=body))

    def _on_lease(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Lease, message)
        request = Request(peer, asked.request_id)
        contract_id = id_of(asked.contract)
        contract = self._dispatcher.catalogue.serving.get(contract_id)
        if contract is None or contract.record.owner not in (None, peer):
            self._send_reply(_not_found(request))
            return
        shape = SlotShape.for_payloads(asked.args_size, asked.out_size, asked.count)
        pair = self._books.plan_pair(peer, contract_id, shape)
        if isinstance(pair, Refusal):
            self._send_reply(SendReply(request, "Busy", pair.code, pair.message))
            return
        deadline_us = contract.record.settings.deadline_us
        self._watcher.order(lambda: self._create(request, pair, deadline_us))

    def _create(self, request: Request, pair: Pair, deadline_us: int) -> WorkDone:
        """Allocate a pair's memory; runs in the watcher thread."""
        try:
            args_fd, out_fd = create_descriptors(pair.shape)
        except OSError as error:
            reason = f"no memory for {pair.shape.total_bytes} bytes: {error.strerror}"
            return WorkDone(lambda: self._refuse_pair(request, pair, reason))
        return WorkDone(lambda: self._grant(request, pair, deadline_us, args_fd, out_fd))

    def _refuse_pair(self, request: Request, pair: Pair, reason: str) -> None:
        if pair.state is PairState.PLANNED:
            self._books.abandon(pair)
        self._send_reply(SendReply(request, "Busy", AbiErrorCode.BUSY, reason))

    def _grant(self, request: Request, pair: Pair, deadline_us: int, args_fd: int, out_fd: int) -> None:
        host = self._hosts.get(request.session_id)
        if host is None or pair.state is not PairState.PLANNED:  # the host left meanwhile
            close_all([args_fd, out_fd])
            return
        try:
            self._store.add(pair, args_fd, out_fd)
        except OSError as error:
            self._refuse_pair(request, pair, str(error))
            return
        pair.state = PairState.GRANTED
        shape = pair.shape
        granted = messages.Segment(
            request_id=request.request_id,
            arena=pair.arena.id,
            index=pair.index,
            count=shape.count,
            args_stride=shape.args_stride,
            out_stride=shape.out_stride,
            deadline_us=deadline_us,
        )
        try:
            send_message(host.channel, encode(granted), [args_fd, out_fd])
        except (ChannelClosed, OSError):
            self._host_left(request.session_id)

    def _on_mapped(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Mapped, message)
        pair = self._books.pair_of(peer, asked.arena, asked.index)
        if isinstance(pair, Refusal) or pair.state is not PairState.GRANTED:
            raise ProtocolError(f"pair {asked.index} of arena {asked.arena} was not granted to this host")
        try:
            self._store.seal(pair)
        except OSError as error:  # the host holds the segment too, and has sealed it its own way
            self._host_left(peer)
            raise ProtocolError(f"pair {asked.index} of arena {asked.arena} cannot be sealed: {error}") from None
        self._books.mapped(pair)

    def _on_give_back(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.GiveBack, message)
        pair = self._books.pair_of(peer, asked.arena, asked.index)
        if isinstance(pair, Refusal):
            raise ProtocolError(pair.message)
        if self._books.retire(pair):
            self._drop_pair(pair)

    def _on_bye(self, peer: bytes, count: int, message: bytes) -> None:
        decode(messages.Bye, message)
        self._host_left(peer)

    def _host_left(self, peer: bytes) -> None:
        host = self._hosts.pop(peer, None)
        if host is None:
            return
        self._perform(self._dispatcher.host_left(peer, time.monotonic_ns()))
        self._close_host(host)

    def _close_host(self, host: HostLink) -> None:
        self._host_of_channel.pop(host.channel, None)
        self._watcher.forget_channel(host.channel)
        self._watcher.forget_end(host.pidfd)
        host.channel.close()
        os.close(host.pidfd)

    # -- what workers say -----------------------------------------------------------------------------------------
    def _on_worker_message(self, worker: Worker, op: Op, count: int, message: bytes) -> None:
        now_ns = time.monotonic_ns()
        if op is Op.DONE:
            for record in headers.parse_records(op, count, message):
                self._perform(self._dispatcher.worker_done(worker, headers.Done._make(record), now_ns))
        elif op is Op.LOADED:
            loaded = decode(messages.Loaded, message)
            self._perform(self._dispatcher.worker_loaded(worker, loaded.problem, loaded.reason, now_ns))
        elif op is Op.READY:
            decode(messages.Ready, message)
            if worker.id in self._links:
                self._perform(self._dispatcher.worker_ready(worker, now_ns))
            else:  # the worker host's report of its descriptors is on the other channel, still on its way
                self._ready_early.add(worker)
        else:
            raise ProtocolError(f"operation {op.name} is not for workers")

    # -- what the watcher hears -----------------------------------------------------------------------------------
    def _on_item(self, item: object) -> None:
        match item:
            case Received(channel, message, descriptors):
                self._on_descriptor_message(channel, message, descriptors)
            case Ended("worker", WorkerLink() as link):
                self._on_worker_end(link)
            case Ended("socketpair", WorkerLink() as link):
                if self._links.get(link.worker.id) is link:
                    link.closed_ns = time.monotonic_ns()
                    self._closing[link.worker.id] = link
            case Ended("host", bytes() as peer):
                self._host_left(peer)
            case Disconnected(channel, reason):
                self._on_disconnected(channel, reason)
            case Connected(channel):
                self._on_connected(channel)
            case WorkDone(tell):
                tell()

    def _on_connected(self, channel: socket.socket) -> None:
        if len(self._hosts) >= SESSIONS_MAX:
            self._refuse_channel(channel)
            return
        if len(self._greeting) >= GREETINGS_MAX:  # whoever has kept silent longest makes room
            self._refuse_channel(next(iter(self._greeting)))
        self._greeting[channel] = None

    def _refuse_channel(self, channel: socket.socket) -> None:
        self._greeting.pop(channel, None)
        self._watcher.forget_channel(channel)
        channel.close()

    def _on_disconnected(self, channel: socket.socket, reason: str) -> None:
        host = self._host_of_channel.get(channel)
        if host is not None:
            self._host_left(host.routing_id)
        elif channel is self._worker_host:
            self._worker_host_left(reason)
        else:
            self._greeting.pop(channel, None)
            channel.close()

    def _on_descriptor_message(self, channel: socket.socket, message: bytes, descriptors: list[int]) -> None:
        try:
            op, _ = headers.parse_preamble(message)
            if channel in self._greeting and op is Op.HELLO:
                self._greet(channel, decode(messages.Hello, message))
            elif channel is self._worker_host and op is Op.STARTED and len(descriptors) == 2:
                self._on_started(decode(messages.Started, message), *descriptors)
                descriptors = []
            elif channel is self._worker_host and op is Op.EXITED:
                self._on_exited(decode(messages.Exited, message))
            else:
                raise ProtocolError(f"operation {op.name} is not expected on this channel")
        except (ProtocolError, OSError, ChannelClosed) as error:
            log.warning("descriptor channel refused", extra={"fields": {"reason": str(error)}})
            self._watcher.forget_channel(channel)
            self._on_disconnected(channel, str(error))
        finally:
            close_all(descriptors)

    def _greet(self, channel: socket.socket, hello: messages.Hello) -> None:
        if hello.role == "worker-host":
            self._greet_worker_host(channel)
        elif hello.role == "host":
            self._greet_host(channel)
        else:
            raise ProtocolError(f"role {hello.role!r} is neither 'host' nor 'worker-host'")

    def _welcome(self, channel: socket.socket, routing_id: bytes) -> None:
        self._greeting.pop(channel, None)
        welcome = messages.Welcome(routing_id=routing_id, epoch=self._epoch, broker_pid=os.getpid())
        send_message(channel, encode(welcome))

    def _greet_host(self, channel: socket.socket) -> None:
        pidfd = peer_pidfd(channel)
        host = HostLink(_new_routing_id(), channel, pidfd)
        self._hosts[host.routing_id] = self._host_of_channel[channel] = host
        self._watcher.watch_end(pidfd, "host", host.routing_id)
        self._welcome(channel, host.routing_id)

    def _greet_worker_host(self, channel: socket.socket) -> None:
        if self._worker_host is not None:
            raise ProtocolError("this broker has a worker host already")
        self._worker_host = channel
        self._welcome(channel, b"")
        effects: list[Effect] = []
        self._workforce.host_joined(time.monotonic_ns(), effects)
        self._perform(effects)

    def _worker_host_left(self, reason: str) -> None:
        """Its workers die with it, by the kernel's hand; their pidfds will tell."""
        log.error("worker host is gone", extra={"fields": {"reason": reason}})
        channel, self._worker_host = self._worker_host, None
        self._perform(self._dispatcher.worker_host_left(time.monotonic_ns()))
        if channel is not None:
            channel.close()
        for link in list(self._dying.values()):
            self._worker_died(link.worker, UNKNOWN)
        for worker in [w for w in self._workforce.by_id.values() if w.id not in self._links]:
            self._worker_died(worker, Cause(problem="the worker host died while starting it"))

    def _on_started(self, started: messages.Started, pidfd: int, channel_fd: int) -> None:
        channel = socket.socket(fileno=channel_fd)
        channel.setblocking(False)
        worker = self._workforce.by_id.get(started.worker)
        if worker is None or worker.id in self._links:
            channel.close()
            os.close(pidfd)
            return
        worker.pid = started.pid
        link = self._links[worker.id] = WorkerLink(worker, pidfd, channel)
        self._watcher.watch_end(pidfd, "worker", link)
        self._watcher.watch_end(channel.fileno(), "socketpair", link)
        if worker in self._ready_early:
            self._ready_early.discard(worker)
            self._perform(self._dispatcher.worker_ready(worker, time.monotonic_ns()))

    def _on_exited(self, exited: messages.Exited) -> None:
        worker = self._workforce.by_id.get(exited.worker)
        if worker is not None:
            self._worker_died(worker, Cause(exited.signal, exited.exit_code, exited.problem))

    def _on_worker_end(self, link: WorkerLink) -> None:
        if self._links.get(link.worker.id) is not link:
            return
        if self._worker_host is None:
            self._worker_died(link.worker, UNKNOWN)
        else:
            self._closing.pop(link.worker.id, None)
            link.died_ns = time.monotonic_ns()
            self._dying[link.worker.id] = link

    def _worker_died(self, worker: Worker, cause: Cause) -> None:
        self._ready_early.discard(worker)
        self._closing.pop(worker.id, None)
        self._dying.pop(worker.id, None)
        self._perform(self._dispatcher.worker_died(worker, cause, time.monotonic_ns()))
        link = self._links.pop(worker.id, None)
        if link is not None:
            self._close_link(link)

    def _close_link(self, link: WorkerLink) -> None:
        self._watcher.forget_end(link.pidfd)
        self._watcher.forget_end(link.channel.fileno())
        os.close(link.pidfd)
        link.channel.close()

    # -- effects --------------------------------------------------------------------------------------------------
    def _send_call(self, effect: model.SendCall) -> None:
        self._send_execute(effect.call)

    def _send_execute(self, call: model.Call) -> None:
        worker = call.worker
        assert worker is not None
        pair = call.book.pair
        if pair not in worker.mapped and not self._send_map(worker, pair):
            self._perform(self._dispatcher.worker_lost(worker, time.monotonic_ns()))
            return
        _, _, fn_id, _, arena, slot, generation, flags, args_size, out_size = call.header
        run_limit_us = call.contract.run_limit_us
        message = _EXECUTE.pack(
            _EXECUTE_HEAD, call.sequence, call.deadline_ns, fn_id, run_limit_us, arena, slot, generation, flags,
            args_size, out_size, 0,
        )  # fmt: skip
        router = self._router
        try:
            _send(router, worker.routing_id, _SEND_FIRST)
            _send(router, message, _SEND_LAST)
        except zmq.ZMQError as error:
            self._not_sent(worker.routing_id, error)

    def _send_map(self, worker: Worker, pair: Pair) -> bool:
        stored = self._store.get(pair)
        shape = pair.shape
        message = messages.Map(
            arena=pair.arena.id,
            index=pair.index,
            count=shape.count,
            args_stride=shape.args_stride,
            out_stride=shape.out_stride,
        )
        link = self._links.get(worker.id)
        if link is None:
            return False
        try:
            send_message(link.channel, encode(message), [stored.args_fd, stored.out_fd])
        except (ChannelClosed, OSError):
            return False
        worker.mapped.add(pair)
        return True

    def _send_result(self, effect: model.SendResult) -> None:
        call, code, out_size, error_size, slot_free = effect
        self._send_answer(call, code, out_size, error_size, headers.SLOT_FREE if slot_free else 0)

    def _send_answer(self, call: model.Call, code: int, out_size: int, error_size: int, flags: int) -> None:
        message = _RESULT.pack(_RESULT_HEAD, call.header.call_id, code, out_size, error_size, flags)
        router, peer = self._router, call.session.id
        try:
            _send(router, peer, _SEND_FIRST)
            _send(router, message, _SEND_LAST)
        except zmq.ZMQError as error:
            self._not_sent(peer, error)

    def _send_failure(self, effect: SendFailure) -> None:
        failure = messages.Failure(
            call_id=effect.call_id,
            code=int(effect.code),
            message=effect.message[: messages.REASON_MAX],
            kind=effect.kind,
            slot=effect.slot,
            began=effect.began,
            signal=effect.signal,
            exit_code=effect.exit_code,
            limit=effect.limit,
            queued=effect.queued,
            ran=effect.ran,
        )
        self._send(effect.session_id, encode(failure))

    def _send_released(self, effect: model.SendReleased) -> None:
        self._send(effect.session_id, headers.encode_records(Op.RELEASED, [(effect.call_id,)]))

    def _send_reply(self, effect: SendReply) -> None:
        reply = messages.Reply(
            request_id=effect.request.request_id,
            kind=effect.kind,
            code=int(effect.code),
            reason=effect.reason[: messages.REASON_MAX],
            body=dict(effect.body),
        )
        self._send(effect.request.session_id, encode(reply))

    def _start_worker(self, effect: model.StartWorker) -> None:
        worker = effect.worker
        self._tell_worker_host(messages.Start(worker=worker.id, routing_id=worker.routing_id))

    def _load_worker(self, effect: model.LoadWorker) -> None:
        record = effect.record
        load = messages.Load(
            contract=messages.id_bytes(record.id),
            name=record.name,
            source=record.source,
            chunk_name=record.chunk_name,
            modules=record.modules,
            memory=record.settings.memory,
        )
        self._send(effect.worker.routing_id, encode(load))

    def _kill_worker(self, effect: model.KillWorker) -> None:
        self._tell_worker_host(messages.Kill(worker=effect.worker.id))

    def _tell_worker_host(self, order: messages.Start | messages.Kill) -> None:
        channel = self._worker_host
        if channel is None:
            return
        try:
            send_message(channel, encode(order))
        except (ChannelClosed, OSError) as error:
            self._watcher.forget_channel(channel)
            self._worker_host_left(f"it takes no orders: {error}")

    def _drop_pair(self, pair: Pair) -> None:
        self._store.drop(pair)
        unmap = encode(messages.Unmap(arena=pair.arena.id, index=pair.index))
        for worker in [worker for worker in self._workforce.by_id.values() if pair in worker.mapped]:
            worker.mapped.discard(pair)
            self._send(worker.routing_id, unmap)


def _new_routing_id() -> bytes:
    """Return random bytes that are no text of this protocol and do not start with the 0 that libzmq reserves."""
    return b"\xff" + secrets.token_bytes(ROUTING_ID_SIZE - 1)


def _not_found(request: Request) -> SendReply:
    return SendReply(request, "ContractNotFound", AbiErrorCode.HOST_CONTRACT_NOT_FOUND, "host contract not found")


def _leave_loop() -> None:
    raise SystemExit(0)


def _write_record(record: model.Record) -> None:
    log.log(logging.getLevelNamesMapping()[record.level.upper()], record.event, extra={"fields": dict(record.fields)})
