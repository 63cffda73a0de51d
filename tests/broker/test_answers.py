"""The texts and numbers that hosts are told; which event leads to which is in test_dispatcher.py."""

import pytest

from luacell.broker import answers
from luacell.broker.books import Refusal
from luacell.broker.causes import UNKNOWN, Cause, Vitals
from luacell.broker.model import Call, Session
from luacell.protocol.errors import AbiErrorCode, Began
from luacell.protocol.headers import HAS_ARGS, HAS_OUT
from luacell.protocol.limits import DEADLINE_MAX_US, NS_PER_MS
from tests.broker.bench import HOST, SEGFAULT, Bench

TITLE = "0x0000000000000001 fn 7"


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.serve(deadline_us=250_000)
    return bench


@pytest.fixture
def call(bench: Bench) -> Call:
    """A call that was sent 10 ms after it had arrived."""
    call = bench.call()
    call.sent_ns = call.arrived_ns + 10 * NS_PER_MS
    return call


def test_a_refusal_says_that_the_slot_was_not_used(bench: Bench) -> None:
    header = bench.header()
    failure = answers.refused(Session(HOST), header, Refusal(AbiErrorCode.BUSY, "no room", "room: 1"))
    assert (failure.session_id, failure.call_id, failure.code) == (HOST, header.call_id, AbiErrorCode.BUSY)
    assert (failure.message, failure.limit, failure.slot, failure.began) == ("no room", "room: 1", "unused", "no")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"call_id": 0}, "call id 0 "),
        ({"budget_us": DEADLINE_MAX_US + 1}, f"over {DEADLINE_MAX_US} us"),
        ({"flags": HAS_ARGS | HAS_OUT | 4}, "flags 0x7 "),
        ({"flags": HAS_ARGS, "out_size": 1}, "absent buffer"),
        ({"flags": HAS_OUT, "args_size": 1}, "absent buffer"),
    ],
)
def test_a_malformed_call_is_told_what_is_wrong(bench: Bench, change: dict[str, int], text: str) -> None:
    refusal = answers.malformed(Session(HOST), bench.header()._replace(**change))
    assert refusal is not None
    assert refusal.code is AbiErrorCode.BAD_REQUEST
    assert text in refusal.message


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"flags": 0, "args_size": 0, "out_size": 0},
        {"flags": HAS_ARGS, "out_size": 0},
        {"budget_us": DEADLINE_MAX_US},
    ],
)
def test_a_good_call_is_not_malformed(bench: Bench, change: dict[str, int]) -> None:
    assert answers.malformed(Session(HOST), bench.header()._replace(**change)) is None


def test_without_a_reached_bound_nothing_is_over_it(call: Call) -> None:
    assert answers.over_bound(call.session, call.contract, 0, call.session) is None


def test_a_missed_deadline_names_the_budget(call: Call) -> None:
    failure = answers.deadline_exceeded(call, "yes", call.arrived_ns + 260 * NS_PER_MS, slot="kept")
    assert failure.code is AbiErrorCode.DEADLINE_EXCEEDED
    assert failure.message == f"{TITLE}: not finished within its deadline 0.25 s: queued 0.01 s, ran 0.25 s"
    assert (failure.limit, failure.slot, failure.began) == ("deadline 0.25 s", "kept", "yes")
    assert (failure.queued, failure.ran) == (0.01, 0.25)


def test_a_missed_deadline_says_what_the_process_was_doing(call: Call) -> None:
    now_ns, vitals = call.arrived_ns + 260 * NS_PER_MS, Vitals(7_000_000, 1 << 20, "S (sleeping)", "do_sys_poll")
    failure = answers.deadline_exceeded(call, "yes", now_ns, cpu=0.24, vitals=vitals)
    assert failure.message.endswith(": queued 0.01 s, ran 0.25 s, 0.24 s of CPU, state S (sleeping) in do_sys_poll")
    assert (failure.cpu, failure.state, failure.wchan) == (0.24, "S (sleeping)", "do_sys_poll")


def test_another_limit_is_named_in_place_of_the_deadline(call: Call) -> None:
    failure = answers.deadline_exceeded(call, "no", call.sent_ns, limit="run_limit 1 s")
    assert failure.message == f"{TITLE}: not finished within its run_limit 1 s: it was not begun, queued 0.01 s"
    assert (failure.limit, failure.slot) == ("run_limit 1 s", "free")


def test_running_out_of_memory_names_the_limit(call: Call) -> None:
    failure = answers.out_of_memory(call, call.arrived_ns + 260 * NS_PER_MS)
    assert (failure.code, failure.limit, failure.began) == (AbiErrorCode.OUT_OF_MEMORY, "memory 64 MiB", "yes")
    assert failure.message.startswith(f"{TITLE}: used more than its memory 64 MiB")


def test_running_out_of_the_process_s_memory_names_that_limit(call: Call) -> None:
    failure = answers.out_of_memory(call, call.arrived_ns, in_process=True)
    assert (failure.code, failure.limit) == (AbiErrorCode.OUT_OF_MEMORY, "process memory 512 MiB")
    assert "more than its process memory 512 MiB" in failure.message and "raise `max_rss`" in failure.message


def test_a_call_that_was_never_sent_did_not_run(call: Call) -> None:
    call.sent_ns = 0
    failure = answers.cancelled(call, "no", call.arrived_ns + 5 * NS_PER_MS)
    assert (failure.code, failure.queued, failure.ran) == (AbiErrorCode.CANCELLED, 0.005, 0.0)
    assert failure.message == f"{TITLE}: cancelled by its caller"


@pytest.mark.parametrize(
    ("cause", "verdict", "began", "text"),
    [
        (SEGFAULT, "", "yes", "signal 11 (SIGSEGV) while running the call"),
        (SEGFAULT, "it was slow", "yes", "signal 11 (SIGSEGV) while running the call"),
        (Cause(signal=9), "it was slow", "yes", "signal 9 (SIGKILL) while running the call (killed: it was slow)"),
        (UNKNOWN, "its host is gone", "yes", "an unknown cause while running the call (killed: its host is gone)"),
        (Cause(exit_code=0), "", "no", "exit code 0 before it began the call, twice"),
    ],
)
def test_a_crash_names_its_cause(call: Call, cause: Cause, verdict: str, began: Began, text: str) -> None:
    failure = answers.crashed(call, cause, verdict, began, call.sent_ns)
    assert failure.code is AbiErrorCode.WORKER_CRASHED
    assert failure.message == f"{TITLE}: the worker died with {text}"
    assert (failure.signal, failure.exit_code, failure.began) == (cause.signal, cause.exit_code, began)


def test_a_contract_that_no_longer_loads_says_why(call: Call) -> None:
    call.contract.failure = "f.lua:1: oops"
    failure = answers.load_failure(HOST, call.header, call.contract, call.arrived_ns, slot="free")
    assert failure.kind == "ContractLoadFailed"
    assert failure.message == "VM dispatch failed for contract_id=0x0000000000000001 fn_id=7: f.lua:1: oops"


def test_a_call_whose_contract_is_gone_is_told_so(call: Call) -> None:
    failure = answers.unregistered(call)
    assert failure.code is AbiErrorCode.HOST_CONTRACT_NOT_FOUND
    assert "0x0000000000000001 (unregistered meanwhile)" in failure.message
