"""Calls that wait in threads of their own, and whether they have begun."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from luacell.client import LuacellError, LuaHostBridge


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start work in a thread; what it returns or raises comes to the list."""
    ends: list[Any] = []

    def run() -> None:
        try:
            ends.append(work())
        except LuacellError as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ends


def has_begun(host: LuaHostBridge) -> bool:
    """Whether a call of this bridge's is marked as begun, seen where the bridge sees it."""
    session = host._link.calls.session
    with session.lock:
        pending = list(session.ledger.calls.values())
    return any(each.slot is not None and each.slot.has_begun for each in pending)
