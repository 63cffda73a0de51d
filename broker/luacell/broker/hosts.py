"""The hosts: who is connected, what they ask for besides calls, and how they get memory.

It keeps each host's descriptor channel and pidfd, answers control requests, and has segments created and granted.
Calls go past it, from the server to the dispatcher.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from luacell.broker.books import Books, Pair, PairState, Refusal
from luacell.broker.crash_keeper import QUESTIONS_MAX, Body, CrashKeeper, Report
from luacell.broker.dispatcher import Dispatcher
from luacell.broker.keeper import CHANGES_MAX, Keeper
from luacell.broker.model import DropPair, Effect, Request, SendReply
from luacell.broker.outbox import Outbox
from luacell.broker.registry import ContractRecord, Registry
from luacell.broker.snapshot import snapshot
from luacell.broker.store import SegmentStore, create_descriptors
from luacell.broker.watcher import Watcher, WorkDone
from luacell.protocol import headers, messages
from luacell.protocol.errors import AbiErrorCode, ProtocolError
from luacell.protocol.headers import Op
from luacell.protocol.memory.channel import ChannelClosed, close_all, peer_ids, peer_pidfd, send_message
from luacell.protocol.messages import decode, encode, id_of
from luacell.protocol.slots import SlotShape

log = logging.getLogger("luacell.broker")


@dataclass(slots=True, eq=False)
class HostLink:
    """A local host: its descriptor channel and its pidfd."""

    routing_id: bytes
    channel: socket.socket
    pidfd: int


class Hosts:
    """All hosts of one broker.

    Args:
        dispatcher, books, registry, store, keeper, crashes: the broker's.
        outbox: for answers.
        watcher: reads channels and reports deaths.
        perform: performs effects.
        on_calls: acts on the CALL records of a host.
        epoch: random bytes of this broker's life.
        facts: of this broker's life, for those who ask how it is.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        books: Books,
        registry: Registry,
        store: SegmentStore,
        outbox: Outbox,
        watcher: Watcher,
        perform: Callable[[Iterable[Effect]], None],
        on_calls: Callable[[bytes, Iterable[tuple[int, ...]], int], None],
        epoch: bytes,
        keeper: Keeper,
        crashes: CrashKeeper,
        facts: Mapping[str, Any],
    ) -> None:
        self._dispatcher = dispatcher
        self._books = books
        self._registry = registry
        self._store = store
        self._outbox = outbox
        self._watcher = watcher
        self._perform = perform
        self._on_calls = on_calls
        self._epoch = epoch
        self._keeper = keeper
        self._crashes = crashes
        self._facts = facts
        self.links: dict[bytes, HostLink] = {}
        self.callers: dict[bytes, HostLink] = {}  # those of them that have introduced themselves over ZeroMQ, too
        self.facts: dict[str, Any] = {}  # what health tells besides the dispatcher's counts
        self._by_channel: dict[socket.socket, HostLink] = {}

    # -- coming and going -----------------------------------------------------------------------------------------
    def joined(self, channel: socket.socket, routing_id: bytes) -> None:
        """A host has said hello on its descriptor channel.

        Raises:
            OSError: it is gone already.
        """
        pidfd = peer_pidfd(channel)
        host = HostLink(routing_id, channel, pidfd)
        self.links[routing_id] = self._by_channel[channel] = host
        self._watcher.watch_end(pidfd, "host", routing_id)
        log.debug("host joined", extra={"fields": {"host": routing_id.hex()}})

    def left(self, peer: bytes) -> None:
        """A host is gone, or must go; idempotent."""
        host = self.links.pop(peer, None)
        if host is None:
            return
        log.debug("host left", extra={"fields": {"host": peer.hex()}})
        self.callers.pop(peer, None)
        self._perform(self._dispatcher.host_left(peer, time.monotonic_ns()))
        self._close(host)

    def of_process(self, pid: int) -> list[bytes]:
        """Return the hosts that are in one process."""
        return [peer for peer, link in self.links.items() if peer_ids(link.channel)[0] == pid]

    def channel_ended(self, channel: socket.socket) -> bool:
        """A descriptor channel is at its end; tell whether it was a host's."""
        host = self._by_channel.get(channel)
        if host is None:
            return False
        self.left(host.routing_id)
        return True

    def close(self) -> None:
        """Close what belongs to hosts."""
        for host in list(self.links.values()):
            self._close(host)

    def _close(self, host: HostLink) -> None:
        self._by_channel.pop(host.channel, None)
        self._watcher.forget_channel(host.channel)
        self._watcher.forget_end(host.pidfd)
        host.channel.close()
        os.close(host.pidfd)

    # -- what they say --------------------------------------------------------------------------------------------
    def on_message(self, peer: bytes, op: Op, count: int, message: bytes) -> None:
        """Act on a message of a host.

        Raises:
            ProtocolError: it is not one that a host may send now.
        """
        handler = HANDLERS.get(op)
        if handler is None:
            raise ProtocolError(f"operation {op.name} is not for hosts")
        if peer not in self._dispatcher.sessions and op is not Op.HELLO:
            raise ProtocolError(f"operation {op.name} before HELLO")
        handler(self, peer, count, message)

    def _on_call(self, peer: bytes, count: int, message: bytes) -> None:
        self._on_calls(peer, headers.parse_records(Op.CALL, count, message), time.monotonic_ns())

    def _on_cancel(self, peer: bytes, count: int, message: bytes) -> None:
        now_ns = time.monotonic_ns()
        for (call_id,) in headers.parse_records(Op.CANCEL, count, message):
            if peer not in self.links:
                return
            self._perform(self._dispatcher.call_cancelled(peer, call_id, now_ns))

    def _on_hello(self, peer: bytes, count: int, message: bytes) -> None:
        role = decode(messages.Hello, message).role
        if role != "host":
            raise ProtocolError(f"role {role!r} is not 'host', as which this peer has introduced itself")
        pid, uid = peer_ids(self.links[peer].channel)
        self._dispatcher.host_joined(peer, f"pid {pid} of uid {uid}")
        self.callers[peer] = self.links[peer]
        self.welcome(peer)

    def welcome(self, peer: bytes) -> None:
        """Tell a host over ZeroMQ that it is accepted."""
        self._outbox.tell(peer, messages.Welcome(routing_id=b"", epoch=self._epoch, broker_pid=os.getpid()))

    def _on_register(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Register, message)
        request = Request(peer, asked.request_id)
        try:
            record = ContractRecord.from_message(asked, peer)
        except ValueError as error:
            self._outbox.send_reply(SendReply(request, "BadRequest", AbiErrorCode.BAD_REQUEST, str(error)))
            return
        if self._keeper.is_full:
            self._outbox.send_reply(_too_many_changes(request))
            return
        effects: list[Effect] = []
        now_ns = time.monotonic_ns()
        self._dispatcher.catalogue.register(
            request, record, replace=asked.replace, hold=asked.hold, now_ns=now_ns, effects=effects
        )
        self._perform(effects)

    def _on_commit(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Commit, message)
        request = Request(peer, asked.request_id)
        if self._keeper.is_full:
            self._outbox.send_reply(_too_many_changes(request))
            return
        ids = _ids_of(asked.contracts)
        effects: list[Effect] = []
        change = self._dispatcher.catalogue.commit if asked.serve else self._dispatcher.catalogue.release
        change(request, ids, time.monotonic_ns(), effects)
        self._perform(effects)

    def _on_unregister(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Unregister, message)
        contract_id = id_of(asked.contract)
        request = Request(peer, asked.request_id)
        contract = self._dispatcher.catalogue.serving.get(contract_id)
        if contract is not None and contract.record.owner == peer:
            self._perform(self._dispatcher.unregister(contract_id, time.monotonic_ns()))
            self._outbox.send_reply(SendReply(request))
            return
        ids = self._public((contract_id, *_ids_of(asked.others)))
        if not ids:
            self._outbox.send_reply(_not_found(request))
        elif self._keeper.is_full:
            self._outbox.send_reply(_too_many_changes(request))
        else:
            self._keeper.remove(ids, lambda problem: self._on_removed(request, ids, problem))

    def _public(self, ids: Iterable[int]) -> list[int]:
        """Return those of some ids under which there are contracts that anybody may call."""
        serving = self._dispatcher.catalogue.serving
        return [each for each in dict.fromkeys(ids) if each in serving and serving[each].record.owner is None]

    def _on_removed(self, request: Request, ids: Sequence[int], problem: str) -> None:
        """Contracts are no longer in the registry's file, or could not be removed and stay."""
        if problem:
            self._outbox.send_reply(SendReply(request, "Unavailable", AbiErrorCode.UNAVAILABLE, problem))
            return
        left = self._public(ids)
        for contract_id in left:
            self._perform(self._dispatcher.unregister(contract_id, time.monotonic_ns()))
        self._outbox.send_reply(SendReply(request) if left else _not_found(request))  # another host was faster

    def _on_revive(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Revive, message)
        request = Request(peer, asked.request_id)
        contract = self._dispatcher.catalogue.serving.get(id_of(asked.contract))
        if contract is None or contract.record.owner not in (None, peer):
            self._outbox.send_reply(_not_found(request))
            return
        effects: list[Effect] = []
        was_resting = self._dispatcher.catalogue.revive(contract, time.monotonic_ns(), effects)
        self._perform(effects)
        self._outbox.send_reply(SendReply(request, body={"was_resting": was_resting}))

    def _on_crashes(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Crashes, message)
        request = Request(peer, asked.request_id)
        self._ask_for_crashes(request, lambda report: self._crashes.list(asked.first, report))

    def _on_crash(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Crash, message)
        request = Request(peer, asked.request_id)
        self._ask_for_crashes(request, lambda report: self._crashes.read(asked.crash, asked.part, report), asked.crash)

    def _ask_for_crashes(self, request: Request, ask: Callable[[Report], bool], crash_id: str = "") -> None:
        """Have crash records read for a host that is of this user for certain."""
        if request.session_id not in self.links:
            self._outbox.send_reply(_not_for_strangers(request))
            return

        def report(body: Body | None, problem: str) -> None:
            if problem:
                reply = SendReply(request, "Unavailable", AbiErrorCode.UNAVAILABLE, problem)
            elif body is None:
                reply = SendReply(request, "CrashNotFound", AbiErrorCode.NOT_FOUND, crash_id)
            else:
                reply = SendReply(request, body=body)
            self._outbox.send_reply(reply)

        if not ask(report):
            reason = f"{QUESTIONS_MAX} questions about crashes wait for the disk; try again"
            self._outbox.send_reply(SendReply(request, "Busy", AbiErrorCode.BUSY, reason))

    def _on_list(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.List, message)
        page, total = self._registry.page(asked.first)
        self._outbox.send_reply(SendReply(Request(peer, asked.request_id), body={"contracts": page, "total": total}))

    def _on_describe(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Describe, message)
        request = Request(peer, asked.request_id)
        contract = self._dispatcher.contract_for(peer, id_of(asked.contract))
        if contract is None:
            self._outbox.send_reply(_not_found(request))
            return
        record = contract.record
        body = {
            "name": record.name,
            "version": str(record.version) if record.version else "",
            "api": record.modules.get(messages.API_MODULE, b""),
            "unit": record.unit,
            "requires": record.modules.get(messages.REQUIRES_MODULE, b""),
            "workers": record.settings.workers,
        }
        self._outbox.send_reply(SendReply(request, body=body))

    def _on_health(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Health, message)
        body = {**self._facts, **self.facts, **snapshot(self._dispatcher, self._books, time.monotonic_ns())}
        self._outbox.send_reply(SendReply(Request(peer, asked.request_id), body=body))

    def _on_bye(self, peer: bytes, count: int, message: bytes) -> None:
        decode(messages.Bye, message)
        self.left(peer)

    # -- memory ---------------------------------------------------------------------------------------------------
    def _on_lease(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Lease, message)
        request = Request(peer, asked.request_id)
        contract_id = id_of(asked.contract)
        contract = self._dispatcher.catalogue.serving.get(contract_id)
        if contract is None or contract.record.owner not in (None, peer):
            self._outbox.send_reply(_not_found(request))
            return
        shape = SlotShape.for_payloads(asked.args_size, asked.out_size, asked.count)
        pair = self._books.plan_pair(peer, contract_id, shape)
        if isinstance(pair, Refusal):
            self._outbox.send_reply(SendReply(request, "Busy", pair.code, pair.message))
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
        self._outbox.send_reply(SendReply(request, "Busy", AbiErrorCode.BUSY, reason))

    def _grant(self, request: Request, pair: Pair, deadline_us: int, args_fd: int, out_fd: int) -> None:
        host = self.links.get(request.session_id)
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
            self.left(request.session_id)

    def _on_mapped(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.Mapped, message)
        pair = self._books.pair_of(peer, asked.arena, asked.index)
        if isinstance(pair, Refusal) or pair.state is not PairState.GRANTED:
            raise ProtocolError(f"pair {asked.index} of arena {asked.arena} was not granted to this host")
        try:
            self._store.seal(pair)
        except OSError as error:  # the host holds the segment too, and has sealed it its own way
            self.left(peer)
            raise ProtocolError(f"pair {asked.index} of arena {asked.arena} cannot be sealed: {error}") from None
        self._books.mapped(pair)

    def _on_give_back(self, peer: bytes, count: int, message: bytes) -> None:
        asked = decode(messages.GiveBack, message)
        pair = self._books.pair_of(peer, asked.arena, asked.index)
        if isinstance(pair, Refusal):
            raise ProtocolError(pair.message)
        if self._books.retire(pair):
            self._perform([DropPair(pair)])


HANDLERS: Final[dict[Op, Callable[[Hosts, bytes, int, bytes], None]]] = {
    Op.CALL: Hosts._on_call,
    Op.CANCEL: Hosts._on_cancel,
    Op.HELLO: Hosts._on_hello,
    Op.REGISTER: Hosts._on_register,
    Op.COMMIT: Hosts._on_commit,
    Op.UNREGISTER: Hosts._on_unregister,
    Op.REVIVE: Hosts._on_revive,
    Op.CRASHES: Hosts._on_crashes,
    Op.CRASH: Hosts._on_crash,
    Op.LIST: Hosts._on_list,
    Op.DESCRIBE: Hosts._on_describe,
    Op.HEALTH: Hosts._on_health,
    Op.LEASE: Hosts._on_lease,
    Op.MAPPED: Hosts._on_mapped,
    Op.GIVE_BACK: Hosts._on_give_back,
    Op.BYE: Hosts._on_bye,
}


def _too_many_changes(request: Request) -> SendReply:
    reason = f"{CHANGES_MAX} changes of the registry wait to be written; try again"
    return SendReply(request, "Busy", AbiErrorCode.BUSY, reason)


def _not_for_strangers(request: Request) -> SendReply:
    reason = "crash records hold arguments of other hosts' calls: they are for hosts that connect by the run directory"
    return SendReply(request, "Unauthorized", AbiErrorCode.UNAUTHORIZED, reason)


def _ids_of(packed: bytes) -> list[int]:
    """Read contract ids that travel as one field."""
    return [id_of(packed[start : start + 8]) for start in range(0, len(packed), 8)]


def _not_found(request: Request) -> SendReply:
    return SendReply(request, "ContractNotFound", AbiErrorCode.HOST_CONTRACT_NOT_FOUND, "host contract not found")
