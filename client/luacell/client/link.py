"""The way to a broker that comes and goes: the session at hand, and another one when that is lost.

Whoever finds the broker gone connects anew, one caller at a time and for as long as its own call may take; the others
wait for it. What belonged to the lost session is let go. It decides nothing about calls: whether one may be sent again
is the bridge's business.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from luacell.client.arguments import Arguments
from luacell.client.calls import Calls
from luacell.client.connection import CONNECT_LIMIT_S
from luacell.client.embedded import EmbeddedService
from luacell.client.endpoint import inline_address_of, run_directory_of
from luacell.client.session import Session
from luacell.protocol.errors import BridgeClosed, Unavailable
from luacell.protocol.limits import DEADLINE_DEFAULT_US, US_PER_S

if TYPE_CHECKING:
    from luacell.client.inline import InlineCalls

PAUSE_FIRST_S: Final = 0.01
PAUSE_MAX_S: Final = 0.25
CLOSED: Final = "this bridge was closed; create or connect another one"


def pauses() -> Iterator[float]:
    """Yield the seconds to wait between one attempt to connect and the next."""
    pause_s = PAUSE_FIRST_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, PAUSE_MAX_S)


def may_look_again(error: Unavailable, is_open: bool) -> bool:
    """Tell whether a call or request found the broker gone and was never sent, so that it may be sent again.

    Args:
        error: how it failed.
        is_open: whether its session is there.
    """
    return error.began == "no" and not is_open


class Budget:
    """The time that a call or request may take in all, looking for the broker included.

    Args:
        timeout_us: as the caller gave it, or 0.
        deadline_us: of the contract when last heard of, or 0.
    """

    def __init__(self, timeout_us: int = 0, deadline_us: int = 0) -> None:
        self._is_set = bool(timeout_us or deadline_us)
        smaller_us = min(timeout_us or deadline_us, deadline_us or timeout_us) or DEADLINE_DEFAULT_US
        self.until_s = time.monotonic() + smaller_us / US_PER_S

    @classmethod
    def of(cls, arguments: Arguments, place: Place) -> Budget:
        """Return the budget of a call."""
        return cls(arguments.timeout_us, place.deadlines_us.get(arguments.contract_id, 0))

    @property
    def left_s(self) -> float:
        """Seconds that are left; 0 when there are none."""
        return max(0.0, self.until_s - time.monotonic())

    def left_us(self) -> int:
        """Return the timeout for a call that is sent now; 0, the contract's own, where nothing was set."""
        return max(1, int(self.left_s * US_PER_S)) if self._is_set else 0


class Place:
    """Where the broker is, and whose it is.

    Args:
        where: run directory of the broker, or for a host without shared memory its address.
        service: that runs it, where it is the bridge's own.
    """

    def __init__(self, where: Path | str, service: EmbeddedService | None) -> None:
        self.where = where
        self.service = service
        self.deadlines_us: dict[int, int] = {}  # of contracts, as last heard of; as many as contracts were called

    @property
    def has_ended(self) -> bool:
        """Whether no broker will ever be there again."""
        return self.service is not None and self.service.has_ended

    def read_log(self) -> None:
        """Turn what the bridge's own service has written into log records."""
        if self.service is not None:
            self.service.log.read()

    def stop(self) -> None:
        """End the broker where it is the bridge's own."""
        if self.service is not None:
            self.service.stop()

    def leave_in_child(self) -> None:
        """Close, in a forked child, what is the parent's."""
        if self.service is not None:
            self.service.log.leave_in_child()

    def gone(self, reason: str) -> Unavailable:
        """Return the error for a call that did not find a broker in its time."""
        kind = "the embedded service" if self.service is not None else "the broker"
        return Unavailable(f"{kind} at {self.where} cannot be reached: {reason}", began="no")


def place_of(endpoint: str | os.PathLike[str] | None) -> Place:
    """Return the place that an endpoint names.

    Raises:
        ValueError: the endpoint is malformed.
    """
    return Place(inline_address_of(endpoint) or run_directory_of(endpoint), None)


class Link:
    """The threaded bridge's way to its broker.

    Args:
        place: where the broker is.

    Attributes:
        calls: of the session at hand.

    Raises:
        Unavailable: nobody serves there.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.is_closed = False
        self._connecting = threading.Lock()
        self.calls = self._made(CONNECT_LIMIT_S)

    def _made(self, limit_s: float) -> Calls | InlineCalls:
        """Connect.

        Raises:
            Unavailable: nobody serves there, or it does not answer within `limit_s` seconds.
        """
        where = self.place.where
        if isinstance(where, str):
            # Not at the top: hosts that share memory do without libzmq, its 12 ms and its 3 MB.
            from luacell.client.inline import InlineCalls, InlineSession

            return InlineCalls(InlineSession.reach(where, limit_s))
        session = Session.connect(where, limit_s)
        if self.place.service is not None:
            session.watch_aside(self.place.service.log.descriptor, self.place.service.log.read)
        return Calls(session, self.place.deadlines_us)

    def renew(self, lost: Calls | InlineCalls, until_s: float) -> Calls | InlineCalls:
        """Return the calls of a session that is not `lost`, connecting where nobody else has.

        Args:
            lost: of a session that is at its end.
            until_s: monotonic seconds at which to give up.

        Raises:
            Unavailable: no broker was found in time.
            BridgeClosed: the bridge was closed meanwhile.
        """
        if not self._connecting.acquire(timeout=max(0.0, until_s - time.monotonic())):
            raise self.place.gone("others are still trying")
        try:
            if self.calls is lost and not self.is_closed:
                lost.close()
                self.calls = self._connect(until_s)
                if self.is_closed:  # while it was made
                    self.calls.close()
            if self.is_closed:
                raise BridgeClosed(CLOSED)
            return self.calls
        finally:
            self._connecting.release()

    def _connect(self, until_s: float) -> Calls | InlineCalls:
        reason = "time is up"
        for pause_s in pauses():
            left_s = until_s - time.monotonic()
            if left_s <= 0 or self.is_closed or self.place.has_ended:
                break
            try:
                return self._made(min(left_s, CONNECT_LIMIT_S))
            except Unavailable as error:
                reason = error.message
            time.sleep(max(0.0, min(pause_s, until_s - time.monotonic())))
        raise self.place.gone("it has ended" if self.place.has_ended else reason)

    def close(self) -> None:
        """Leave the broker, and end it where it is the bridge's own. Does not wait for whoever is connecting."""
        self.is_closed = True
        self.calls.close()
        self.place.stop()

    def leave_in_child(self) -> None:
        """Let go, in a forked child, of what is the parent's."""
        self.calls.leave_in_child()
        self.place.leave_in_child()
