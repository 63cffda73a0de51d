"""What both bridges go through: open, closed, or left behind by a fork."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from typing import Protocol

from luacell.client.link import CLOSED, Place
from luacell.protocol.errors import BridgeClosed, BridgeError, BridgeForked, SupportedLanguage


class Way(Protocol):
    """A link, of threads or of an event loop."""

    place: Place

    def leave_in_child(self) -> None:
        """Let go, in a forked child, of what is the parent's."""


class Bridge(ABC):
    """A bridge's state, and what needs nothing else."""

    _state: type[BridgeError] | None = None  # while it is open; else what every use raises
    _finalizer: weakref.finalize[..., object] | None = None  # closes what its user has not

    @abstractmethod
    def _way(self) -> Way | None:
        """Return the link, once there is one."""

    def _joined(self) -> None:
        """Have a fork tell this bridge, from here on."""
        _bridges.add(self)

    def _parted(self, state: type[BridgeError]) -> None:
        self._state = state
        _bridges.discard(self)

    def _check(self) -> None:
        if self._state is BridgeForked:
            raise BridgeForked("this bridge belongs to the parent process; create or connect one after the fork")
        if self._state is not None:
            raise BridgeClosed(CLOSED)

    def _leave_in_child(self) -> None:
        self._state = BridgeForked
        if self._finalizer is not None:
            self._finalizer.detach()
        way = self._way()
        if way is not None:
            way.leave_in_child()

    def _described(self, broker_pid: int) -> str:
        way = self._way()
        kind = "connected" if way is None or way.place.service is None else "embedded"
        state = "open" if self._state is None else self._state.__name__
        return f"<{type(self).__name__} {kind} {state} broker_pid={broker_pid}>"

    def runtime_type(self) -> SupportedLanguage:
        """Return SupportedLanguage.LUA."""
        return SupportedLanguage.LUA


_bridges: weakref.WeakSet[Bridge] = weakref.WeakSet()


def _leave_all_in_child() -> None:
    for bridge in list(_bridges):
        bridge._leave_in_child()


os.register_at_fork(after_in_child=_leave_all_in_child)
