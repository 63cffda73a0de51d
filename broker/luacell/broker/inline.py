"""Hosts without shared memory: their bytes come and go in pieces, and the broker fills and empties slots for them.

Workers whose contracts call others are such hosts, too, with one call at a time and a lower bound on its size.

It is such a host inside the broker: to the dispatcher its calls are like any other's. Arguments are copied piece by
piece into a slot, then an ordinary call is made; results are copied out before the slot is free again. It decides
nothing about calls that the dispatcher has.

    WAITING ──slot──> TAKING ──all arguments──> CALLED ──result──> SENDING ──all sent──> SENT ──acknowledged──> gone
       └─── deadline, cancelled, broken ──> failed <── failure ──┘

A host is bounded by its calls in flight, by the bytes of those that wait for memory, by its memory, and by the pieces
that it has not acknowledged. No step copies more than one piece; what cannot be done at once waits in `backlog`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from itertools import count
from typing import Final

from luacell.broker import answers, model
from luacell.broker.books import Refusal
from luacell.broker.dispatcher import Dispatcher
from luacell.broker.inline_memory import IDLE_PAIR_NS, InlineArena, InlineMemory, InlineSlot
from luacell.broker.model import Contract, Effect, SendFailure
from luacell.broker.outbox import Outbox
from luacell.broker.seats import seat_of
from luacell.broker.timers import TimerWheel
from luacell.protocol import headers, messages
from luacell.protocol.errors import AbiErrorCode, ProtocolError
from luacell.protocol.headers import Op
from luacell.protocol.limits import (
    CALLS_IN_FLIGHT_MAX,
    INLINE_HOST_WINDOW,
    INLINE_PIECE,
    INLINE_PROBE_NS,
    INLINE_SMALL_MAX,
    INLINE_STALL_NS,
    INLINE_WINDOW,
    MIB,
    NESTED_PAYLOAD_MAX,
    NS_PER_S,
    NS_PER_US,
    PAYLOAD_MAX,
)
from luacell.protocol.messages import decode, encode

log = logging.getLogger("luacell.broker")

HELD_PER_HOST_MAX: Final = 64 * MIB  # bytes of calls of one host that wait for memory: 256 first pieces
HELD_MAX: Final = 256 * MIB  # the same for all hosts
PROBES_PER_TURN: Final = 256  # hosts probed at once: under 1 ms

_PROBE: Final = encode(messages.Probe())
_BAD: Final = AbiErrorCode.BAD_REQUEST


class State(Enum):
    """Where a call of such a host stands."""

    WAITING = "waiting"
    TAKING = "taking"
    CALLED = "called"
    SENDING = "sending"
    SENT = "sent"
    OVER = "over"


WAITING, TAKING, CALLED, SENDING, SENT, OVER = State


class InlineCall:
    """One call, until its host has everything and its slot is free.

    Attributes:
        id: under which the dispatcher knows it; no two in a broker's life share one, whatever hosts choose.
        asked: as the host sent it.
        first: the first piece of its arguments, while it waits for a slot.
        taken: bytes of arguments in the slot.
        is_released: nobody else can touch the slot.
        total: bytes of results, or of an error's text.
        sent, acked: how many of them were sent, and acknowledged.
        unacked: pieces that were sent and not acknowledged.
    """

    state = WAITING
    slot: InlineSlot | None = None
    taken = 0
    is_released = True
    code = 0
    total = 0
    sent = 0
    acked = 0
    unacked = 0
    timer: int | None = None

    def __init__(
        self,
        number: int,
        host: InlineHost,
        asked: headers.CallInline,
        first: memoryview,
        contract: Contract,
        now_ns: int,
    ) -> None:
        self.id = number
        self.host = host
        self.asked = asked
        self.first = first
        self.title = contract.record.title_of(asked.fn_id)
        self.arrived_ns = now_ns
        budget_us = asked.budget_us if 0 < asked.budget_us < contract.deadline_us else contract.deadline_us
        self.deadline_ns = now_ns + budget_us * NS_PER_US


class InlineHost:
    """One host, and how answers to its calls find it (`outbox.Correspondent`).

    Attributes:
        peer: its routing id.
        calls: by the ids it has chosen, until it has the whole answer.
        held: by the dispatcher's ids, until their slots are free.
        arenas: by contract id.
        held_bytes: of calls that wait for memory.
        open: calls with something to send that their own windows allow.
        unacked: pieces of results that were sent and not acknowledged.
        moved_ns: when it last acknowledged one, or had none to acknowledge.
        probe_ns: when to look next whether it is there.
        is_due: it has a place in the backlog.
        is_worker: it is a worker, whose end is told by its pidfd.
        payload_max: bytes of args, and of out, of a call.
    """

    def __init__(self, peer: bytes, hosts: InlineHosts, now_ns: int, *, is_worker: bool = False) -> None:
        self.peer = peer
        self.is_worker = is_worker
        self.payload_max = NESTED_PAYLOAD_MAX if is_worker else PAYLOAD_MAX
        self._hosts = hosts
        self.calls: dict[int, InlineCall] = {}
        self.held: dict[int, InlineCall] = {}
        self.arenas: dict[int, InlineArena] = {}
        self.held_bytes = 0
        self.open: dict[InlineCall, None] = {}
        self.unacked = 0
        self.moved_ns = now_ns
        self.probe_ns = now_ns + INLINE_PROBE_NS
        self.is_due = False
        self.is_gone = False

    def on_result(self, call: model.Call, code: int, out_size: int, error_size: int, slot_free: bool) -> None:
        """A worker has answered."""
        self._hosts.on_result(self, call, code, error_size if code else out_size, slot_free)

    def on_failure(self, effect: SendFailure) -> None:
        """There is no result, or a message of the host's was none."""
        self._hosts.on_failure(self, effect)

    def on_released(self, number: int) -> None:
        """Nobody else can touch the slot of an answered call."""
        self._hosts.on_released(self, number)


class InlineHosts:
    """All such hosts of one broker.

    Args:
        dispatcher, outbox: the broker's.
        memory: for their arenas.
        perform: performs effects.
        clock: nanoseconds, monotonic.

    Attributes:
        hosts: by routing id; the outbox has the same.
        backlog: hosts and arenas with something to do, one `step` each.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        outbox: Outbox,
        memory: InlineMemory,
        perform: Callable[[Iterable[Effect]], None],
        clock: Callable[[], int],
    ) -> None:
        self._dispatcher = dispatcher
        self._outbox = outbox
        self._memory = memory
        self._perform = perform
        self._clock = clock
        self.hosts: dict[bytes, InlineHost] = {}
        outbox.correspondents = self.hosts
        self.backlog: deque[InlineHost | InlineArena] = deque()
        self._probes: dict[InlineHost, None] = {}  # in order of their next probe
        self._wheel: TimerWheel[InlineCall] = TimerWheel()
        self._ids = count(1)
        self._held_bytes = 0
        self._worker_count = 0

    # -- coming and going -----------------------------------------------------------------------------------------
    def joined(self, peer: bytes) -> None:
        """A host has introduced itself."""
        host = self.hosts[peer] = InlineHost(peer, self, self._clock())
        self._probes[host] = None
        self._dispatcher.host_joined(peer)

    def host_of(self, worker: model.Worker) -> InlineHost:
        """Return what a worker is as a host; from now on it is one."""
        peer = worker.routing_id
        host = self.hosts.get(peer)
        if host is None:
            host = self.hosts[peer] = InlineHost(peer, self, self._clock(), is_worker=True)
            self._probes[host] = None
            self._worker_count += 1
            self._dispatcher.caller_joined(worker)
        return host

    @property
    def count(self) -> int:
        """Hosts that are no workers."""
        return len(self.hosts) - self._worker_count

    def left(self, peer: bytes) -> None:
        """A host is gone, or must go; idempotent."""
        host = self.hosts.pop(peer, None)
        if host is None:
            return
        host.is_gone = True
        self._worker_count -= host.is_worker
        del self._probes[host]
        for call in host.calls.values():
            self._stop_timer(call)
        self._held_bytes -= host.held_bytes
        for arena in host.arenas.values():
            arena.waiting.clear()
        for table in (host.calls, host.held, host.open, host.arenas):
            table.clear()
        self._perform(self._dispatcher.host_left(peer, self._clock()))

    def handles(self, op: Op) -> bool:
        """Whether messages of an operation are for here."""
        return op in HANDLERS

    def on_message(self, host: InlineHost, op: Op, number: int, message: bytes) -> None:
        """Act on a message of a host.

        Raises:
            ProtocolError: it is not one that this host may send now.
        """
        HANDLERS[op](self, host, number, message)

    def _on_bye(self, host: InlineHost, number: int, message: bytes) -> None:
        decode(messages.Bye, message)
        self.left(host.peer)

    # -- arguments ------------------------------------------------------------------------------------------------
    def _on_call(self, host: InlineHost, number: int, message: bytes) -> None:
        record, piece = headers.parse_inline(Op.CALL_INLINE, number, message)
        asked = headers.CallInline._make(record)
        now_ns = self._clock()
        call_number = next(self._ids)
        contract = self._dispatcher.contract_for(host.peer, asked.contract_id)
        if contract is not None:
            contract = seat_of(contract, host.peer, asked.fn_id)
        if host.is_worker and contract is not None and asked.api_sum not in (0, contract.api_sum):
            text = f"{contract.record.title} was replaced: its description is another than the caller's"
            failure = SendFailure(host.peer, 0, AbiErrorCode.STALE_HANDLE, text, "StaleDescription", slot="unused")
            self._fail(host, asked.call_id, failure)
            return
        refusal = self._refusal(host, call_number, asked, contract)
        if refusal is not None:
            self._fail(host, asked.call_id, _refused(host, refusal))
            return
        assert contract is not None
        call = host.calls[asked.call_id] = InlineCall(call_number, host, asked, piece, contract, now_ns)
        arena = host.arenas.get(asked.contract_id)
        if arena is None:
            arena = host.arenas[asked.contract_id] = InlineArena(host, asked.contract_id)
        slot = None if arena.waiting else arena.take(asked.args_size, asked.out_size, now_ns)
        if slot is not None:
            self._begin(call, slot)
        else:
            self._wait(arena, call)

    def _refusal(
        self, host: InlineHost, number: int, asked: headers.CallInline, contract: Contract | None
    ) -> Refusal | None:
        """Return why a call is not accepted, or None."""
        if asked.call_id in host.calls or asked.call_id == 0 or (asked.api_sum and not host.is_worker):
            return Refusal(_BAD, f"call id {asked.call_id} is 0 or in flight, or reserved {asked.api_sum} is not 0")
        for name, size in (("args", asked.args_size), ("out", asked.out_size)):
            if size > host.payload_max:
                text = f"{name} of {size} bytes is over the limit of {host.payload_max}"
                return Refusal(AbiErrorCode.TOO_LARGE, text, f"{host.payload_max} bytes")
        header = _header(number, asked, (0, 0, 0))
        if contract is None:
            return answers.unknown_contract(header)
        session = self._dispatcher.sessions[host.peer]
        if len(host.calls) >= CALLS_IN_FLIGHT_MAX:
            limit = f"calls in flight per host: {CALLS_IN_FLIGHT_MAX}"
            return Refusal(AbiErrorCode.BUSY, f"the bound on {limit} is reached; retry when one has ended", limit)
        return answers.malformed(session, header) or self._dispatcher.over_bound(session, contract, self._clock())

    def _wait(self, arena: InlineArena, call: InlineCall) -> None:
        """Let a call wait for a slot, within the bounds on what may wait."""
        host, size = call.host, len(call.first)
        for held, bound, whose in (
            (host.held_bytes, HELD_PER_HOST_MAX, "of one host"),
            (self._held_bytes, HELD_MAX, "of all hosts"),
        ):
            if held + size > bound:
                limit = f"bytes of calls {whose} that wait for memory: {bound}"
                text = f"the bound on {limit} is reached; retry later"
                self._end_early(call, SendFailure(host.peer, 0, AbiErrorCode.BUSY, text, slot="unused", limit=limit))
                return
        host.held_bytes += size
        self._held_bytes += size
        arena.waiting[call] = None
        call.timer = self._wheel.set(call.deadline_ns, call)
        self._put_in_backlog(arena)

    def _wait_no_more(self, call: InlineCall) -> None:
        arena = call.host.arenas.get(call.asked.contract_id)
        if arena is not None and call in arena.waiting:
            del arena.waiting[call]
            call.host.held_bytes -= len(call.first)
            self._held_bytes -= len(call.first)

    def _begin(self, call: InlineCall, slot: InlineSlot) -> None:
        """Put the first piece of the arguments into the slot, and ask for the rest where there is more."""
        call.slot = slot
        call.host.held[call.id] = call
        call.taken = len(call.first)
        slot.put(0, call.first)
        call.first = memoryview(b"")
        if call.taken == call.asked.args_size:
            self._hand_over(call)
            return
        call.state = TAKING
        if call.timer is None:
            call.timer = self._wheel.set(call.deadline_ns, call)
        self._acknowledge(call)

    def _acknowledge(self, call: InlineCall) -> None:
        self._outbox.send(call.host.peer, headers.encode_records(Op.MORE, [(call.asked.call_id, call.taken, 0)]))

    def _on_piece(self, host: InlineHost, number: int, message: bytes) -> None:
        record, data = headers.parse_inline(Op.PIECE, number, message)
        piece = headers.Piece._make(record)
        call = host.calls.get(piece.call_id)
        if call is None:
            text = f"a piece of call {piece.call_id}, which is not in flight"
            self._fail(host, piece.call_id, SendFailure(host.peer, 0, _BAD, text, slot="unused"))
            return
        if piece.offset + piece.size <= call.taken:  # sent twice: its sender was interrupted, and could not know
            return
        if call.state not in (WAITING, TAKING):
            raise ProtocolError(f"call {piece.call_id} has all its {call.taken} bytes of arguments")
        expected = min(INLINE_PIECE, call.asked.args_size - call.taken)
        if call.state is WAITING or (piece.offset, piece.size) != (call.taken, expected):
            wanted = f"{expected} bytes at {call.taken}" if call.state is TAKING else "none before MORE"
            text = f"a piece of {piece.size} bytes at {piece.offset}, not {wanted}, of {call.asked.args_size} bytes"
            self._end_early(call, SendFailure(host.peer, 0, _BAD, text))
            return
        assert call.slot is not None
        call.slot.put(call.taken, data)
        call.taken += piece.size
        if call.taken == call.asked.args_size:
            self._hand_over(call)
        else:
            self._acknowledge(call)

    def _hand_over(self, call: InlineCall) -> None:
        """All arguments are in the slot: call, as a host with shared memory does."""
        assert call.slot is not None
        self._stop_timer(call)
        call.state = CALLED
        call.is_released = False
        call.slot.stamp()
        header = _header(call.id, call.asked, call.slot.handle)
        self._perform(self._dispatcher.call_arrived(call.host.peer, header, self._clock(), call.arrived_ns))

    def _end_early(self, call: InlineCall, failure: SendFailure) -> None:
        """Fail a call that the dispatcher does not know yet."""
        self._stop_timer(call)
        if call.state is WAITING:
            self._wait_no_more(call)
        self._end(call)
        self._fail(call.host, call.asked.call_id, failure)

    def _stop_timer(self, call: InlineCall) -> None:
        if call.timer is not None:
            self._wheel.cancel(call.timer, call)
            call.timer = None

    # -- answers --------------------------------------------------------------------------------------------------
    def on_result(self, host: InlineHost, known: model.Call, code: int, total: int, slot_free: bool) -> None:
        """A worker has answered a call of a host: send it what lies in the slot."""
        call = host.held.get(known.header.call_id)
        if call is None:
            return
        call.code, call.total, call.is_released = code, total, slot_free
        call.state = SENDING
        if total > INLINE_SMALL_MAX:
            host.open[call] = None
            self._put_in_backlog(host)
            return
        message = self._next_message(call, total)
        self._end(call)
        self._outbox.send(host.peer, message)

    def on_failure(self, host: InlineHost, effect: SendFailure) -> None:
        """The dispatcher says that a call has no result, or the server that a message was none."""
        call = host.held.get(effect.call_id)
        if call is None:
            if effect.call_id == 0:
                self._fail(host, 0, effect)
            return
        call.is_released = effect.slot != "kept"
        self._end(call)
        self._fail(host, call.asked.call_id, effect)

    def on_released(self, host: InlineHost, number: int) -> None:
        """A call's worker has answered for it, or is dead."""
        call = host.held.get(number)
        if call is not None:
            call.is_released = True
            self._free(call)

    def _next_message(self, call: InlineCall, size: int) -> bytes:
        """Encode the next `size` bytes of a call's results."""
        assert call.slot is not None
        call_id, start = call.asked.call_id, call.sent
        call.sent += size
        piece = call.slot.read(start, size)
        if start:
            return headers.encode_inline(Op.PIECE, (call_id, start, size), piece)
        out_size, error_size = (0, call.total) if call.code else (call.total, 0)
        return headers.encode_inline(Op.RESULT_INLINE, (call_id, call.code, out_size, error_size, 0), piece)

    def _send_piece(self, host: InlineHost) -> None:
        """Send one piece of a host's results, its calls taking turns."""
        if not host.open or host.unacked >= INLINE_HOST_WINDOW:
            return
        call = next(iter(host.open))
        del host.open[call]
        message = self._next_message(call, min(INLINE_PIECE, call.total - call.sent))
        if not host.unacked:
            host.moved_ns = self._clock()
        call.unacked += 1
        host.unacked += 1
        if call.sent == call.total:
            call.state = SENT
            self._free(call)
        elif call.unacked < INLINE_WINDOW:
            host.open[call] = None
        self._outbox.send(host.peer, message)
        if host.open:
            self._put_in_backlog(host)

    def _on_more(self, host: InlineHost, number: int, message: bytes) -> None:
        for record in headers.parse_records(Op.MORE, number, message):
            self._take_credit(host, headers.More._make(record))

    def _take_credit(self, host: InlineHost, more: headers.More) -> None:
        call = host.calls.get(more.call_id)
        if call is None or call.state not in (SENDING, SENT) or more.offset <= call.acked:
            return  # late, or said twice
        if more.offset > call.sent or (more.offset % INLINE_PIECE and more.offset != call.total):
            text = f"acknowledges {more.offset} bytes, which is no end of a piece of the {call.sent} sent"
            raise ProtocolError(f"MORE of call {more.call_id} {text}")
        pieces = -(-more.offset // INLINE_PIECE) - -(-call.acked // INLINE_PIECE)
        call.acked = more.offset
        call.unacked -= pieces
        host.unacked -= pieces
        host.moved_ns = self._clock()
        if call.acked == call.total:
            self._end(call)
        elif call.sent < call.total:
            host.open[call] = None
        if host.open:
            self._put_in_backlog(host)

    def _on_cancel(self, host: InlineHost, number: int, message: bytes) -> None:
        for (call_id,) in headers.parse_records(Op.CANCEL, number, message):
            if not host.is_gone:
                self._cancel(host, call_id)

    def _cancel(self, host: InlineHost, call_id: int) -> None:
        call = host.calls.get(call_id)
        if call is not None and call.state is CALLED:
            self._perform(self._dispatcher.call_cancelled(host.peer, call.id, self._clock()))
        elif call is not None and call.state in (WAITING, TAKING):
            text = f"{call.title}: cancelled by its caller"
            self._end_early(call, self._early_failure(call, AbiErrorCode.CANCELLED, text))
        else:  # over, unknown, or its results are under way: nothing more will come
            if call is not None:
                self._end(call)
            self._outbox.send(host.peer, headers.encode_records(Op.RELEASED, [(call_id,)]))

    def _end(self, call: InlineCall) -> None:
        """The host gets nothing more for a call; its slot follows when nobody else can touch it."""
        host = call.host
        call.state = OVER
        host.open.pop(call, None)
        host.unacked -= call.unacked
        call.unacked = 0
        host.calls.pop(call.asked.call_id, None)
        self._free(call)

    def _free(self, call: InlineCall) -> None:
        """Give back a call's slot, unless somebody may touch it or it has something to be sent."""
        if call.slot is None or not call.is_released or call.state not in (SENT, OVER):
            return
        slot, call.slot = call.slot, None
        host = call.host
        host.held.pop(call.id, None)
        slot.give_back()
        arena = host.arenas.get(call.asked.contract_id)
        if arena is not None and arena.waiting:
            self._put_in_backlog(arena)

    def _fail(self, host: InlineHost, call_id: int, effect: SendFailure) -> None:
        """Send a FAILURE; slots mean nothing to its receiver, so none is kept."""
        slot = "unused" if effect.slot == "unused" else "free"
        self._outbox.tell_failure(effect._replace(call_id=call_id, slot=slot))

    # -- one thing at a time --------------------------------------------------------------------------------------
    def step(self) -> None:
        """Do one thing of the backlog; it copies one piece at most."""
        due = self.backlog.popleft()
        due.is_due = False
        if isinstance(due, InlineHost):
            self._send_piece(due)
        else:
            self._serve(due)

    def _put_in_backlog(self, due: InlineHost | InlineArena) -> None:
        if not due.is_due:
            due.is_due = True
            self.backlog.append(due)

    def _serve(self, arena: InlineArena) -> None:
        """Give the first call that waits for memory a slot, or have memory made for it."""
        if not arena.waiting:
            return
        call = next(iter(arena.waiting))
        now_ns, asked = self._clock(), call.asked
        slot = arena.take(asked.args_size, asked.out_size, now_ns)
        if slot is not None:
            self._wait_no_more(call)
            self._begin(call, slot)
        elif arena.is_growing:
            return
        else:
            refusal = self._memory.grow(
                arena, asked.args_size, asked.out_size, now_ns, lambda problem: self._grown(arena, problem)
            )
            if refusal is None:
                return
            self._refuse_memory(call, refusal)
        if arena.waiting:
            self._put_in_backlog(arena)

    def _grown(self, arena: InlineArena, problem: Refusal | None) -> None:
        if problem is not None and arena.waiting:
            self._refuse_memory(next(iter(arena.waiting)), problem)
        if arena.waiting:
            self._put_in_backlog(arena)

    def _refuse_memory(self, call: InlineCall, refusal: Refusal) -> None:
        self._end_early(call, _refused(call.host, refusal))

    # -- time -----------------------------------------------------------------------------------------------------
    @property
    def is_quiet(self) -> bool:
        """Whether a look every second is enough."""
        return self._wheel.next_ns() is None and len(self.hosts) <= PROBES_PER_TURN

    @property
    def owes(self) -> bool:
        """Whether a host has not got the whole answer to a call."""
        return any(host.calls for host in self.hosts.values())

    def time_passed(self, now_ns: int) -> None:
        """Act on everything that is due: deadlines of calls whose arguments have not come, and probes."""
        for call in self._wheel.expired(now_ns):
            call.timer = None
            self._expired(call)
        for _ in range(min(len(self._probes), PROBES_PER_TURN)):
            host = next(iter(self._probes), None)
            if host is None or host.probe_ns > now_ns:
                return
            del self._probes[host]
            self._probes[host] = None
            host.probe_ns = now_ns + INLINE_PROBE_NS
            self._look_after(host, now_ns)

    def _expired(self, call: InlineCall) -> None:
        bound = f"deadline {(call.deadline_ns - call.arrived_ns) / NS_PER_S:g} s"
        arrived = f"{call.taken} of {call.asked.args_size} bytes of its arguments had arrived"
        why = arrived if call.state is TAKING else "it waited for memory"
        text = f"{call.title}: not finished within its {bound}; it was not begun ({why})"
        self._end_early(call, self._early_failure(call, AbiErrorCode.DEADLINE_EXCEEDED, text, bound))

    def _early_failure(self, call: InlineCall, code: AbiErrorCode, text: str, limit: str = "") -> SendFailure:
        queued = (self._clock() - call.arrived_ns) / NS_PER_S
        return SendFailure(call.host.peer, 0, code, text, limit=limit, queued=queued, ran=0.0)

    def _look_after(self, host: InlineHost, now_ns: int) -> None:
        """Find out whether a host is there and takes its results; give back memory that it does not use."""
        if host.unacked and now_ns - host.moved_ns > INLINE_STALL_NS:
            text = f"{host.unacked} pieces of results were not acknowledged for {INLINE_STALL_NS // NS_PER_S} s"
            log.warning("host takes no results; dropping it", extra={"fields": {"peer": host.peer.hex()}})
            self._fail(host, 0, SendFailure(host.peer, 0, AbiErrorCode.UNAVAILABLE, text))
            self.left(host.peer)
            return
        if not host.is_worker:
            self._outbox.send(host.peer, _PROBE)
        for arena in list(host.arenas.values()):
            self._memory.give_back_idle(arena, now_ns - IDLE_PAIR_NS)
            if arena.is_empty:
                host.arenas.pop(arena.contract_id, None)


HANDLERS: Final[dict[Op, Callable[[InlineHosts, InlineHost, int, bytes], None]]] = {
    Op.CALL_INLINE: InlineHosts._on_call,
    Op.PIECE: InlineHosts._on_piece,
    Op.MORE: InlineHosts._on_more,
    Op.CANCEL: InlineHosts._on_cancel,
    Op.BYE: InlineHosts._on_bye,
}


def _refused(host: InlineHost, refusal: Refusal) -> SendFailure:
    code, text, limit, retry_after = refusal
    return SendFailure(host.peer, 0, code, text, slot="unused", limit=limit, retry_after=retry_after)


def _header(number: int, asked: headers.CallInline, handle: tuple[int, int, int]) -> headers.Call:
    """Make a call as a host with shared memory sends it."""
    return headers.Call(
        number,
        asked.contract_id,
        asked.fn_id,
        asked.budget_us,
        *handle,
        asked.flags,
        asked.args_size,
        asked.out_size,
    )
