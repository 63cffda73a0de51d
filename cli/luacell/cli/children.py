"""The processes that serve starts: held by pidfds, in sessions of their own; and the orphans that fall to it.

A child is in a session of its own, so that Ctrl-C reaches the parent alone, which then decides. Orphans come to a
process that is PID 1 or a subreaper; each is reaped, whoever it was. Nothing here decides when to start or to end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

ORPHANS_MAX: Final = 256  # reaped at once
_PR_SET_CHILD_SUBREAPER: Final = 36


class Child:
    """A process that serve has started.

    Args:
        name: as messages call it.
        command: program and arguments.
        pass_fds: descriptors that it inherits.
        environment: its own; None for ours.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=pass_fds, start_new_session=True, env=environment
        )
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    def send(self, *numbers: int) -> None:
        """Send it signals; one that is gone gets none."""
        with contextlib.suppress(ProcessLookupError):
            for number in numbers:
                signal.pidfd_send_signal(self.pidfd, number)

    def ends_within(self, limit_s: float) -> bool:
        """Wait for its end, and tell whether it came."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(limit_s * 1000))

    def reap(self) -> int:
        """Return its exit code, negative for a signal, once it has ended."""
        return self._process.wait()

    @property
    def ending(self) -> str:
        """How it ended, in words; after its end only."""
        code = self.reap()
        if code >= 0:
            return f"exit code {code}"
        try:
            return f"signal {-code} ({signal.Signals(-code).name})"
        except ValueError:  # a real-time signal has no name
            return f"signal {-code}"

    def close(self) -> None:
        """Give its pidfd back; after its end only."""
        self.reap()
        os.close(self.pidfd)


def become_subreaper() -> None:
    """Let orphans among the descendants fall to this process, as they do to PID 1."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(children: Iterable[Child]) -> bool:
    """Reap ended processes that fell to this one, at most ORPHANS_MAX of them.

    A child of its own that is met is reaped as well, for it would stand before all others; it still remembers its
    exit code, and its pidfd still tells of its end.

    Args:
        children: processes that this one has started.

    Returns:
        Whether there may be more.
    """
    own = {child.pid: child for child in children}
    for _ in range(ORPHANS_MAX):
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        if found is None:
            return False
        child = own.get(found.si_pid)
        if child is not None:
            child.reap()
        else:
            os.waitid(os.P_PID, found.si_pid, os.WEXITED | os.WNOHANG)
    return True
