"""The run directory: made private, locked against a second broker, cleared of what a killed one left.

It knows files and their modes, not what is spoken over the sockets.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Final

from luacell.broker.directories import DirectoryError, make_private, take_lock
from luacell.protocol.memory.channel import SOCKET_PATH_MAX
from luacell.protocol.paths import (
    BROKER_SOCKET,
    BROKER_SOCKET_ASIDE,
    CRASH_PARTIAL,
    CRASH_SOURCES_SUFFIX,
    CRASH_SUFFIX,
    CRASHES_DIRECTORY,
    DESCRIPTOR_SOCKET,
    LOCK_FILE,
    STATE_DIRECTORY,
    STATE_FILES,
)

_BACKLOG: Final = 256


class RunDirectoryError(DirectoryError):
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
        self.broker_socket_aside = path / BROKER_SOCKET_ASIDE
        self.descriptor_socket = path / DESCRIPTOR_SOCKET
        self._check_length()
        make_private(path, "run directory", RunDirectoryError)
        self._lock = take_lock(path / LOCK_FILE, RunDirectoryError, lock_wait_s)
        for stale in (self.broker_socket, self.broker_socket_aside, self.descriptor_socket):
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


def remove_run_directory(path: Path) -> None:
    """Remove a run directory that nobody holds, and what brokers make in it; anything else stays."""
    _remove_sockets(path)
    (path / LOCK_FILE).unlink(missing_ok=True)
    state = path / STATE_DIRECTORY
    if state.is_dir() and not state.is_symlink():
        for name in STATE_FILES:
            (state / name).unlink(missing_ok=True)
        _remove_crashes(state / CRASHES_DIRECTORY)
        with contextlib.suppress(OSError):
            state.rmdir()
    with contextlib.suppress(OSError):
        path.rmdir()


def _remove_crashes(path: Path) -> None:
    """Remove crash records and their directory; anything else in it stays."""
    if path.is_symlink():
        return
    with contextlib.suppress(OSError):
        for file in path.iterdir():
            if file.name == CRASH_PARTIAL or file.suffix in (CRASH_SUFFIX, CRASH_SOURCES_SUFFIX):
                file.unlink(missing_ok=True)
        path.rmdir()


def _remove_sockets(path: Path) -> None:
    for name in (BROKER_SOCKET, BROKER_SOCKET_ASIDE, DESCRIPTOR_SOCKET):
        (path / name).unlink(missing_ok=True)


def _unlink_socket(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise RunDirectoryError(f"{path} is in the way and is no socket; remove it")
        path.unlink()
    except FileNotFoundError:
        return
