"""Ten thousand connections that never say who they are: dropped, and the broker's memory and descriptors stay flat."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from luacell.client import LuaFunction, LuaHostBridge
from tests.soak.report import Report
from tests.support.contracts import DOUBLE, HEALTHY, answers
from tests.support.processes import broker_pid, has_its_spares, resident_kib
from tests.support.serving import Serving
from tests.support.strangers import Strangers
from tests.support.waiting import eventually, settles

WAVE = 1000
GROWTH_MAX_KIB = 1024  # from the end of the second wave to the last


def wave(run_directory: Path | str, broker: int, number: int, *, patient: bool) -> int:
    """Connect so many times; return the broker's memory in KiB when it has none of the connections left.

    Args:
        run_directory: of the broker.
        broker: its pid.
        number: connections.
        patient: wait until they are dropped, instead of closing them.
    """
    descriptors = Path(f"/proc/{broker}/fd")
    before = len(os.listdir(descriptors))
    with Strangers(run_directory) as strangers:
        assert strangers.connect(number) == number
        if patient:
            settles(lambda: len(os.listdir(descriptors)), before, "silent connections are dropped")
    settles(lambda: len(os.listdir(descriptors)), before, "connections that were closed are gone")
    return resident_kib(broker)


def run(seed: int, connections: int = 10_000) -> Report:
    """Connect so many times in waves, the last of which waits until it is dropped."""
    violations = []
    with tempfile.TemporaryDirectory(prefix="strangers-") as directory:
        run_directory = Path(directory) / "run"
        run_directory.mkdir(mode=0o700)
        with Serving(run_directory), LuaHostBridge.connect(run_directory) as bridge:
            bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
            broker = broker_pid(bridge)
            eventually(lambda: has_its_spares(bridge), "no worker is about to be started")
            waves = connections // WAVE
            memory = [wave(run_directory, broker, WAVE, patient=number == waves) for number in range(1, waves + 1)]
            if not answers(bridge, HEALTHY) or broker_pid(bridge) != broker:
                violations.append("the broker is another one")
    if memory[-1] - memory[1] > GROWTH_MAX_KIB:
        violations.append(f"the broker has grown by {memory[-1] - memory[1]} KiB since the second wave")
    figures = {"connections": str(waves * WAVE), "broker, KiB": ", ".join(map(str, memory))}
    return Report("silent connections", figures, violations)
