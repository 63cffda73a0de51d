"""Fixtures of the tests with real processes: one service per module, swept for leaks after each test."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.support")

from luacell.client import LuacellError, LuaHostBridge  # noqa: E402
from tests.support.contracts import unregister_all  # noqa: E402
from tests.support.processes import nothing_left  # noqa: E402

# How long an example takes says something about the machine, nothing about luacell.
settings.register_profile("luacell", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("luacell")


@pytest.fixture(scope="session", autouse=True)
def _interrupts_reach_children() -> None:
    """Shells start what runs in their background with SIGINT ignored, which its children would inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class SharedService:
    """One embedded bridge for many tests; a new one where a test has broken it, so that one failure stays one."""

    def __init__(self) -> None:
        self._bridge: LuaHostBridge | None = None

    def bridge(self) -> LuaHostBridge:
        if self._bridge is not None and not _serves(self._bridge):
            self.close()
        if self._bridge is None:
            self._bridge = LuaHostBridge()
        return self._bridge

    def close(self) -> None:
        if self._bridge is not None:
            self._bridge.close()
            self._bridge = None


def _serves(bridge: LuaHostBridge) -> bool:
    try:
        unregister_all(bridge)
    except LuacellError:
        return False
    return True


@pytest.fixture(scope="module")
def service() -> Iterator[SharedService]:
    """One embedded service for all tests of a module."""
    shared = SharedService()
    yield shared
    shared.close()


@pytest.fixture
def bridge(service: SharedService) -> Iterator[LuaHostBridge]:
    """The module's bridge, without a contract; whatever a test does with it, nothing may be left of it."""
    bridge = service.bridge()
    with nothing_left(bridge, clean=lambda: unregister_all(bridge)):
        yield bridge
