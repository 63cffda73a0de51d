"""Part P of the catalogue: processes and their supervision."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from luacell.client import CallError, DeadlineExceeded, LuaHostBridge, VmRegistrationFailed, WorkerCrashed
from tests.support.contracts import DOUBLE, HEALTHY, PROBE, answers, deploy, failure, refusal
from tests.support.pending import has_begun
from tests.support.processes import Process, Processes, children_of, worker_of
from tests.support.waiting import eventually

pytestmark = pytest.mark.usefixtures("load")

ROOT = Path(__file__).parents[2]
OWN_CHILDREN = ("host.py", "embedded.py")  # numbers of children that are not waited for yet: they cannot be others'
TELL_THE_TIME = ("embedded.py", "crash_keeper.py")  # one compares times of files; the other dates records for people
Thrower = Callable[..., str]


def serves(bridge: LuaHostBridge) -> bool:
    return bridge.call(PROBE, 0, None, 1) == bytes([42])


def test_p00_short_budgets_kill_nobody_s_worker(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("ffi.C.usleep(20000)", "int usleep(unsigned);")
    assert serves(bridge)
    with closing(worker_of(bridge, PROBE)) as worker:
        with ThreadPoolExecutor(8) as pool:
            outcomes = Counter(pool.map(lambda _: outcome(bridge), range(200)))
        assert outcomes.keys() <= {"value", "DeadlineExceeded"}, "1 ms is not held to the millisecond"
        assert outcomes["DeadlineExceeded"] > outcomes["value"]
        assert bridge.call(PROBE, 1, None, 1) == bytes([42])
        assert worker.is_alive


def outcome(bridge: LuaHostBridge) -> str:
    try:
        bridge.call(PROBE, 1, timeout=0.001)
    except CallError as error:
        return type(error).__name__
    return "value"


def test_p01_killed_idle_worker_is_replaced_unseen(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("")
    for _ in range(5):
        assert serves(bridge)
        with closing(worker_of(bridge, PROBE)) as worker:
            worker.kill()
            assert serves(bridge)
            assert worker.ends_within()


def test_p01_killed_spare_is_replaced_unseen(bridge: LuaHostBridge, contract: Thrower) -> None:
    with Processes.of(bridge) as service:
        for _ in range(3):
            spares = {each["pid"] for each in bridge.health()["workers"] if each["state"] == "blank"}
            for worker in service.look_again():
                if worker.pid in spares:
                    worker.kill()
            contract("")
            assert serves(bridge)
            bridge.unregister_host_contract(PROBE)


def test_p03_worker_killed_in_a_call_that_had_begun(bridge: LuaHostBridge, contract: Thrower, directory: str) -> None:
    contract("if fn_id == 1 then while true do end end")
    assert serves(bridge)
    with (
        LuaHostBridge.connect(directory) as caller,  # has no other call
        closing(worker_of(bridge, PROBE)) as worker,
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(failure, caller, PROBE, 1)
        eventually(lambda: has_begun(caller), "the contract spins")
        worker.kill()
        crashed = running.result()
    assert isinstance(crashed, WorkerCrashed)
    assert (crashed.signal, crashed.began) == (signal.SIGKILL, "yes")
    assert serves(bridge)


def test_p05_death_at_each_step_of_a_start_is_seen_by_nobody(bridge: LuaHostBridge, contract: Thrower) -> None:
    with Processes.of(bridge) as service:
        for step_s in (0.0, 0.0005, 0.001, 0.002, 0.004, 0.008):
            known = set(children_of(service.worker_host.pid))
            contract("")  # takes a spare, so that another is started
            kill_next_beside(service.worker_host, known, step_s)
            assert serves(bridge)
            bridge.unregister_host_contract(PROBE)


def kill_next_beside(worker_host: Process, known: set[int], delay_s: float) -> None:
    eventually(lambda: kill_one_beside(worker_host, known, delay_s), "another worker is started")


def kill_one_beside(worker_host: Process, known: set[int], delay_s: float) -> bool:
    for pid in set(children_of(worker_host.pid)) - known:
        with suppress(AssertionError, ProcessLookupError), closing(Process(pid)) as started:
            started.ends_within(delay_s)
            started.kill()
            return started.ends_within()
    return False


@pytest.mark.parametrize(
    ("source", "words"),
    [("local x =\n\nreturn function( end", ":3:"), ("\nrequire('nowhere.to.be.found')", ":2:")],
    ids=["syntax error", "missing module"],
)
def test_p06_contract_that_never_loads_is_not_registered(bridge: LuaHostBridge, source: str, words: str) -> None:
    refused = refusal(bridge, source)
    assert isinstance(refused, VmRegistrationFailed)
    assert words in str(refused)
    assert [str(each) for each in bridge.contracts()] == [HEALTHY]


def test_p17_signals_are_sent_by_pidfd_only() -> None:
    for part in ("broker", "cli", "client", "protocol", "worker"):
        for path in (ROOT / part).rglob("*.py"):
            if path.name not in OWN_CHILDREN:
                assert not re.search(r"\bos\.kill(pg)?\(", path.read_text()), path


def test_p18_starts_and_stops_leave_nothing(bridge: LuaHostBridge) -> None:
    for number in range(40):
        deploy(bridge, DOUBLE)
        assert answers(bridge, PROBE, number)
        bridge.unregister_host_contract(PROBE)


def test_p19_no_decision_reads_the_wall_clock() -> None:
    for part in ("broker", "client", "worker"):
        for path in (ROOT / part).rglob("*.py"):
            if path.name not in TELL_THE_TIME:
                assert "time.time()" not in path.read_text(), path


def test_p22_call_of_a_worker_without_a_processor_is_late_and_not_lost(
    bridge: LuaHostBridge, contract: Thrower
) -> None:
    contract("")
    assert serves(bridge)
    with closing(worker_of(bridge, PROBE)) as worker, ThreadPoolExecutor(4) as pool:
        with worker.stopped():
            calls = [pool.submit(serves, bridge) for _ in range(4)]
            eventually(lambda: bridge.health()["slots_in_flight"] >= 4, "they are in flight")
            late = failure(bridge, PROBE, 0, out_size=1, timeout=0.3)
            assert isinstance(late, DeadlineExceeded)
            assert late.queued is not None
        assert all(call.result() for call in calls)
