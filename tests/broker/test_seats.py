"""Instances of a typed contract with several workers: spread over seats, each at home in one."""

from __future__ import annotations

from luacell.broker.model import LoadWorker, SendCall, SendFailure, SendReply, Worker
from luacell.broker.quarantine import CRASHES_MAX
from luacell.broker.registry import ContractRecord
from luacell.broker.seats import seat_of
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.limits import QUEUE_MAX
from luacell.protocol.messages import API_MODULE, FETCH, IN_INSTANCE, SEAT_SHIFT, Settings
from tests.broker.bench import CONTRACT, HOST, OTHER_HOST, SEGFAULT, Bench, of_kind, record_of

IN_DEFAULT_FETCH = 0xFFFF_FFFF


def in_seat(seat: int, function: int = 0) -> int:
    return IN_INSTANCE | seat << SEAT_SHIFT | function


def typed_record(workers: int, contract_id: int = CONTRACT) -> ContractRecord:
    settings = Settings(workers=workers)
    return ContractRecord(contract_id, "", None, b"", "=f", {API_MODULE: b"x"}, settings)


class SeatBench(Bench):
    """A bench with a typed contract."""

    def serve_typed(self, workers: int, *, replace: bool = False) -> Worker:
        self.register_record(typed_record(workers), replace=replace)
        worker = self.load_next()
        assert self.only(SendReply).kind == ""
        return worker

    def call_in(self, fn_id: int, host: bytes = HOST) -> Worker | None:
        """Make a call; return the worker that it was handed to, or None."""
        header = self.header(host=host)._replace(fn_id=fn_id)
        self.send(header, host)
        return self.call_of(header.call_id, host).worker

    def worker_for(self, fn_id: int, host: bytes = HOST) -> Worker:
        """Make a call, load the worker that it needs, and answer; return that worker."""
        self.call_in(fn_id, host)
        if not self.has(SendCall):
            self.load_next()
        call = self.sent.call
        worker = self.sent.worker
        self.done(call)
        return worker


def test_each_seat_has_a_worker_of_its_own_and_keeps_it() -> None:
    bench = SeatBench()
    first = bench.serve_typed(3)
    workers = [bench.worker_for(in_seat(seat)) for seat in range(3)]
    assert workers[0] is first
    assert len(set(workers)) == 3
    for seat in (2, 0, 1, 2, 5, 3):
        assert bench.call_in(in_seat(seat, 7)) is workers[seat % 3]
        bench.done(bench.sent.call)


def test_hosts_default_instance_has_a_seat_and_so_has_its_results() -> None:
    bench = SeatBench()
    bench.serve_typed(4)
    contract = bench.catalogue.serving[CONTRACT]
    for host in (HOST, OTHER_HOST):
        home = seat_of(contract, host, 0)
        assert all(seat_of(contract, host, fn_id) is home for fn_id in (5, IN_DEFAULT_FETCH))
        assert seat_of(contract, host, in_seat(1, FETCH)) is contract.seats[1]
    assert {seat_of(contract, bytes([number]) * 16, 0) for number in range(64)} == set(contract.seats)


def test_calls_of_a_busy_seat_wait_while_others_are_idle() -> None:
    bench = SeatBench()
    bench.serve_typed(2)
    one, two = (bench.worker_for(in_seat(seat)) for seat in range(2))
    running = bench.header()._replace(fn_id=in_seat(1))
    bench.send(running)
    for seat in bench.catalogue.serving[CONTRACT].seats:
        seat.window = 0
    assert bench.call_in(in_seat(1)) is None
    assert bench.call_in(in_seat(0)) is one
    bench.done(bench.call_of(running.call_id))
    assert bench.sent.worker is two


def test_seats_together_queue_as_much_as_a_contract_may() -> None:
    bench = SeatBench()
    bench.serve_typed(4)
    for _ in range(QUEUE_MAX // 4):
        bench.call_in(in_seat(1))
    bench.send(bench.header()._replace(fn_id=in_seat(1)))
    assert bench.failure.code is AbiErrorCode.BUSY
    assert bench.call_in(in_seat(0)) is not None


def test_death_of_a_worker_is_that_of_its_seat_only() -> None:
    bench = SeatBench()
    bench.serve_typed(2)
    one, two = (bench.worker_for(in_seat(seat)) for seat in range(2))
    running = bench.header()._replace(fn_id=in_seat(1))
    bench.send(running)
    bench.begin(bench.call_of(running.call_id))
    waiting = bench.header()._replace(fn_id=in_seat(1))
    bench.send(waiting)
    bench.die(two, SEGFAULT)
    assert bench.failure.code is AbiErrorCode.WORKER_CRASHED
    if not bench.has(LoadWorker):
        bench.ready()
    third = bench.only(LoadWorker).worker
    bench.loaded(third)
    assert bench.sent.worker is third
    assert bench.sent.call.header.call_id == waiting.call_id
    assert bench.call_in(in_seat(0)) is one


def test_load_that_fails_in_one_seat_keeps_the_others() -> None:
    bench = SeatBench()
    one = bench.serve_typed(2)
    bench.call_in(in_seat(1))
    bench.loaded(bench.load_start(), "load", "no")
    assert bench.failure.kind == "ContractLoadFailed"
    assert bench.call_in(in_seat(0)) is one


def test_waiting_calls_go_to_the_same_seats_of_what_comes_in_place() -> None:
    bench = SeatBench()
    for before, after in ((2, 3), (3, 1), (1, 2)):
        bench.serve_typed(before, replace=True)
        contract = bench.catalogue.serving[CONTRACT]
        running = [bench.call_in(in_seat(seat)) for seat in range(before)]
        while None in running:
            bench.load_next()
            running[running.index(None)] = bench.sent.worker
        for seat in contract.places:
            seat.window = 0
        waiting = []
        for number in range(6):
            waiting.append(bench.header()._replace(fn_id=in_seat(number)))
            bench.send(waiting[-1])
        bench.serve_typed(after, replace=True)
        successor = bench.catalogue.serving[CONTRACT]
        for number, header in enumerate(waiting):
            assert bench.call_of(header.call_id).contract is successor.places[number % after]
        for worker in running:
            assert worker is not None and worker.call is not None
            bench.done(worker.call)
        for session in bench.dispatcher.sessions.values():
            bench.unregister()
            for call in list(session.calls.values()):
                if call.worker is not None:
                    bench.done(call)
            assert not session.calls


def test_call_taken_back_from_a_replaced_seat_goes_to_the_new_one() -> None:
    bench = SeatBench()
    bench.serve_typed(2)
    bench.worker_for(in_seat(1))
    header = bench.header()._replace(fn_id=in_seat(1))
    bench.send(header)
    old = bench.sent.worker
    bench.serve_typed(2, replace=True)
    bench.die(old, SEGFAULT)
    successor = bench.catalogue.serving[CONTRACT]
    assert bench.call_of(header.call_id).contract is successor.seats[1]


def test_unregistering_fails_the_calls_of_all_seats() -> None:
    bench = SeatBench()
    bench.serve_typed(2)
    bench.call_in(in_seat(1))
    bench.unregister()
    assert bench.only(SendFailure).code is AbiErrorCode.HOST_CONTRACT_NOT_FOUND
    assert not bench.workforce.waiting


def crash_in(bench: SeatBench, seat: int, times: int = CRASHES_MAX, host: bytes = HOST) -> None:
    """Have calls in a seat crash its worker; the last one with another call behind it in each seat."""
    for number in range(times):
        header = bench.header(host=host)._replace(fn_id=in_seat(seat))
        bench.send(header, host)
        call = bench.call_of(header.call_id, host)
        while call.worker is None:
            bench.load_next()
        bench.begin(call)
        if number == times - 1:
            for each in bench.catalogue.serving[CONTRACT].seats:
                each.window = 0
            for other in range(2):
                bench.call_in(in_seat(other), host)
        bench.die(call.worker, SEGFAULT)


def test_what_waits_in_any_seat_rests_when_one_seat_crashes_the_contract() -> None:
    bench = SeatBench()
    bench.serve_typed(2)
    one = bench.worker_for(in_seat(0))
    running = bench.header()._replace(fn_id=in_seat(0))
    bench.send(running)
    others = bench.header(host=OTHER_HOST)._replace(fn_id=in_seat(0))
    for each in bench.catalogue.serving[CONTRACT].seats:
        each.window = 0
    bench.send(others, OTHER_HOST)
    crash_in(bench, 1)
    codes = [failure.code for failure in of_kind(bench.effects, SendFailure)]
    assert sorted(codes) == [AbiErrorCode.WORKER_CRASHED, AbiErrorCode.QUARANTINED, AbiErrorCode.QUARANTINED]
    assert bench.call_of(running.call_id).worker is one
    assert bench.call_of(others.call_id, OTHER_HOST).contract.quarantine.is_in_force
    bench.done(bench.call_of(running.call_id))
    assert bench.sent.call.header.call_id == others.call_id
    bench.send(bench.header()._replace(fn_id=in_seat(0)))
    assert bench.failure.code is AbiErrorCode.QUARANTINED


def test_what_comes_in_place_of_seats_that_crash_does_not_rest() -> None:
    bench = SeatBench()
    bench.serve_typed(2)
    crash_in(bench, 1, CRASHES_MAX - 1)
    bench.call_in(in_seat(1))
    while not bench.has(SendCall):
        bench.load_next()
    call, old = bench.sent.call, bench.sent.worker
    bench.begin(call)
    bench.serve_typed(2, replace=True)
    bench.call_in(in_seat(0))
    bench.die(old, SEGFAULT)
    assert [failure.code for failure in of_kind(bench.effects, SendFailure)] == [AbiErrorCode.WORKER_CRASHED]
    assert not bench.catalogue.serving[CONTRACT].quarantine.is_in_force


def test_raw_contracts_have_no_seats_and_need_to_say_that_they_are_stateless() -> None:
    assert record_of(workers=3, stateless=True).seats == 0
    assert typed_record(1).seats == 0
    bench = SeatBench()
    bench.register(workers=2)
    assert "of a raw contract needs stateless = true" in bench.only(SendReply).reason
    bench.serve(workers=3, stateless=True)
    contract = bench.catalogue.serving[CONTRACT]
    assert contract.places == (contract,)
    assert seat_of(contract, HOST, in_seat(2)) is contract
