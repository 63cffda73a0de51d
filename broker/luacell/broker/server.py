"""The broker's loop: one ROUTER, one blocking receive; events go to the dispatcher, effects come back and are done.

It owns the sockets and the order of things: hosts and workers speak over the ROUTER, what the watcher thread hears
arrives there as well. It finds out who speaks and hands over to `hosts`, `workers` or, for calls and their answers,
straight to the dispatcher.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, NoReturn

import zmq

from luacell.broker import model
from luacell.broker.books import Books, Pair
from luacell.broker.bounds import bounds_for
from luacell.broker.crash_keeper import CrashKeeper
from luacell.broker.crash_store import CrashStore
from luacell.broker.dispatcher import Dispatcher
from luacell.broker.gate import Gate
from luacell.broker.hosts import Hosts
from luacell.broker.inline import InlineHost, InlineHosts
from luacell.broker.inline_memory import InlineMemory
from luacell.broker.keeper import Keeper
from luacell.broker.model import DropPair, Effect, SendFailure, Worker
from luacell.broker.outbox import Outbox, answer_record
from luacell.broker.registry import ContractRecord, Registry
from luacell.broker.registry_store import RegistryStore, StoreError
from luacell.broker.rundir import RunDirectory
from luacell.broker.signals import SignalPipe
from luacell.broker.store import SegmentStore
from luacell.broker.strays import FLOOD_FRAMES, cut, drop_rest
from luacell.broker.watcher import Connected, Disconnected, Ended, Received, Signalled, Watcher, WorkDone
from luacell.broker.workers import WorkerLink, Workers
from luacell.protocol import headers, messages
from luacell.protocol.endpoints import TcpEndpoint
from luacell.protocol.errors import AbiErrorCode, LuacellError, ProtocolError
from luacell.protocol.headers import Op
from luacell.protocol.limits import MESSAGE_MAX, NS_PER_MS, NS_PER_S
from luacell.protocol.memory.channel import ChannelClosed, close_all, send_message
from luacell.protocol.messages import ROUTING_ID_SIZE, decode, encode
from luacell.protocol.paths import CRASHES_DIRECTORY
from luacell.protocol.release import __version__

log = logging.getLogger("luacell.broker")

HIGH_WATER_MARK: Final = 4096  # messages per peer; four times what a host may have in flight
TICK_IDLE_MS: Final = 1000
TICK_BUSY_MS: Final = 20  # while something has a deadline: lateness of a deadline, far below the promise of 250 ms
TIME_STEP_NS: Final = 4 * NS_PER_MS  # between looks at the deadlines while messages keep coming
DRAIN_LIMIT_NS: Final = 25 * NS_PER_S  # container runtimes kill 30 s after they have asked
FAREWELL_MS: Final = 500  # for the last answers to leave
GREETINGS_MAX: Final = 256  # descriptor channels that have not said who they are
TCP_RECEIVED_MAX: Final = 64  # messages of one TCP peer that wait for the loop: 16 MiB of pieces
TCP_SENT_MAX: Final = 4096  # messages to one TCP peer; those without acknowledgement have 16 KiB at most
HEARTBEAT_MS: Final = 1000  # to TCP peers: a child of theirs may hold the connection open when they are gone
HEARTBEAT_LIMIT_MS: Final = 2500

_CALL_HEAD: Final = headers.head(Op.CALL)
_CALL_SIZE: Final = headers.PREAMBLE_SIZE + headers.CALL.size
_NESTED: Final = frozenset({Op.CALL_INLINE, Op.PIECE, Op.MORE, Op.DESCRIBE})  # what a contract's own calls are made of
_INLINE_CONTROL: Final = frozenset(
    {Op.REGISTER, Op.COMMIT, Op.UNREGISTER, Op.REVIVE, Op.CRASHES, Op.CRASH, Op.LIST, Op.DESCRIBE, Op.HEALTH}
)
_DONE_HEAD: Final = headers.head(Op.DONE)
_DONE_SIZE: Final = headers.PREAMBLE_SIZE + headers.DONE.size
_PREAMBLE_SIZE: Final = headers.PREAMBLE_SIZE
_unpack_call: Final = headers.CALL.unpack_from
_unpack_done: Final = headers.DONE.unpack_from
_new_call: Final = partial(tuple.__new__, headers.Call)  # NamedTuple._make without its frame
_new_done: Final = partial(tuple.__new__, headers.Done)


UNKNOWN: Final = 'unknown peer: connect to the descriptor socket first, or say HELLO as "inline"'


class BindError(LuacellError):
    """An address cannot be listened on; the text names it."""


class Leave(Exception):
    """The loop is to end; raised between two messages."""


class Server:
    """One broker.

    Args:
        run_directory: held by this process; the server binds its sockets there.
        spares: blank workers to keep.
        registry_store: the registry's file; the server closes it.
        tcp: where hosts without shared memory may connect besides, or None.
        parent: pid of the process that started this broker and its worker host; None takes any worker host.
        records_crashes: whether calls that crash their workers are kept, in the directory of the registry's file.

    Raises:
        StoreError: what is in the file cannot be served.
        BindError: `tcp` cannot be bound.
    """

    def __init__(
        self,
        run_directory: RunDirectory,
        spares: int,
        registry_store: RegistryStore,
        tcp: TcpEndpoint | None = None,
        parent: int | None = None,
        *,
        records_crashes: bool = True,
    ) -> None:
        records = registry_store.records()
        self._run_directory = run_directory
        self._epoch = secrets.token_bytes(8)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._watcher_id = _new_routing_id()
        self._listener = run_directory.listen()
        self._watcher = Watcher(self._context, "inproc://watcher", self._watcher_id, self._listener)
        self._store = SegmentStore()
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._bounds = bounds = bounds_for(descriptors)
        books, registry = Books(pairs_max=bounds.pairs), Registry()
        self._forgotten = books.forgotten
        self._dispatcher = dispatcher = Dispatcher(
            self._store, books, registry, _new_routing_id, spares, bounds.workers
        )
        self._restore(records, registry_store)
        self._outbox = outbox = Outbox(self._router, self._expel)
        self._workers = Workers(
            dispatcher,
            self._store,
            self._watcher,
            self._perform,
            self._on_answers,
            self._on_worker_end,
            parent,
        )
        self._keeper = Keeper(registry_store, lambda tell: self._watcher.order(lambda: WorkDone(tell)))
        self._crashes = CrashKeeper(
            CrashStore(registry_store.path.parent / CRASHES_DIRECTORY, is_recording=records_crashes),
            self._store.read_args,
            lambda tell: self._watcher.order(lambda: WorkDone(tell)),
        )
        facts = {
            "version": __version__,
            "epoch": self._epoch.hex(),
            "broker_pid": os.getpid(),
            "state_dir": str(registry_store.path.parent).encode("utf-8", "backslashreplace").decode(),
        }
        self._hosts = Hosts(
            dispatcher,
            books,
            registry,
            self._store,
            outbox,
            self._watcher,
            self._perform,
            self._on_calls,
            self._epoch,
            self._keeper,
            self._crashes,
            facts,
        )
        memory = InlineMemory(books, self._store, self._watcher.order, lambda pair: self._perform([DropPair(pair)]))
        self._inline = InlineHosts(dispatcher, outbox, memory, self._perform, time.monotonic_ns)
        self._backlog = self._inline.backlog
        self._greeting: dict[socket.socket, None] = {}  # descriptor channels without a name, in order of arrival
        self._worker_of = dispatcher.workforce.by_routing_id
        self._callers = self._hosts.callers
        self._together: dict[Worker, list[model.Call]] = {}  # calls to be sent, by worker
        self._drained_ns = 0  # when a broker that is ending no longer waits for calls; 0: it is not ending
        self._tick_ms = 0  # how long `recv` waits
        self._tick_ns = 0  # when to look at deadlines next
        self._gate = Gate(
            self._context,
            self._router,
            run_directory.broker_socket,
            run_directory.broker_socket_aside,
            descriptors,
        )
        self._hosts.facts["connections"] = self._gate.connections
        self._bind()
        self._hosts.facts["tcp"] = self.tcp = self._bind_tcp(tcp) if tcp is not None else ""
        self._performers: dict[type[Any], Callable[[Any], None]] = {
            model.SendCall: lambda effect: self._leave_together(effect.call),
            model.SendResult: outbox.send_result,
            model.SendFailure: outbox.send_failure,
            model.SendReleased: outbox.send_released,
            model.SendReply: outbox.send_reply,
            model.StoreContract: self._store_contract,
            model.StoreContracts: self._store_contracts,
            model.LoadWorker: outbox.send_load,
            model.SaveState: outbox.send_save,
            model.RestoreState: outbox.send_restore,
            model.StartWorker: self._workers.order_start,
            model.KillWorker: self._workers.order_kill,
            model.InspectWorker: self._workers.order_inspection,
            model.DropPair: lambda effect: self._drop_pair(effect.pair),
            model.RecordCrash: self._crashes.record,
            model.Record: _write_record,
        }

    def _restore(self, records: list[ContractRecord], registry_store: RegistryStore) -> None:
        """Serve what was registered in other lives, as it was registered or not at all."""
        for record in records:
            objection = self._dispatcher.catalogue.restore(record)
            if objection:
                raise StoreError(f"{registry_store.path}: contract {record.title} cannot be served: {objection}")
        log.info("registry read", extra={"fields": {"path": registry_store.path, "contracts": len(records)}})

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

    def _bind_tcp(self, endpoint: TcpEndpoint) -> str:
        """Listen on loopback, too, with options for these peers alone; return where."""
        router = self._router
        router.setsockopt(zmq.IPV6, int(endpoint.is_ipv6))
        router.setsockopt(zmq.SNDHWM, TCP_SENT_MAX)
        router.setsockopt(zmq.RCVHWM, TCP_RECEIVED_MAX)
        router.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        router.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_LIMIT_MS)
        try:
            router.bind(str(endpoint))
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise BindError(f"cannot listen on {endpoint}: {error.strerror}") from None
        where = str(router.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")
        log.info("serving hosts without shared memory", extra={"fields": {"tcp": where}})
        return where

    def run(self, signals: SignalPipe | None = None) -> None:
        """Serve until a signal comes, or `stop` is called.

        Args:
            signals: those that end it.
        """
        self._watcher.start()
        self._keeper.start()
        self._gate.start()
        self._crashes.start()
        if signals is not None:
            self._watcher.watch_signals(signals)
        with contextlib.suppress(Leave):
            self._loop()

    def _loop(self) -> NoReturn:
        receive, clock = self._router.recv, time.monotonic_ns
        while True:
            try:
                peer = receive()
                message = receive()  # a ROUTER gives every message at least one frame behind the identity
            except zmq.Again:
                if self._backlog:
                    self._inline.step()
                self._pass_time(clock())
                self._choose_tick()
                continue
            now_ns = clock()
            try:
                self._handle(peer, message, now_ns)
            except Exception as error:
                error.add_note(self._title_of(peer, message))
                raise
            if self._backlog:
                self._inline.step()
                self._choose_tick()
            if now_ns >= self._tick_ns:
                self._pass_time(now_ns)

    def stop(self) -> None:
        """Make `run` return; may be called from another thread."""
        self._watcher.order(lambda: WorkDone(_leave_loop))

    def close(self) -> None:
        """Close every socket, descriptor and mapping."""
        self._keeper.stop()
        self._gate.stop()
        self._crashes.stop()
        self._watcher.stop()
        self._hosts.close()
        self._workers.close()
        for channel in self._greeting:
            channel.close()
        self._watcher.close()
        self._listener.close()
        self._store.close()
        self._router.close(linger=FAREWELL_MS)
        self._context.term()

    # -- time -----------------------------------------------------------------------------------------------------
    def _choose_tick(self) -> None:
        """After a quiet tick: wake up often only while something has a deadline."""
        if self._backlog:
            self._set_tick(0)
            return
        is_quiet = (
            self._dispatcher.next_deadline() is None
            and not self._workers.awaits
            and self._inline.is_quiet
            and not self._drained_ns
        )
        self._set_tick(TICK_IDLE_MS if is_quiet else TICK_BUSY_MS)

    def _set_tick(self, tick_ms: int) -> None:
        if tick_ms != self._tick_ms:
            self._tick_ms = tick_ms
            self._router.setsockopt(zmq.RCVTIMEO, tick_ms)

    def _pass_time(self, now_ns: int) -> None:
        """Act on deadlines; at most once per TIME_STEP_NS while messages keep coming."""
        self._tick_ns = now_ns + TIME_STEP_NS
        if self._router.getsockopt(zmq.RCVMORE):  # frames that pass for messages of somebody who is known
            self._drain()
        next_ns = self._dispatcher.next_deadline()
        if next_ns is not None and next_ns <= now_ns:
            self._perform(self._dispatcher.time_passed(now_ns))
        if self._workers.awaits:
            self._workers.time_passed(now_ns)
        if self._inline.hosts:
            self._inline.time_passed(now_ns)
        if self._drained_ns:
            self._leave_when_drained(now_ns)

    # -- messages -------------------------------------------------------------------------------------------------
    def _handle(self, peer: bytes, message: bytes, now_ns: int) -> None:
        """Act on one message; the two kinds that make up a call are recognised by size and first bytes."""
        if self._tick_ms != TICK_BUSY_MS:
            self._set_tick(TICK_BUSY_MS)
        dispatcher = self._dispatcher
        worker = self._worker_of.get(peer)
        if worker is not None and len(message) == _DONE_SIZE and message.startswith(_DONE_HEAD):
            done = _new_done(_unpack_done(message, _PREAMBLE_SIZE))
            call = dispatcher.quick_done(worker, done, now_ns)
            if call is not None:
                self._outbox.send_answer(call, done.code, done.out_size, done.error_size, headers.SLOT_FREE)
            else:
                self._perform(dispatcher.worker_done(worker, done, now_ns))
            contract = worker.contract
            if contract is not None and contract.queue.count:
                self._perform(dispatcher.refill(worker, now_ns))
        elif len(message) == _CALL_SIZE and message.startswith(_CALL_HEAD) and peer in self._callers:
            header = _new_call(_unpack_call(message, _PREAMBLE_SIZE))
            call = dispatcher.quick_call(peer, header, now_ns)
            if call is None:
                self._perform(dispatcher.call_arrived(peer, header, now_ns))
            elif call.state is model.HELD:
                self._send_execute(call)
        elif peer == self._watcher_id:
            for item in self._watcher.take():
                self._on_item(item)
        else:
            self._handle_other(peer, message, worker)

    def _title_of(self, peer: bytes, message: bytes) -> str:
        """Say what a message is, and whose."""
        if peer == self._watcher_id:
            return "what the watcher has heard"
        try:
            title = headers.parse_preamble(message)[0].name
        except ProtocolError:
            title = f"{len(message)} bytes"
        worker = self._worker_of.get(peer)
        return f"{title} of " + (f"host {peer.hex()}" if worker is None else f"worker {worker.id}")

    def _handle_other(self, peer: bytes, message: bytes, worker: Worker | None) -> None:
        """Act on a message that is not one of the two; find back into step where it is none at all."""
        if worker is None and peer not in self._hosts.links:
            self._handle_inline(peer, message)
            return
        try:
            op, count = headers.parse_preamble(message)
            if worker is not None and op in _NESTED:
                self._on_nested(worker, op, count, message)
            elif worker is not None:
                self._workers.on_message(worker, op, count, message)
            else:
                self._hosts.on_message(peer, op, count, message)
        except ProtocolError as error:
            self._find_step(peer, message)
            self._refuse_peer(peer, str(error))

    def _on_nested(self, worker: Worker, op: Op, count: int, message: bytes) -> None:
        """Act on a message of a worker whose contract calls another, as any host without shared memory does.

        Raises:
            ProtocolError: it is not one that a worker may send now.
        """
        if worker.state is model.DOOMED:
            return
        if worker.call is None:
            raise ProtocolError(f"operation {op.name} of a worker that runs no call")
        host = self._inline.host_of(worker)
        if op is Op.DESCRIBE:
            self._hosts.on_message(worker.routing_id, op, count, message)
        else:
            self._inline.on_message(host, op, count, message)

    def _handle_inline(self, peer: bytes, message: bytes) -> None:
        """Act on a message of a host without shared memory, or of nobody that is known.

        They choose their ids themselves, so each of their messages is looked at to its end.
        """
        host = self._inline.hosts.get(peer)
        if self._router.getsockopt(zmq.RCVMORE):
            if host is None:
                self._find_step(peer, message)
            else:
                if self._drain():
                    self._expel(peer)
                else:
                    self._refuse_peer(peer, "a message of more frames than one")
            return
        try:
            op, count = headers.parse_preamble(message)
            if host is not None and self._inline.handles(op):
                self._inline.on_message(host, op, count, message)
            elif host is not None and op in _INLINE_CONTROL:
                self._hosts.on_message(peer, op, count, message)
            elif op is Op.HELLO and _is_inline_id(peer):
                self._greet_inline(peer, host, decode(messages.Hello, message).role)
            elif host is None:
                self._find_step(peer, message)
            else:
                raise ProtocolError(f"operation {op.name} is not for hosts without shared memory")
        except ProtocolError as error:
            self._refuse_peer(peer, str(error))

    def _greet_inline(self, peer: bytes, host: InlineHost | None, role: str) -> None:
        if role != messages.INLINE:
            raise ProtocolError(
                f"unknown peer: role {role!r} needs the descriptor socket first; say {messages.INLINE!r}"
            )
        if host is None:
            if len(self._hosts.links) + self._inline.count >= self._bounds.hosts:
                text = f"{self._bounds.hosts} hosts are connected, which is the limit; retry later"
                self._outbox.tell_failure(SendFailure(peer, 0, AbiErrorCode.BUSY, text, slot="unused"))
                return
            self._inline.joined(peer)
        self._hosts.welcome(peer)

    def _find_step(self, peer: bytes, message: bytes) -> None:
        """Deal with frames that are not (identity, one frame).

        Frames are read in pairs without asking libzmq for the end of each message, which would cost a tenth of the
        loop. A peer that sends a message of two frames shifts the pairs: its second frame is taken for an identity and
        the next message's identity for a frame. Routing ids are random, so both are recognised here: the rest of the
        malformed message is dropped, the next one is handled as what it is. Only a host that is about to introduce
        itself is not known yet; it repeats its HELLO until it is answered.
        """
        more = bool(self._router.getsockopt(zmq.RCVMORE))
        if more and self._is_known(message):
            self._handle(message, self._router.recv(), time.monotonic_ns())
            return
        self._drain()
        if not self._is_known(peer):
            self._refuse_peer(peer, UNKNOWN)

    def _drain(self) -> bool:
        """Drop what is left of the message whose first frames were read; tell whether its sender was cut off.

        The hosts of the process that has sent too many frames are sent away, a worker by the next failure to reach it.
        """
        flood = drop_rest(self._router)
        if flood is None:
            return False
        pid = cut(flood)
        fields = {"pid": pid, "limit": FLOOD_FRAMES}
        log.warning("connection cut: a message of too many frames", extra={"fields": fields})
        if pid:
            for peer in self._hosts.of_process(pid):
                self._expel(peer)
        return True

    def _is_known(self, peer: bytes) -> bool:
        return (
            peer in self._worker_of
            or peer in self._hosts.links
            or peer in self._inline.hosts
            or peer == self._watcher_id
        )

    def _expel(self, peer: bytes) -> None:
        """Send a peer away that does not read what it is sent."""
        worker = self._worker_of.get(peer)
        if worker is not None:
            self._workers.lost(worker)
        elif peer in self._inline.hosts:
            self._inline.left(peer)
        else:
            self._hosts.left(peer)

    def _refuse_peer(self, peer: bytes, reason: str) -> None:
        """Answer something that is no valid message: hosts are told, workers must go."""
        worker = self._worker_of.get(peer)
        if worker is not None:
            log.warning("worker broke the protocol", extra={"fields": {"worker": worker.id, "reason": reason}})
            self._workers.lost(worker)
        else:
            self._outbox.send_failure(SendFailure(peer, 0, AbiErrorCode.BAD_REQUEST, reason))

    # -- what the watcher hears -----------------------------------------------------------------------------------
    def _on_item(self, item: object) -> None:
        match item:
            case Received(channel, message, descriptors):
                self._on_descriptor_message(channel, message, descriptors)
            case Ended("worker", WorkerLink() as link):
                self._workers.ended(link)
            case Ended("socketpair", WorkerLink() as link):
                self._workers.closed(link)
            case Ended("host", bytes() as peer):
                self._hosts.left(peer)
            case Disconnected(channel, reason):
                self._on_disconnected(channel, reason)
            case Connected(channel):
                self._on_connected(channel)
            case WorkDone(tell):
                tell()
            case Signalled(number):
                self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        """The first signal asks for an orderly end, the second for one at once."""
        if self._drained_ns:
            raise Leave(f"signal {number}, the second")
        self._drained_ns = time.monotonic_ns() + DRAIN_LIMIT_NS
        self._dispatcher.drain()
        log.info("broker is draining", extra={"fields": {"signal": number}})
        self._leave_when_drained(time.monotonic_ns())

    def _leave_when_drained(self, now_ns: int) -> None:
        """End as soon as nobody waits for an answer; at the limit, those who do get one."""
        if now_ns >= self._drained_ns:
            self._perform(self._dispatcher.cancel_all(now_ns))
            raise Leave("drained as far as time allowed")
        if not self._dispatcher.owes and not self._inline.owes:
            raise Leave("drained")
        self._tick_ns = 0  # look again at the next message

    def _on_connected(self, channel: socket.socket) -> None:
        if len(self._hosts.links) + self._inline.count >= self._bounds.hosts:
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
        if self._hosts.channel_ended(channel):
            return
        if self._workers.is_host(channel):
            self._workers.host_left(reason)
        else:
            self._greeting.pop(channel, None)
            channel.close()

    def _on_descriptor_message(self, channel: socket.socket, message: bytes, descriptors: list[int]) -> None:
        try:
            op, _ = headers.parse_preamble(message)
            if self._workers.is_host(channel):
                if self._workers.on_report(op, message, descriptors):
                    descriptors = []
            elif channel in self._greeting and op is Op.HELLO:
                self._greet(channel, decode(messages.Hello, message).role)
            else:
                raise ProtocolError(f"operation {op.name} is not expected on this channel")
        except (ProtocolError, OSError, ChannelClosed) as error:
            log.warning("descriptor channel refused", extra={"fields": {"reason": str(error)}})
            self._watcher.forget_channel(channel)
            self._on_disconnected(channel, str(error))
        finally:
            close_all(descriptors)

    def _greet(self, channel: socket.socket, role: str) -> None:
        if role == "worker-host":
            self._workers.host_joined(channel)
            self._welcome(channel, b"")
            self._workers.start()
        elif role == "host":
            routing_id = _new_routing_id()
            self._hosts.joined(channel, routing_id)
            self._welcome(channel, routing_id)
        else:
            raise ProtocolError(f"role {role!r} is neither 'host' nor 'worker-host'")

    def _welcome(self, channel: socket.socket, routing_id: bytes) -> None:
        self._greeting.pop(channel, None)
        welcome = messages.Welcome(routing_id=routing_id, epoch=self._epoch, broker_pid=os.getpid())
        send_message(channel, encode(welcome))

    # -- several calls in one message -----------------------------------------------------------------------------
    def _on_calls(self, peer: bytes, records: Iterable[tuple[int, ...]], now_ns: int) -> None:
        """A host has sent several calls at once; those that go to one worker leave together."""
        dispatcher = self._dispatcher
        for record in records:
            header = _new_call(record)
            call = dispatcher.quick_call(peer, header, now_ns)
            if call is None:
                self._collect(dispatcher.call_arrived(peer, header, now_ns))
            elif call.state is model.HELD:
                self._leave_together(call)
        self._send_collected()

    def _on_answers(self, worker: Worker, records: Iterable[tuple[int, ...]], now_ns: int) -> None:
        """A worker answers for several calls at once; answers to one host leave together."""
        dispatcher = self._dispatcher
        answers: dict[bytes, list[bytes]] = {}
        for record in records:
            done = _new_done(record)
            call = dispatcher.quick_done(worker, done, now_ns)
            _, code, out_size, error_size, _ = done
            if call is None:
                self._collect(dispatcher.worker_done(worker, done, now_ns))
            elif call.session.id in self._inline.hosts:
                self._outbox.send_answer(call, code, out_size, error_size, headers.SLOT_FREE)
            else:
                packed = answer_record(call.header.call_id, code, out_size, error_size, headers.SLOT_FREE)
                answers.setdefault(call.session.id, []).append(packed)
        for peer, packed_answers in answers.items():
            self._outbox.send_answers(peer, packed_answers)
        self._collect(dispatcher.refill(worker, now_ns))
        self._send_collected()

    # -- effects --------------------------------------------------------------------------------------------------
    def _perform(self, effects: Iterable[Effect]) -> None:
        self._collect(effects)
        if self._together:
            self._send_collected()

    def _collect(self, effects: Iterable[Effect]) -> None:
        """Perform effects, but for calls to be sent, which are kept for `_send_collected`."""
        performers = self._performers
        for effect in effects:
            performers[type(effect)](effect)
        if self._forgotten:
            self._tell_forgotten()

    def _leave_together(self, call: model.Call) -> None:
        """Keep a call that a worker was handed until others for that worker are there as well."""
        worker = call.worker
        assert worker is not None
        calls = self._together.get(worker)
        if calls is None:
            self._together[worker] = [call]
        else:
            calls.append(call)

    def _send_collected(self) -> None:
        """Send the calls that were kept; one that cannot be sent makes its worker lost, and may bring others."""
        while self._together:
            worker, calls = self._together.popitem()
            if not all(self._has_pair(worker, call.book.pair) for call in calls):
                self._workers.lost(worker)
            elif len(calls) == 1:
                self._outbox.send_execute(calls[0])
            else:
                self._outbox.send_executes(worker, calls)

    def _send_execute(self, call: model.Call) -> None:
        """Send a call to its worker, after the pair of segments where it has not seen that."""
        worker = call.worker
        assert worker is not None
        if self._has_pair(worker, call.book.pair):
            self._outbox.send_execute(call)
        else:
            self._workers.lost(worker)

    def _has_pair(self, worker: Worker, pair: Pair) -> bool:
        """Give a worker a pair of segments where it has not seen it; tell whether it has it now."""
        return pair in worker.mapped or self._workers.send_map(worker, pair)

    def _on_worker_end(self, worker: Worker, last_words: str) -> None:
        self._inline.left(worker.routing_id)
        self._crashes.worker_ended(worker.id, last_words)

    def _store_contract(self, effect: model.StoreContract) -> None:
        contract, request = effect

        def report(problem: str) -> None:
            self._perform(self._dispatcher.contract_stored(contract, request, problem, time.monotonic_ns()))

        self._keeper.put(contract.record, report)

    def _store_contracts(self, effect: model.StoreContracts) -> None:
        contracts, request = effect

        def report(problem: str) -> None:
            self._perform(self._dispatcher.contracts_stored(contracts, request, problem, time.monotonic_ns()))

        self._keeper.put_all([contract.record for contract in contracts], report)

    def _drop_pair(self, pair: Pair) -> None:
        """Unmap and close a pair of segments, here and in the workers that have it."""
        self._store.drop(pair)
        for worker in [worker for worker in self._worker_of.values() if pair in worker.mapped]:
            worker.mapped.discard(pair)
            self._outbox.send_unmap(worker, pair)

    def _tell_forgotten(self) -> None:
        """Tell workers which of the arenas that they know are gone, when they have heard so of all pairs."""
        gone, self._forgotten[:] = set(self._forgotten), []
        for worker in [worker for worker in self._worker_of.values() if not worker.arenas.isdisjoint(gone)]:
            for arena in sorted(worker.arenas & gone):
                self._outbox.send_forget(worker, arena)
            worker.arenas -= gone


def _new_routing_id() -> bytes:
    """Return random bytes that are no text of this protocol and do not start with the 0 that libzmq reserves."""
    return b"\xff" + secrets.token_bytes(ROUTING_ID_SIZE - 1)


def _is_inline_id(peer: bytes) -> bool:
    """Whether a routing id is one that a host without shared memory may choose; libzmq's own start with 0."""
    return len(peer) == ROUTING_ID_SIZE and peer[0] != 0


def _leave_loop() -> None:
    raise Leave("told to")


def _write_record(record: model.Record) -> None:
    log.log(logging.getLevelNamesMapping()[record.level.upper()], record.event, extra={"fields": dict(record.fields)})
