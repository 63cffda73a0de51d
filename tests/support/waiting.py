"""Waiting for things to happen: always for an event or a state, always with an end."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import TypeVar

LIMIT_S = 20.0  # for what must happen soon on any machine; no test asserts it
_STEP_S = 0.005

T = TypeVar("T")


def eventually(look: Callable[[], T | None], what: str, limit_s: float = LIMIT_S) -> T:
    """Look until there is something to see, and return it.

    Raises:
        AssertionError: `look` gave nothing true within `limit_s`.
    """
    give_up_s = time.monotonic() + limit_s
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < give_up_s, f"not within {limit_s:g} s: {what}"
        time.sleep(_STEP_S)


def settles(look: Callable[[], T], wanted: T, what: str, limit_s: float = LIMIT_S) -> None:
    """Look until the value is the wanted one.

    Raises:
        AssertionError: it is another one at the end; shows both.
    """
    give_up_s = time.monotonic() + limit_s
    while (seen := look()) != wanted and time.monotonic() < give_up_s:
        time.sleep(_STEP_S)
    assert seen == wanted, what


def readable(descriptor: int, limit_s: float = LIMIT_S) -> bool:
    """Tell whether a descriptor becomes readable within the limit; a pidfd does when its process ends."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(limit_s * 1000))
