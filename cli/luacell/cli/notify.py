"""What systemd is told: that the service is ready, is stopping, and how it is.

Source: sd_notify(3). Nothing is sent where NOTIFY_SOCKET is not set, and nothing ever waits or fails.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import MutableMapping
from typing import Final

VARIABLE: Final = "NOTIFY_SOCKET"


class Notifier:
    """A line to whoever supervises this process.

    Args:
        environment: the variable is taken out of it, so that no child speaks in this process's place.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address = environment.pop(VARIABLE, "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket: socket.socket | None = None
        self._told = ""
        if self._address[:1] in ("/", "\0"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    def ready(self, status: str) -> None:
        """The service can be used."""
        self._send("READY=1", status)

    def stopping(self, status: str) -> None:
        """The service is about to end."""
        self._send("STOPPING=1", status)

    def status(self, status: str) -> None:
        """Tell people how the service is, in one line; nothing is sent when that is what they were told last."""
        if status != self._told:
            self._send("", status)

    def _send(self, state: str, status: str) -> None:
        if self._socket is None:
            return
        self._told = status
        lines = [*([state] if state else []), "STATUS=" + " ".join(status.splitlines())]
        with contextlib.suppress(OSError, ValueError):
            self._socket.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
