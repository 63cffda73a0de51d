"""A service whose n-th operation of a kind fails: `python failing.py CONTROL MODULE OPTIONS…`, and who controls it.

The program wraps what can fail (system calls as Python makes them, SQLite's statements, libzmq's sends) and then runs
the parent, the broker or the worker host as they are; children of the parent are wrapped in the same way, and forked
workers inherit it. Which operation of which process fails, the how-manieth and with what error is told by a file that
all of them have mapped; a test writes it while they run (`Control`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import runpy
import select
import signal
import socket
import sqlite3
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Final, Self

# What can fail, and how it does: by errno, SQLite by its own numbers.
OPERATIONS: Final[dict[str, tuple[int, ...]]] = {
    "memfd_create": (errno.ENOMEM, errno.EMFILE, errno.ENFILE),
    "fallocate": (errno.ENOSPC, errno.ENOMEM),
    "seal": (errno.EBUSY,),
    "mmap": (errno.ENOMEM,),
    "pidfd_open": (errno.EMFILE, errno.ENOMEM),
    "peer_pidfd": (errno.EMFILE, errno.ESRCH),
    "fork": (errno.EAGAIN, errno.ENOMEM),
    "pipe": (errno.EMFILE,),
    "socketpair": (errno.EMFILE, errno.ENFILE),
    "bind": (errno.EACCES, errno.EADDRINUSE, errno.ENOSPC),
    "zmq_bind": (errno.EACCES, errno.EADDRINUSE),
    "accept": (errno.EMFILE, errno.ECONNABORTED),
    "recv": (errno.ECONNRESET, errno.ENOMEM),
    "send": (errno.EPIPE, errno.ENOBUFS, errno.EAGAIN),
    "send_descriptors": (errno.ETOOMANYREFS, errno.EPIPE, errno.EAGAIN),
    "zmq_send": (errno.EAGAIN,),  # EHOSTUNREACH is said of a peer that is gone, only
    "epoll_ctl": (errno.ENOSPC, errno.ENOMEM),
    "poll": (errno.ENOMEM,),
    "waitid": (errno.ECHILD,),
    "kill": (errno.EPERM,),  # ESRCH is said of a process that is gone, only
    "sqlite": (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_BUSY),
    "log": (errno.ENOSPC, errno.EAGAIN, errno.EPIPE),
}
ROLES: Final = ("parent", "broker", "worker host", "worker")
_NUMBERS: Final = {name: number for number, name in enumerate(OPERATIONS, 1)}
_OPERATION, _ROLE, _CODE, _LEFT, _SEEN, _FAILED = range(6)  # the words of the file
_SIZE: Final = 6 * 4
_WRITES: Final = ("INSERT", "UPDATE", "DELETE", "REPLACE", "COMMIT", "BEGIN")


class Control:
    """What is to fail, as the test sees it.

    Args:
        path: of the file; made anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(_SIZE))
        self._words = _map(path)

    def arm(self, operation: str, role: str, code: int, number: int) -> None:
        """Let the `number`-th of these operations from now on fail, in processes of this role, once."""
        words = self._words
        words[_OPERATION] = 0
        words[_ROLE], words[_CODE], words[_LEFT] = ROLES.index(role), code, number
        words[_SEEN] = words[_FAILED] = 0
        words[_OPERATION] = _NUMBERS[operation]

    def disarm(self) -> bool:
        """Let nothing fail any more; tell whether something did."""
        self._words[_OPERATION] = 0
        return bool(self._words[_FAILED])

    @property
    def has_failed(self) -> bool:
        """Whether the operation was met."""
        return bool(self._words[_FAILED])

    def close(self) -> None:
        self._words.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def program(control: Control) -> list[str]:
    """Return what to give Python instead of "-m luacell.cli.serve"."""
    return [__file__, str(control.path), "luacell.cli.serve"]


def _map(path: Path) -> memoryview:
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("I")


# -- in the processes -----------------------------------------------------------------------------------------
class Failer:
    """Decides, in one process, whether an operation fails.

    Args:
        words: of the file.
        role: of this process.
    """

    def __init__(self, words: memoryview, role: str) -> None:
        self._words = words
        self._lock = threading.Lock()
        self.role = ROLES.index(role)

    def meets(self, operation: str) -> int:
        """Count an operation; return the error that it is to fail with, or 0."""
        words = self._words
        if words[_OPERATION] != _NUMBERS[operation] or words[_ROLE] != self.role:
            return 0
        with self._lock:
            words[_SEEN] += 1
            if words[_SEEN] != words[_LEFT]:
                return 0
            words[_FAILED] += 1
            return words[_CODE]

    def check(self, operation: str) -> None:
        """Count an operation.

        Raises:
            OSError: it is the one that fails.
        """
        code = self.meets(operation)
        if code:
            raise OSError(code, os.strerror(code))

    def wrap(self, owner: Any, name: str, operation: str) -> None:
        """Put a function that may fail in the place of another."""
        real = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            self.check(operation)
            return real(*args, **options)

        setattr(owner, name, wrapped)


def install(failer: Failer) -> None:
    """Wrap what can fail in this process."""
    failer.wrap(os, "memfd_create", "memfd_create")
    failer.wrap(os, "posix_fallocate", "fallocate")
    failer.wrap(os, "pidfd_open", "pidfd_open")
    failer.wrap(os, "pipe2", "pipe")
    failer.wrap(os, "waitid", "waitid")
    failer.wrap(signal, "pidfd_send_signal", "kill")
    failer.wrap(socket, "socketpair", "socketpair")
    failer.wrap(socket.socket, "bind", "bind")
    failer.wrap(socket.socket, "accept", "accept")
    _wrap_fork(failer)
    _wrap_fcntl(failer)
    _wrap_sockets(failer)
    _wrap_polls(failer)
    _wrap_mmap(failer)
    _wrap_logs(failer)
    sqlite3.connect = _connecting(failer)  # type: ignore[assignment]


def install_zmq(failer: Failer) -> None:
    """Wrap libzmq, in the process that has it from its start."""
    import zmq

    from luacell.broker import outbox

    def wrapped(real: Callable[..., Any], operation: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            code = failer.meets(operation)
            if code:
                raise zmq.ZMQError(code)
            return real(*args, **options)

        return call

    first, last = int(zmq.SNDMORE | zmq.NOBLOCK), int(zmq.NOBLOCK)
    real = zmq.backend.Socket.send

    def send(peer: Any, data: bytes, flags: int) -> Any:
        """Fail with the first frame only: libzmq takes a message whole or not at all."""
        assert flags in (first, last)
        return (checked if flags == first else real)(peer, data, flags)

    checked = wrapped(real, "zmq_send")
    outbox._send = send  # type: ignore[misc, assignment]
    zmq.Socket.bind = wrapped(zmq.Socket.bind, "zmq_bind")  # type: ignore[method-assign]


def _wrap_fork(failer: Failer) -> None:
    real = os.fork

    def fork() -> int:
        failer.check("fork")
        pid = real()
        if pid == 0:
            failer.role = ROLES.index("worker")
        return pid

    os.fork = fork


def _wrap_fcntl(failer: Failer) -> None:
    real = fcntl.fcntl

    def control(descriptor: int, command: int, *rest: Any) -> Any:
        if command == fcntl.F_ADD_SEALS:
            failer.check("seal")
        return real(descriptor, command, *rest)

    fcntl.fcntl = control  # type: ignore[assignment]


def _wrap_sockets(failer: Failer) -> None:
    from luacell.protocol.memory.channel import _SO_PEERPIDFD

    real_send, real_receive, real_option = (
        getattr(socket.socket, name) for name in ("sendmsg", "recvmsg", "getsockopt")
    )

    def check(connection: socket.socket, operation: str) -> None:
        """Fail; where the error says that the peer is gone, neither of the two hears from the other any more."""
        try:
            failer.check(operation)
        except ConnectionError:
            connection.shutdown(socket.SHUT_RDWR)
            raise

    def sendmsg(self: socket.socket, buffers: Any, ancillary: Any = (), *rest: Any) -> int:
        check(self, "send_descriptors" if ancillary else "send")
        return int(real_send(self, buffers, ancillary, *rest))

    def recvmsg(self: socket.socket, *sizes: int) -> Any:
        check(self, "recv")
        return real_receive(self, *sizes)

    def getsockopt(self: socket.socket, level: int, option: int, *rest: Any) -> Any:
        if option == _SO_PEERPIDFD:
            failer.check("peer_pidfd")
        return real_option(self, level, option, *rest)

    socket.socket.sendmsg = sendmsg  # type: ignore[method-assign, assignment]
    socket.socket.recvmsg = recvmsg  # type: ignore[method-assign, assignment]
    socket.socket.getsockopt = getsockopt  # type: ignore[method-assign, assignment]


def _wrap_polls(failer: Failer) -> None:
    real_epoll, real_poll = select.epoll, select.poll

    def epoll() -> Any:
        poller = real_epoll()

        def register(*args: Any) -> None:
            failer.check("epoll_ctl")
            poller.register(*args)

        return _instead(poller, register=register)

    def poll() -> Any:
        poller = real_poll()

        def wait(*args: Any) -> Any:
            failer.check("poll")
            return poller.poll(*args)

        return _instead(poller, poll=wait)

    select.epoll, select.poll = epoll, poll  # type: ignore[assignment, misc]


def _wrap_mmap(failer: Failer) -> None:
    from luacell.protocol.memory import segments

    real = segments._libc.mmap

    def failing(*args: Any) -> Any:
        code = failer.meets("mmap")
        if code:
            ctypes.set_errno(code)
            return segments._MAP_FAILED
        return real(*args)

    segments._libc = SimpleNamespace(mmap=failing, munmap=segments._libc.munmap)  # type: ignore[misc, assignment]


def _wrap_logs(failer: Failer) -> None:
    from luacell.protocol import logs

    def write(descriptor: int, data: bytes) -> int:
        failer.check("log")
        return os.write(descriptor, data)

    vars(logs)["os"] = _instead(os, write=write)


def _connecting(failer: Failer) -> Callable[..., sqlite3.Connection]:
    real = sqlite3.connect

    class Connection(sqlite3.Connection):
        """A connection one of whose writing statements fails."""

        def execute(self, statement: str, *rest: Any) -> sqlite3.Cursor:
            if statement.lstrip().upper().startswith(_WRITES):
                code = failer.meets("sqlite")
                if code:
                    raise _sqlite_error(code)
            return super().execute(statement, *rest)

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        return real(*args, **options, factory=Connection)

    return connect


def _sqlite_error(code: int) -> sqlite3.OperationalError:
    name = next(name for name in ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_BUSY") if getattr(sqlite3, name) == code)
    error = sqlite3.OperationalError(f"made to fail: {name}")
    error.sqlite_errorcode, error.sqlite_errorname = code, name
    return error


class _Instead:
    """An object with some attributes of its own, and all others of another."""

    def __init__(self, real: Any, attributes: dict[str, Any]) -> None:
        self._real = real
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _instead(real: Any, **attributes: Any) -> Any:
    return _Instead(real, attributes)


def main() -> None:
    _, control, module, *options = sys.argv
    role = {"luacell.cli.serve": "parent", "luacell.broker": "broker", "luacell.worker": "worker host"}[module]
    failer = Failer(_map(Path(control)), role)
    install(failer)
    if role == "broker":
        install_zmq(failer)
    sys.argv = [module, *options]
    if role == "parent":
        sys.exit(run_parent(__file__, control))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_parent(program: str, control: str, modules: Sequence[str] = ("luacell.broker", "luacell.worker")) -> int:
    """Run the parent; these of its children are run by a program like this one. Return its exit code."""
    from luacell.cli import serve
    from luacell.cli.restarts import BACKOFF_FIRST_S, Restarts

    class FailingParent(serve.Parent):
        """The parent, whose children are wrapped, too."""

        def _command(self, module: str) -> list[str]:
            command = super()._command(module)
            python, safe, _, module, *options = command
            return [python, safe, program, control, module, *options] if module in modules else command

    class QuickRestarts(Restarts):
        """Restarts without a back-off that grows: failures that are made are no sign of more."""

        def ended(self, now_s: float) -> float | None:
            super().ended(now_s)
            return BACKOFF_FIRST_S

    vars(serve).update(Parent=FailingParent, Restarts=QuickRestarts)
    return serve.main()


if __name__ == "__main__":
    main()
