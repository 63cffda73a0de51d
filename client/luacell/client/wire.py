"""What a session needs of its connection to the ROUTER, whichever way that is made: one message after the other.

A wire is used under the session's lock. A signal handler may raise in the middle of any of its methods, or make a call
on the same session there; both must cost nothing but that something is done twice, which does no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from luacell.client.pending import Pending

HIGH_WATER_MARK: Final = 4096  # messages that wait to be sent

Take = Callable[[bytes], None]


class WireFull(Exception):
    """The broker takes no messages.

    Attributes:
        is_slow: it is there, and does not read as fast as we send; else it may be gone.
    """

    def __init__(self, *, is_slow: bool = False) -> None:
        super().__init__()
        self.is_slow = is_slow


class Wire(Protocol):
    """One connection.

    Attributes:
        forgets: its descriptor reports only what came after the last look, and sending is one: whoever sends reads
            what there is.
        is_at_end: the broker has closed it.
    """

    @property
    def forgets(self) -> bool:
        """See above."""

    @property
    def is_at_end(self) -> bool:
        """See above."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when something has come."""

    def send(self, message: bytes) -> None:
        """Send a message, now or as soon as there is room: see `has_unsent`.

        Raises:
            WireFull: too many wait already, or the broker is gone.
        """

    @property
    def has_unsent(self) -> bool:
        """Whether messages wait for room, which the descriptor reports by being writable; `flush` sends them."""

    def flush(self) -> None:
        """Send as much as there is room for."""

    def read_result(self, pending: Pending, calls: dict[int, Pending], take: Take) -> bool:
        """Take the next message where it is just the result of this call, and nothing else has come.

        Args:
            pending: the call; gets its answer.
            calls: those that wait; it is removed from them.
            take: what else may come by the way goes there.

        Returns:
            Whether it was so; else `read` goes on.
        """

    def read(self, take: Take, most: int | None = None) -> bool:
        """Take every message that is there, or the first `most`; return whether there may be more.

        Raises:
            ProtocolError: what came is no message.
        """

    def may_speak(self) -> bool:
        """Whether something may still come of a broker that is gone."""

    def close(self, *, is_lost: bool) -> None:
        """Close it; what was sent last still leaves, unless the broker is gone. `end` follows."""

    def end(self) -> None:
        """Wait until it has left. Not under the lock."""

    def leave_in_child(self) -> None:
        """Close, in a forked child, what would hide the parent's death from the broker."""
