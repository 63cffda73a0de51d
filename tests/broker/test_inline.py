"""Hosts without shared memory inside the broker: real dispatcher, books and segments; no sockets, and time by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import zmq

from luacell.broker import inline, model
from luacell.broker.books import Pair
from luacell.broker.inline import InlineHosts
from luacell.broker.inline_memory import IDLE_PAIR_NS, InlineMemory
from luacell.broker.model import DropPair, Effect, SendCall, SendFailure, SendReleased, SendResult
from luacell.broker.outbox import Outbox
from luacell.broker.store import SegmentStore, StoredPair
from luacell.broker.watcher import WorkDone
from luacell.protocol import headers, messages
from luacell.protocol.errors import AbiErrorCode, ProtocolError
from luacell.protocol.headers import HAS_ARGS, HAS_OUT, Op
from luacell.protocol.limits import (
    INLINE_HOST_WINDOW,
    INLINE_PIECE,
    INLINE_PROBE_NS,
    INLINE_STALL_NS,
    INLINE_WINDOW,
    MIB,
    NS_PER_MS,
    NS_PER_S,
    PAYLOAD_MAX,
)
from luacell.protocol.memory.segments import Mapping
from luacell.protocol.slots import PAYLOAD_OFFSET, SLOT_SHIFT
from tests.broker.bench import CONTRACT, Bench
from tests.protocol.support import no_descriptor_left

INLINE_HOST = b"i" * 16
STEPS_MAX = 10_000


class Store(SegmentStore):
    """Real segments, whose control words the bench's memory simulates."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self._bench = bench

    def add(self, pair: Pair, args_fd: int, out_fd: int) -> StoredPair:
        self._bench.memory.add(pair)
        return super().add(pair, args_fd, out_fd)


class Recorded(Outbox):
    """Keeps what is sent, by receiver; a receiver that is gone or does not read is reported as the real one does."""

    def __init__(self, expel: Callable[[bytes], None]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        super().__init__(self._socket, expel)
        self._expel = expel
        self.sent: list[tuple[bytes, bytes]] = []
        self.gone: set[bytes] = set()

    def send(self, peer: bytes, message: bytes) -> None:
        if peer in self.gone:
            self._not_sent(peer, zmq.ZMQError(zmq.EHOSTUNREACH))
        else:
            self.sent.append((peer, message))

    def close(self) -> None:
        self._context.destroy(linger=0)


class Service:
    """A broker with one contract, one idle worker and one host without shared memory."""

    def __init__(self) -> None:
        self.bench = bench = Bench()
        self.store = Store(bench)
        self.ordered: list[Callable[[], WorkDone]] = []
        self.outbox = Recorded(lambda peer: self.hosts.left(peer))
        self.memory = InlineMemory(
            bench.books, self.store, self.ordered.append, lambda pair: self.perform([DropPair(pair)])
        )
        self.calls: list[model.Call] = []
        self.hosts = InlineHosts(bench.dispatcher, self.outbox, self.memory, self.perform, lambda: bench.now_ns)
        self.worker = bench.serve(run_limit_us=60_000_000)
        self.hosts.joined(INLINE_HOST)

    def close(self) -> None:
        self.store.close()
        self.outbox.close()

    def perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendCall():
                    self.calls.append(effect.call)
                case SendResult():
                    self.outbox.send_result(effect)
                case SendFailure():
                    self.outbox.send_failure(effect)
                case SendReleased():
                    self.outbox.send_released(effect)
                case DropPair():
                    self.store.drop(effect.pair)
                    self.bench.memory.drop(effect.pair)

    # -- what happens ---------------------------------------------------------------------------------------------
    def say(self, op: Op, message: bytes, host: bytes = INLINE_HOST) -> None:
        found, count = headers.parse_preamble(message)
        assert found is op
        self.hosts.on_message(self.hosts.hosts[host], op, count, message)

    def call(self, call_id: int, first: bytes = b"x", host: bytes = INLINE_HOST, **fields: int) -> None:
        given: dict[str, int] = {"contract_id": CONTRACT, "args_size": len(first), "out_size": 8} | fields
        given.setdefault("flags", HAS_ARGS | HAS_OUT)
        record = headers.CallInline(call_id=call_id, **(dict.fromkeys(headers.CallInline._fields[1:], 0) | given))
        self.say(Op.CALL_INLINE, headers.head(Op.CALL_INLINE) + headers.CALL_INLINE.pack(*record) + first, host)

    def piece(self, call_id: int, offset: int, data: bytes) -> None:
        self.say(Op.PIECE, headers.encode_inline(Op.PIECE, (call_id, offset, len(data)), data))

    def more(self, call_id: int, offset: int) -> None:
        self.say(Op.MORE, headers.encode_records(Op.MORE, [(call_id, offset, 0)]))

    def cancel(self, call_id: int) -> None:
        self.say(Op.CANCEL, headers.encode_records(Op.CANCEL, [(call_id,)]))

    def work(self, *, orders: bool = True) -> None:
        """Do what is to be done, in the second thread as well."""
        for _ in range(STEPS_MAX):
            if self.hosts.backlog:
                self.hosts.step()
            elif orders and self.ordered:
                self.ordered.pop(0)().tell()
            else:
                return
        raise AssertionError("it never ends")

    def done(self, call: model.Call, out: bytes = b"", code: int = 0, out_size: int | None = None) -> None:
        """The worker writes results, or an error's text, and answers."""
        stored, shape = self.store.get(call.pair), call.pair.shape
        mapping = Mapping(stored.out_fd, shape.out_bytes, writable=True)
        start = (call.header.slot & (1 << SLOT_SHIFT) - 1) * shape.out_stride + PAYLOAD_OFFSET
        mapping.view[start : start + len(out)] = out
        mapping.close()
        size = len(out) if out_size is None else out_size
        self.perform(self.bench.done(call, code, 0 if code else size, size if code else 0))

    def pass_ms(self, duration_ms: float) -> None:
        self.perform(self.bench.pass_ms(duration_ms))
        self.hosts.time_passed(self.bench.now_ns)

    def args_of(self, call: model.Call) -> bytes:
        stored, position = self.store.get(call.pair), call.header.slot & (1 << SLOT_SHIFT) - 1
        start = position * call.pair.shape.args_stride
        assert int.from_bytes(stored.args.view[start : start + 8], "little") == call.header.generation
        return bytes(stored.args.view[start + PAYLOAD_OFFSET :][: call.header.args_size])

    # -- what was said --------------------------------------------------------------------------------------------
    def heard(self, host: bytes = INLINE_HOST) -> list[tuple[Op, Any]]:
        """Take what a host was sent: operation and decoded content."""
        found = [(*headers.parse_preamble(message), message) for peer, message in self.outbox.sent if peer == host]
        self.outbox.sent = [each for each in self.outbox.sent if each[0] != host]
        return [(op, _content(op, count, message)) for op, count, message in found]

    def only(self, op: Op) -> Any:
        ((found, content),) = self.heard()
        assert found is op, (found, content)
        return content

    @property
    def memory_bytes(self) -> int:
        return self.bench.books.total_bytes


def _content(op: Op, count: int, message: bytes) -> Any:
    if op in (Op.RESULT_INLINE, Op.PIECE):
        record, piece = headers.parse_inline(op, count, message)
        return record, bytes(piece)
    if op in (Op.MORE, Op.RELEASED):
        return list(headers.parse_records(op, count, message))
    return messages.decode(messages.Failure if op is Op.FAILURE else messages.Probe, message)


@pytest.fixture
def service() -> Iterator[Service]:
    with no_descriptor_left():
        service = Service()
        yield service
        service.close()


def test_small_call_becomes_an_ordinary_one_and_its_answer_one_message(service: Service) -> None:
    service.call(7, b"hello", fn_id=3)
    service.work()
    (call,) = service.calls
    assert service.args_of(call) == b"hello"
    assert (call.header.fn_id, call.header.args_size, call.header.out_size) == (3, 5, 8)
    service.done(call, b"result 1")
    assert service.only(Op.RESULT_INLINE) == ((7, 0, 8, 0, 0), b"result 1")
    assert not service.bench.books.slots_in_flight


def test_slot_is_used_again_with_a_later_generation(service: Service) -> None:
    for number in range(1, 4):
        service.call(number)
        service.work()
        call = service.calls[-1]
        assert call.header.generation == number
        service.done(call, b"y")
    assert len(service.store) == 1


def test_error_of_the_contract_comes_with_its_text(service: Service) -> None:
    service.call(1)
    service.work()
    service.done(service.calls[0], b"boom", code=102)
    assert service.only(Op.RESULT_INLINE) == ((1, 102, 0, 4, 0), b"boom")


def test_arguments_are_copied_as_they_come_and_acknowledged(service: Service) -> None:
    args = bytes(range(256)) * (3 * INLINE_PIECE // 256) + b"end"
    service.call(1, args[:INLINE_PIECE], args_size=len(args))
    assert service.heard() == [], "no credit before there is a slot"
    service.work()
    assert service.only(Op.MORE) == [(1, INLINE_PIECE, 0)]
    for offset in (INLINE_PIECE, 2 * INLINE_PIECE):
        service.piece(1, offset, args[offset : offset + INLINE_PIECE])
        assert service.only(Op.MORE) == [(1, offset + INLINE_PIECE, 0)]
    assert not service.calls
    service.piece(1, 3 * INLINE_PIECE, b"end")
    assert service.args_of(service.calls[0]) == args
    with pytest.raises(ProtocolError, match="has all its"):
        service.piece(1, 3 * INLINE_PIECE + 3, b"x")


def test_each_step_sends_one_piece_within_the_window_of_the_call(service: Service) -> None:
    total = 12 * INLINE_PIECE + 1
    service.call(1, out_size=total)
    service.work()
    out = bytes(range(251)) * (total // 251 + 1)
    service.done(service.calls[0], out[:total])
    for number in range(INLINE_WINDOW):
        assert service.heard() == [], number
        service.hosts.step()
        op, (record, piece) = service.heard()[0]
        assert op is (Op.PIECE if number else Op.RESULT_INLINE)
        assert piece == out[number * INLINE_PIECE : (number + 1) * INLINE_PIECE]
    assert not service.hosts.backlog, "the window is closed"
    received = INLINE_WINDOW * INLINE_PIECE
    while received < total:
        service.more(1, received)
        service.work()
        for op, (record, piece) in service.heard():
            assert (op, record) == (Op.PIECE, (1, received, len(piece)))
            assert piece == out[received : received + len(piece)]
            received += len(piece)
    service.more(1, total)
    assert not service.hosts.hosts[INLINE_HOST].calls
    assert service.hosts.hosts[INLINE_HOST].unacked == 0


def test_calls_of_a_host_share_a_window_and_take_turns(service: Service) -> None:
    count = INLINE_HOST_WINDOW // INLINE_WINDOW + 2
    for number in range(1, count + 1):
        service.call(number, out_size=16 * INLINE_PIECE)
        service.work()
        service.done(service.calls[-1], b"", out_size=16 * INLINE_PIECE)
    service.work()
    sent = [content[0][0] for _, content in service.heard()]
    assert len(sent) == INLINE_HOST_WINDOW
    service.more(1, sent.count(1) * INLINE_PIECE)
    service.work()
    assert len(service.heard()) == sent.count(1)


def test_slot_of_a_result_is_in_use_until_the_last_piece_was_sent(service: Service) -> None:
    total = (INLINE_WINDOW + 1) * INLINE_PIECE
    service.call(1, out_size=total)
    service.work()
    service.done(service.calls[0], b"", out_size=total)
    service.work()
    service.call(2, out_size=total)
    service.work()
    assert service.calls[1].pair is not service.calls[0].pair
    service.more(1, INLINE_PIECE)
    service.work()
    service.done(service.calls[1])
    service.call(3, out_size=total)
    service.work()
    assert len(service.store) == 2


def test_kept_slot_rests_until_it_is_released(service: Service) -> None:
    service.call(1, budget_us=50_000)
    service.work()
    call = service.calls[0]
    service.bench.begin(call)
    service.pass_ms(60)
    failed = service.only(Op.FAILURE)
    assert (failed.call_id, failed.code, failed.slot) == (1, AbiErrorCode.DEADLINE_EXCEEDED, "free")
    host = service.hosts.hosts[INLINE_HOST]
    assert not host.calls and len(host.held) == 1
    service.done(call, b"late")
    assert service.heard() == [] and not host.held


def test_result_that_came_with_its_slot_kept_is_copied_at_once(service: Service) -> None:
    service.call(1, budget_us=50_000)
    service.work()
    call = service.calls[0]
    service.bench.begin(call)
    service.bench.finish(call, out_size=4)
    service.pass_ms(60)
    assert service.only(Op.RESULT_INLINE)[0] == (1, 0, 4, 0, 0)
    assert service.hosts.hosts[INLINE_HOST].held
    service.done(call, b"done")
    assert service.heard() == [] and not service.hosts.hosts[INLINE_HOST].held


def test_host_that_leaves_gives_everything_back(service: Service) -> None:
    service.call(1, b"x", out_size=16 * MIB)
    service.work()
    service.done(service.calls[0], b"", out_size=16 * MIB)
    service.call(2, bytes(INLINE_PIECE), args_size=MIB)
    service.call(3, b"x", contract_id=CONTRACT)
    service.work()
    service.hosts.left(INLINE_HOST)
    service.hosts.left(INLINE_HOST)
    service.work()
    assert not service.hosts.hosts
    service.done(service.calls[1])
    assert (service.memory_bytes, len(service.store)) == (0, 0)
    assert service.hosts.is_quiet


def test_memory_that_comes_for_a_host_that_has_left_is_closed(service: Service) -> None:
    service.call(1)
    service.work(orders=False)
    assert service.memory_bytes
    service.hosts.left(INLINE_HOST)
    service.work()
    assert (service.memory_bytes, len(service.store)) == (0, 0)


def test_memory_that_the_machine_refuses_is_busy(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("luacell.broker.inline_memory.create_descriptors", refuse)
    service.call(1)
    service.work()
    failed = service.only(Op.FAILURE)
    assert (failed.code, failed.slot) == (AbiErrorCode.BUSY, "unused")
    assert "Cannot allocate memory" in failed.message
    assert service.memory_bytes == 0
    monkeypatch.undo()
    service.call(2)
    service.work()
    assert len(service.calls) == 1


def test_segment_that_cannot_be_sealed_is_busy(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pair: Pair) -> None:
        raise OSError(1, "not sealed")

    monkeypatch.setattr(service.store, "seal", refuse)
    service.call(1)
    service.work()
    assert service.only(Op.FAILURE).code == AbiErrorCode.BUSY
    assert (service.memory_bytes, len(service.store)) == (0, 0)


def test_idle_memory_makes_room_before_a_call_is_refused(service: Service) -> None:
    for number in range(1, 8):  # seven pairs of the largest slots are what a host may have
        service.call(number, bytes(INLINE_PIECE), args_size=PAYLOAD_MAX, out_size=PAYLOAD_MAX)
    service.call(8, bytes(INLINE_PIECE), args_size=PAYLOAD_MAX, out_size=PAYLOAD_MAX)
    service.work()
    *credits, (op, failed) = service.heard()
    assert [each[0] for each in credits] == [Op.MORE] * 7
    assert (op, failed.call_id, failed.code) == (Op.FAILURE, 8, AbiErrorCode.BUSY)
    assert "memory per host" in failed.limit
    service.cancel(3)
    assert service.only(Op.FAILURE).code == AbiErrorCode.CANCELLED
    service.call(9, out_size=8 * MIB, args_size=1)  # fits the idle slot
    service.work()
    service.done(service.calls[-1])
    service.heard()
    service.bench.serve(contract_id=2)
    service.call(10, bytes(INLINE_PIECE), contract_id=2, args_size=PAYLOAD_MAX, out_size=PAYLOAD_MAX)
    service.work()
    assert service.only(Op.MORE) == [(10, INLINE_PIECE, 0)]


def test_idle_pair_is_given_back_after_a_while(service: Service) -> None:
    service.call(1)
    service.work()
    service.pass_ms(IDLE_PAIR_NS / NS_PER_MS + 1)
    assert service.memory_bytes, "it is in use"
    service.done(service.calls[0])
    service.pass_ms(INLINE_PROBE_NS / NS_PER_MS)
    assert (service.memory_bytes, len(service.store)) == (0, 0)
    assert not service.hosts.hosts[INLINE_HOST].arenas


def test_pairs_grow_with_the_calls_that_are_in_flight(service: Service) -> None:
    for number in range(1, 60):
        service.call(number)
    service.work()
    shapes = sorted(pair.shape.count for arena in service.bench.books._arenas.values() for pair in arena.pairs.values())
    assert shapes == [16, 32, 64]
    assert service.hosts.hosts[INLINE_HOST].held_bytes == 0


def test_deadline_counts_from_the_first_piece(service: Service) -> None:
    service.call(1, bytes(INLINE_PIECE), args_size=INLINE_PIECE + 1, budget_us=300_000)
    service.work()
    service.pass_ms(200)
    service.piece(1, INLINE_PIECE, b"x")
    (call,) = service.calls
    assert call.deadline_ns - service.bench.now_ns == 100 * NS_PER_MS
    assert call.sent_ns == service.bench.now_ns


@pytest.mark.parametrize("has_slot", [True, False])
def test_call_that_is_not_complete_at_its_deadline_was_not_begun(service: Service, has_slot: bool) -> None:
    service.call(1, bytes(INLINE_PIECE), args_size=MIB, budget_us=300_000)
    service.work(orders=has_slot)
    assert not service.hosts.is_quiet
    service.pass_ms(310)
    failed = service.heard()[-1][1]
    assert (failed.call_id, failed.code, failed.began) == (1, AbiErrorCode.DEADLINE_EXCEEDED, "no")
    why = f"{INLINE_PIECE} of {MIB} bytes of its arguments had arrived" if has_slot else "it waited for memory"
    assert why in failed.message
    assert failed.queued == pytest.approx(0.31)
    service.work()
    assert not service.hosts.hosts[INLINE_HOST].held_bytes
    assert service.hosts.is_quiet


def test_what_waits_for_memory_is_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inline, "HELD_PER_HOST_MAX", 2 * INLINE_PIECE)
    monkeypatch.setattr(inline, "HELD_MAX", 3 * INLINE_PIECE)
    other = b"j" * 16
    service.hosts.joined(other)
    for number in range(1, 4):
        service.call(number, bytes(INLINE_PIECE), args_size=MIB)
    assert "of one host" in service.only(Op.FAILURE).limit
    for number in range(1, 3):
        service.call(number, bytes(INLINE_PIECE), host=other, args_size=MIB)
    ((_, failed),) = service.heard(other)
    assert (failed.code, failed.call_id) == (AbiErrorCode.BUSY, 2)
    assert "of all hosts" in failed.limit
    service.hosts.left(other)
    service.hosts.joined(other)
    service.call(1, bytes(INLINE_PIECE), host=other, args_size=MIB)
    assert service.heard(other) == [], "what another held counts no more"
    service.work()
    assert [op for op, _ in service.heard()] == [Op.MORE] * 2


def test_contract_that_goes_while_calls_wait_refuses_them_one_by_one(service: Service) -> None:
    for number in range(1, 101):
        service.call(number)
    service.perform(service.bench.unregister())
    service.work()
    heard = service.heard()
    assert len(heard) == 100
    assert {content.code for _, content in heard} == {AbiErrorCode.HOST_CONTRACT_NOT_FOUND}
    assert not service.hosts.hosts[INLINE_HOST].held


def test_host_whose_connection_is_gone_is_found_by_a_probe(service: Service) -> None:
    service.outbox.gone.add(INLINE_HOST)
    service.pass_ms(INLINE_PROBE_NS / NS_PER_MS - 1)
    assert service.hosts.hosts
    service.pass_ms(1)
    assert not service.hosts.hosts
    assert INLINE_HOST not in service.bench.dispatcher.sessions


def test_host_that_goes_while_it_is_answered_is_forgotten(service: Service) -> None:
    service.call(1, out_size=MIB)
    service.work()
    service.outbox.gone.add(INLINE_HOST)
    service.done(service.calls[0], b"", out_size=MIB)
    service.work()
    assert not service.hosts.hosts
    assert service.memory_bytes == 0


def test_probes_of_many_hosts_are_spread(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inline, "PROBES_PER_TURN", 3)
    for number in range(5):
        service.hosts.joined(bytes([number + 1]) * 16)
    assert not service.hosts.is_quiet
    service.pass_ms(INLINE_PROBE_NS / NS_PER_MS)
    assert len(service.outbox.sent) == 3
    service.pass_ms(1)
    assert len({peer for peer, _ in service.outbox.sent}) == 6
    service.pass_ms(1)
    assert len(service.outbox.sent) == 6


def test_host_that_acknowledges_nothing_is_sent_away(service: Service) -> None:
    service.call(1, out_size=MIB)
    service.work()
    service.done(service.calls[0], b"", out_size=MIB)
    service.work()
    service.pass_ms(INLINE_STALL_NS / NS_PER_MS)
    assert service.hosts.hosts
    service.pass_ms(INLINE_PROBE_NS / NS_PER_MS)
    assert not service.hosts.hosts
    failed = service.heard()[-1][1]
    assert (failed.call_id, failed.code) == (0, AbiErrorCode.UNAVAILABLE)
    assert f"{INLINE_STALL_NS // NS_PER_S} s" in failed.message
    assert service.memory_bytes == 0


def test_acknowledgement_said_twice_or_late_is_no_harm(service: Service) -> None:
    service.call(1, out_size=MIB)
    service.work()
    service.done(service.calls[0], b"", out_size=MIB)
    service.work()
    for offset in (INLINE_PIECE, INLINE_PIECE, 0, MIB, MIB, INLINE_PIECE):
        service.more(1, offset)
    assert service.hosts.hosts[INLINE_HOST].unacked == 0
    assert not service.hosts.hosts[INLINE_HOST].calls


def test_failure_that_no_call_has_is_sent_only_where_it_is_for_a_message(service: Service) -> None:
    service.outbox.send_failure(SendFailure(INLINE_HOST, 0, AbiErrorCode.BAD_REQUEST, "no message"))
    assert service.only(Op.FAILURE).message == "no message"
    service.outbox.send_failure(SendFailure(INLINE_HOST, 99, AbiErrorCode.CANCELLED, "an old one"))
    service.outbox.send_released(SendReleased(INLINE_HOST, 99))
    assert service.heard() == []
