"""The way of an event loop to a broker that comes and goes: as `link`, with tasks in place of threads."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

from luacell.client.async_calls import AsyncCalls
from luacell.client.async_session import AsyncSession
from luacell.client.connection import CONNECT_LIMIT_S, Connection, connect
from luacell.client.link import CLOSED, Place, pauses
from luacell.client.threads import done_in_thread, made_in_thread
from luacell.protocol.errors import BridgeClosed, Unavailable

_NOTHING: Final = "time is up"


class AsyncLink:
    """The asyncio bridge's way to its broker; made by `AsyncLink.open`.

    Attributes:
        place: where the broker is.
        loop: that the bridge is bound to.
        calls: of the session at hand.
    """

    def __init__(self, place: Place, connection: Connection) -> None:
        self.place = place
        self.loop = asyncio.get_running_loop()
        self.calls = AsyncCalls(AsyncSession(connection, self.loop), place.deadlines_us)
        self.is_closed = False
        self._connecting = asyncio.Lock()
        if place.service is not None:
            self.loop.add_reader(place.service.log.descriptor, self._read_log)

    @classmethod
    async def open(cls, place: Place) -> AsyncLink:
        """Connect.

        Raises:
            Unavailable: nobody serves there.
        """
        return cls(place, await _connection(place, CONNECT_LIMIT_S))

    def _read_log(self) -> None:
        assert self.place.service is not None
        if not self.place.service.log.read():
            self.loop.remove_reader(self.place.service.log.descriptor)

    async def renew(self, lost: AsyncCalls, until_s: float) -> AsyncCalls:
        """Return the calls of a session that is not `lost`, connecting where no other task has.

        Args:
            lost: of a session that is at its end.
            until_s: monotonic seconds at which to give up.

        Raises:
            Unavailable: no broker was found in time.
            BridgeClosed: the bridge was closed meanwhile.
        """
        try:
            async with asyncio.timeout(max(0.0, until_s - time.monotonic())):
                await self._connecting.acquire()
        except TimeoutError:
            raise self.place.gone("others are still trying") from None
        try:
            if self.calls is lost and not self.is_closed:
                lost.close()
                self._adopt(await self._connect(until_s))
                lost.session.end()  # nothing was left to be sent, so this takes no time
            if self.is_closed:
                raise BridgeClosed(CLOSED)
            return self.calls
        finally:
            self._connecting.release()

    async def _connect(self, until_s: float) -> Connection:
        reason = _NOTHING
        for pause_s in pauses():
            left_s = until_s - time.monotonic()
            if left_s <= 0 or self.is_closed or self.place.has_ended:
                break
            try:
                return await _connection(self.place, min(left_s, CONNECT_LIMIT_S))
            except Unavailable as error:
                reason = error.message
            await asyncio.sleep(max(0.0, min(pause_s, until_s - time.monotonic())))
        raise self.place.gone("it has ended" if self.place.has_ended else reason)

    def _adopt(self, connection: Connection) -> None:
        """Use a new connection from here on, unless the bridge was closed while it was made."""
        if self.is_closed:
            _undo(connection)
        else:
            self.calls = AsyncCalls(AsyncSession(connection, self.loop), self.place.deadlines_us)

    async def close(self) -> None:
        """Leave the broker, and end it where it is the bridge's own. Does not wait for whoever is connecting."""
        self._leave()
        await done_in_thread(self._end)

    def abandon(self) -> None:
        """Do what `close` does where there is no loop to wait in."""
        self._leave()
        self._end()

    def _leave(self) -> None:
        self.is_closed = True
        service = self.place.service
        if service is not None and not self.loop.is_closed():
            self.loop.remove_reader(service.log.descriptor)
        self.calls.close()

    def _end(self) -> None:
        self.calls.session.end()
        self.place.stop()

    def leave_in_child(self) -> None:
        """Let go, in a forked child, of what is the parent's."""
        self.calls.leave_in_child()
        self.place.leave_in_child()


async def _connection(place: Place, limit_s: float) -> Connection:
    """Connect in a thread: the broker may take its time.

    Raises:
        Unavailable: nobody serves there, or it does not answer.
    """
    return await made_in_thread(lambda: connect(Path(place.where), limit_s), undo=_undo)


def _undo(connection: Connection) -> None:
    connection.close(is_lost=True)
    connection.end()
