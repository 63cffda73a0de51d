"""Which faults are due, and who is killed."""

import os
import signal

import pytest

from luacell.cli.demo import faults
from luacell.cli.demo.faults import Fault, FaultPlan
from tests.cli.demo.support import FakeBridge


def test_only_a_worker_of_the_demo_is_killed(bridge: FakeBridge) -> None:
    assert faults.kill_worker(bridge)
    assert bridge.worker.wait() == -signal.SIGKILL
    assert bridge.stranger.poll() is None


def test_a_dead_worker_is_not_killed_again(bridge: FakeBridge) -> None:
    bridge.worker.kill()
    os.waitid(os.P_PID, bridge.worker.pid, os.WEXITED | os.WNOWAIT)
    assert not faults.kill_worker(bridge)


def test_a_process_that_is_no_longer_listed_is_not_killed(bridge: FakeBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    listings = iter([[bridge.worker.pid]])
    monkeypatch.setattr(faults, "worker_pids", lambda _bridge: next(listings, []))
    descriptors_count = len(os.listdir("/proc/self/fd"))
    assert not faults.kill_worker(bridge)
    assert bridge.worker.poll() is None
    assert len(os.listdir("/proc/self/fd")) == descriptors_count


def test_own_crashes_stay_below_quarantine() -> None:
    plan = FaultPlan(2_000)
    due = [fault for index in range(2_000) if (fault := plan.due(index, now=0.0))]
    assert len(due) == 2_000 // faults.FILES_PER_FAULT
    assert due[:4] == list(Fault)
    assert sum(fault in (Fault.NULL, Fault.EXIT) for fault in due) == faults.OWN_CRASHES_MAX
    later = [plan.due(index, now=faults.OWN_CRASHES_WINDOW_S) for index in range(2_000)]
    assert later.count(Fault.NULL) + later.count(Fault.EXIT) == faults.OWN_CRASHES_MAX
