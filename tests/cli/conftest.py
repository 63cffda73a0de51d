"""One service for all tests of a module, and the command to ask it with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from luacell.client import LuaFunction, LuaHostBridge
from tests.support.command import Command
from tests.support.contracts import COUNTER, DOUBLE, HEALTHY, PROBE, deploy, function
from tests.support.serving import Serving

SLOW = "host.slow@1"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Path]:
    """A service with a contract that doubles, one that counts and crashes, and one that never ends."""
    with tempfile.TemporaryDirectory(prefix="cli-") as directory:
        run = Path(directory) / "run"
        with Serving(run), LuaHostBridge.connect(run) as bridge:
            bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
            bridge.register_host_contract(PROBE, LuaFunction(COUNTER))
            deploy(bridge, function("while true do end"), SLOW, deadline="30s")
            yield run


@pytest.fixture(scope="module")
def luacell(endpoint: Path) -> Command:
    return Command(endpoint)
