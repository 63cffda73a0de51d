"""The run directory: made private, locked against a second broker, cleared of what a killed one left.

It knows files and their modes, not what is spoken over the sockets.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import time
from pathlib import Path
from typing import Final

from luacell.protocol.errors import LuacellError
from luacell.protocol.memory.channel import SOCKET_PATH_MAX
from luacell.protocol.paths import BROKER_SOCKET, DESCRIPTOR_SOCKET, LOCK_FILE

_BACKLOG: Final = 256
_LOCK_RETRY_S: Final = 0.01


class RunDirectoryError(LuacellError):
    """The run directory cannot be used; the text names the path and what to do."""


class RunDirectory:
    """A run directory that this process holds.

    Args:
        path: made with mode 0700 where it is missing.
        lock_wait_s: seconds to wait for a broker that is about to be gone.

    Raises:
        RunDirectoryError: it is not ours alone, a socket path is too long, or another broker holds it.
    """

    def __init__(self, path: Path, lock_wait_s: float = 0.0) -> None:
        self.path = path
        self.broker_socket = path / BROKER_SOCKET
        self.descriptor_socket = path / DESCRIPTOR_SOCKET
        self._check_length()
        self._make()
        self._lock = self._take_lock(lock_wait_s)
        for stale in (self.broker_socket, self.descriptor_socket):
            _unlink_socket(stale)

    def listen(self) -> socket.socket:
        """Return the descriptor socket, bound and listening, for this user alone."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        listener.bind(os.fspath(self.descriptor_socket))
        self.descriptor_socket.chmod(0o600)
        listener.listen(_BACKLOG)
        return listener

    def close(self, *, remove: bool) -> None:
        """Remove the sockets and give the lock back; with `remove` the directory goes too."""
        if remove:
            remove_run_directory(self.path)
        else:
            _remove_sockets(self.path)
        os.close(self._lock)

    def _check_length(self) -> None:
        for path in (self.broker_socket, self.descriptor_socket):
            size = len(os.fsencode(path))
            if size > SOCKET_PATH_MAX:
                raise RunDirectoryError(
                    f"socket path {path} has {size} bytes; the system's limit is {SOCKET_PATH_MAX}: "
                    "choose a shorter --run-dir"
                )

    def _make(self) -> None:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.lstat()
        except OSError as error:
            raise RunDirectoryError(f"cannot make the run directory {self.path}: {error.strerror}") from None
        if not stat.S_ISDIR(found.st_mode):
            raise RunDirectoryError(f"run directory {self.path} is no directory (symbolic links are refused)")
        if found.st_uid != os.geteuid():
            raise RunDirectoryError(f"run directory {self.path} belongs to uid {found.st_uid}, not to {os.geteuid()}")
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o077:
            raise RunDirectoryError(
                f"run directory {self.path} has mode {mode:04o}, open to others; use 0700: chmod 700 {self.path}"
            )

    def _take_lock(self, wait_s: float) -> int:
        path = self.path / LOCK_FILE
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise RunDirectoryError(f"cannot open {path}: {error.strerror}") from None
        give_up_s = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except OSError:
                if time.monotonic() >= give_up_s:
                    os.close(lock)
                    raise RunDirectoryError(f"another broker serves {self.path} (it holds {path})") from None
            time.sleep(_LOCK_RETRY_S)


def remove_run_directory(path: Path) -> None:
    """Remove a run directory that nobody holds, and what brokers make in it; anything else stays."""
    _remove_sockets(path)
    (path / LOCK_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.rmdir()


def _remove_sockets(path: Path) -> None:
    for name in (BROKER_SOCKET, DESCRIPTOR_SOCKET):
        (path / name).unlink(missing_ok=True)


def _unlink_socket(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise RunDirectoryError(f"{path} is in the way and is no socket; remove it")
        path.unlink()
    except FileNotFoundError:
        return
