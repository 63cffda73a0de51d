"""What waits for an answer, and how its thread is woken."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from luacell.protocol import messages
from luacell.protocol.errors import Unavailable
from luacell.protocol.headers import SLOT_FREE

if TYPE_CHECKING:
    from luacell.client.arena import Slot

Answer = tuple[int, ...] | messages.Failure  # the fields of headers.Result, or why there is none


class Bell:
    """Wakes one thread. Unlike threading.Event it bears a signal handler that raises: that one's locks may break."""

    __slots__ = ("_silence",)

    def __init__(self) -> None:
        self._silence = threading.Lock()
        self._silence.acquire()

    def wait(self, limit_s: float) -> None:
        """Wait until it rings, or has rung since the last time."""
        self._silence.acquire(timeout=limit_s)

    def set(self) -> None:
        """Ring. Under the session's lock."""
        if self._silence.locked():
            self._silence.release()


class Pending:
    """Something that waits for its answer: a call or a request.

    Attributes:
        slot: of a call, until it is given back.
        is_sent: the broker may have it.
        is_left: whoever made the call has what it wanted, or has given up.
        is_released: the broker has said that nobody else can touch the slot.
        bell: made when its owner, a thread, waits for another to read.
    """

    call_id = 0
    slot: Slot | None = None
    is_sent = False
    is_done = False
    is_left = False
    is_released = False
    answer: Answer | messages.Reply | messages.Segment | None = None
    descriptors: Sequence[int] = ()
    failure: Unavailable | None = None
    bell: Bell | None = None


def keeps_slot(answer: object) -> bool:
    """Whether somebody may still touch the slot of an answered call."""
    if isinstance(answer, messages.Failure):
        return answer.slot == "kept"
    return isinstance(answer, tuple) and not answer[-1] & SLOT_FREE
