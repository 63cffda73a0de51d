"""Part P of the catalogue: processes and their supervision."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from luacell.client import LuaHostBridge, WorkerCrashed
from tests.support.contracts import PROBE, failure
from tests.support.processes import Processes, worker_of
from tests.support.waiting import eventually

pytestmark = pytest.mark.usefixtures("load")

Thrower = Callable[..., str]


def serves(bridge: LuaHostBridge) -> bool:
    return bridge.call(PROBE, 0, None, 1) == bytes([42])


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


def test_p03_worker_killed_in_a_call_that_had_begun(bridge: LuaHostBridge, contract: Thrower) -> None:
    # The contract says through its first slot of out that it runs; the test sees its pid in a call before.
    contract("if fn_id == 1 then while true do end end")
    assert serves(bridge)
    with closing(worker_of(bridge, PROBE)) as worker, ThreadPoolExecutor(1) as pool:
        running = pool.submit(failure, bridge, PROBE, 1)
        eventually(lambda: spins(worker.pid), "the contract spins")
        worker.kill()
        crashed = running.result()
    assert isinstance(crashed, WorkerCrashed)
    assert (crashed.signal, crashed.began) == (signal.SIGKILL, "yes")
    assert serves(bridge)


def spins(pid: int) -> bool:
    """Tell whether a process has used processor time that only an endless loop uses."""
    with open(f"/proc/{pid}/stat", "rb") as status:
        ticks = int(status.read().rpartition(b")")[2].split()[11])
    return ticks >= 5
