"""Whether strangers may connect: the broker's socket has no name while descriptors are short. And how many have.

libzmq aborts the process when its ipc listener meets EMFILE (4.3.5, `ipc_listener.cpp:297`). `bounds` divides the
descriptors but for a reserve among hosts, workers and segments; connections that never say who they are take what they
like. So a thread hears of each one that libzmq accepts, and when the reserve is touched it takes the socket's name
away: whoever is connected is served on, and whoever connects finds nothing and tries again. It does not
end connections: those without a handshake libzmq drops itself, and then the name is given back. What libzmq takes for
its first protocol version, which had no handshake, stays until it ends (random bytes and HTTP may look so).

    open ── the reserve is touched ──> shut ── it is whole again ──> open
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import struct
import threading
from pathlib import Path
from typing import Final

import zmq

from luacell.broker.bounds import usable_descriptors

log = logging.getLogger("luacell.broker")

LOOK_MS: Final = 50  # between looks while it is shut
HEARD_MAX: Final = 16  # connections between two looks while it is open
BACKLOG: Final = 64  # connections that the kernel holds for libzmq, and which it accepts without a name as well

_EVENTS: Final = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_MONITOR_STOPPED
_ENDPOINT: Final = "inproc://gate"
_EVENT: Final = struct.Struct("=Hi")  # zmq_socket_monitor(3): number and value; pyzmq's own parser imports asyncio
_OPEN_DESCRIPTORS: Final = "/proc/self/fd"


class Gate:
    """One thread behind a monitor of the ROUTER; made before the ROUTER is bound.

    Args:
        context: of the ROUTER.
        router: whose connections are counted.
        path: of the socket that it will be bound to.
        aside: where that is while the gate is shut.
        descriptors: RLIMIT_NOFILE.

    Attributes:
        connections: how many there have been, for those who ask how the broker is: `accepted` ones, `handshakes` among
            them, and `strangers`: those that have, or had, none. Written by the thread, read by anybody.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        router: zmq.Socket[bytes],
        path: Path,
        aside: Path,
        descriptors: int,
    ) -> None:
        self._router = router
        self._path = path
        self._aside = aside
        self._limit = usable_descriptors(descriptors)
        self._is_open = True
        self.connections = {"accepted": 0, "handshakes": 0, "strangers": 0}
        router.setsockopt(zmq.BACKLOG, BACKLOG)
        router.monitor(_ENDPOINT, _EVENTS)
        # Connected here: libzmq's thread would wait for somebody to hear of the first connection.
        self._events = context.socket(zmq.PAIR)
        self._events.connect(_ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="luacell-gate", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; the socket has its name again. Called by the ROUTER's thread."""
        self._router.disable_monitor()
        self._thread.join()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            while self._hear():
                self._look()
            if not self._is_open:
                self._open()
        finally:
            self._events.close(linger=0)

    def _hear(self) -> bool:
        """Wait for connections, or while the gate is shut for a moment; tell whether to go on.

        What has come is heard together, up to HEARD_MAX: libzmq accepts as fast as this thread could look after each.
        """
        if not self._events.poll(None if self._is_open else LOOK_MS):
            return True
        connections = self.connections
        with contextlib.suppress(zmq.Again):
            for _ in range(HEARD_MAX):
                event, _ = _EVENT.unpack(self._events.recv(zmq.NOBLOCK))
                self._events.recv()  # whose it is, which comes with it
                if event == zmq.EVENT_MONITOR_STOPPED:
                    return False
                connections["accepted" if event == zmq.EVENT_ACCEPTED else "handshakes"] += 1
        connections["strangers"] = connections["accepted"] - connections["handshakes"]
        return True

    def _look(self) -> None:
        count = _open_descriptors()
        if self._is_open and count > self._limit:
            os.rename(self._path, self._aside)
            self._is_open = False
            fields = {"descriptors": count, "limit": self._limit}
            log.warning("accepting pauses: descriptors are short", extra={"fields": fields})
        elif not self._is_open and count <= self._limit:
            self._open()
            log.warning("accepting goes on", extra={"fields": {"descriptors": count, "limit": self._limit}})

    def _open(self) -> None:
        os.rename(self._aside, self._path)
        self._is_open = True


def _open_descriptors() -> int:
    """Count this process's descriptors; Linux before 6.2 does not tell the number, but their names."""
    return os.stat(_OPEN_DESCRIPTORS).st_size or len(os.listdir(_OPEN_DESCRIPTORS))
