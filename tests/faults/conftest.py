"""Faults are thrown beside a healthy contract, which must not notice; `-p tests.faults.under_load` keeps it busy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from luacell.client import LuaFunction, LuaHostBridge
from tests.faults.levels import OFFERED
from tests.support.contracts import DOUBLE, HEALTHY, PROBE, answers, deploy, function
from tests.support.processes import broker_pid, run_directory, workers_of

DEADLINE = "10s"  # for healthy calls; the others bring a timeout
PAUSE_S = 0.01  # 100 calls a second, less what they take
Thrower = Callable[..., str]


@pytest.fixture
def load(request: pytest.FixtureRequest, bridge: LuaHostBridge) -> Iterator[None]:
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
    assert answers(bridge, HEALTHY)
    before = workers_of(bridge, HEALTHY)
    if request.config.pluginmanager.has_plugin("tests.faults.under_load"):
        with Load(bridge) as load:
            yield
        assert load.failures == []
        assert load.count > 0
    else:
        yield
    assert answers(bridge, HEALTHY)
    assert workers_of(bridge, HEALTHY) == before, "the same worker has served it all the time"


class Load:
    """One thread that calls the healthy contract and checks every answer."""

    def __init__(self, bridge: LuaHostBridge) -> None:
        self.count = 0
        self.failures: list[object] = []
        self._bridge = bridge
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                if not answers(self._bridge, HEALTHY, self.count):
                    self.failures.append(self.count)
            except Exception as error:
                self.failures.append(error)
            self.count += 1
            self._is_over.wait(PAUSE_S)


@pytest.fixture(params=OFFERED)
def level(request: pytest.FixtureRequest) -> str:
    """Give each level of the sandbox in which a contract's fault is thrown."""
    level: str = request.param
    return level


@pytest.fixture
def contract(bridge: LuaHostBridge, level: str) -> Thrower:
    """Deploy a contract whose function has the given body; fn 0 only answers 42, so that it shows that it is served."""

    def thrower(body: str, declarations: str = "", **settings: str | int | bool) -> str:
        source = f'require("ffi").cdef[[{declarations}]]\n' if declarations else ""
        source += function(f"if fn_id > 0 then {body}\nend\nif out ~= nil then out[0] = 42 end")
        return deploy(bridge, source, PROBE, **({"deadline": DEADLINE, "sandbox": level} | settings))

    return thrower


@pytest.fixture
def directory(bridge: LuaHostBridge) -> str:
    """Give the run directory of the service."""
    return run_directory(broker_pid(bridge))
