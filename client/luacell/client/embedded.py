"""The embedded default: a broker and workers of the bridge's own, in a private directory, gone with the bridge.

It starts `python -m luacell.cli.serve` in a session of its own, so that Ctrl-C does not reach it, and lets it watch
this process. What it writes goes to the logger `luacell`. It speaks no protocol.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from luacell.client.interrupts import uninterrupted
from luacell.client.records import ServiceLog, wanted_level
from luacell.protocol.errors import BridgeNotInitialized
from luacell.protocol.memory.channel import SOCKET_PATH_MAX
from luacell.protocol.paths import BROKER_SOCKET, EMBEDDED_PREFIX, LOCK_FILE

START_LIMIT_S: Final = 10.0
STOP_LIMIT_S: Final = 0.8  # with what else closing a bridge takes, below the promise of a second
_FIRST_FREE: Final = 3
SWEEP_MAX: Final = 64  # leftovers looked at per start
SWEEP_AGE_S: Final = 10.0  # younger directories may be of a service that is just starting


class EmbeddedService:
    """A private service.

    Args:
        spares: blank workers to keep warm.
        options: more words of its command line, such as "--sandbox" and a level.

    Attributes:
        log: what it writes.

    Raises:
        BridgeNotInitialized: it did not come up; the text says why.
    """

    def __init__(self, spares: int, options: Sequence[str] = ()) -> None:
        self._options = options
        parent = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()).absolute()
        sweep(parent)
        self.run_directory = _make_directory(parent)
        self.log = ServiceLog()
        self._process: subprocess.Popen[bytes] | None = None
        ready, report = os.pipe()
        try:
            uninterrupted(lambda: self._start(spares, report), is_short=True)
            self._await(ready)
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(ready)

    def _start(self, spares: int, report: int) -> None:
        # Above the standard descriptors, which may be closed here: those of the child are replaced.
        passed = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
        try:
            self._process = subprocess.Popen(
                self._command(spares, passed),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.log.writer,
                pass_fds=[passed],
                start_new_session=True,
            )
        except OSError as error:
            raise BridgeNotInitialized("Lua", f"{sys.executable} cannot be started: {error.strerror}") from None
        finally:
            os.close(passed)
            os.close(report)
            self.log.close_writer()

    def _command(self, spares: int, report: int) -> list[str]:
        return [
            *(sys.executable, "-P", "-m", "luacell.cli.serve"),
            *("--run-dir", str(self.run_directory), "--ephemeral"),
            *("--host", str(os.getpid()), "--spares", str(spares)),
            *("--ready-fd", str(report), "--log-level", wanted_level()),
            *self._options,
        ]

    def _await(self, ready: int) -> None:
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        if not poll.poll(START_LIMIT_S * 1000):
            raise self._not_initialized(f"the embedded service was not ready within {START_LIMIT_S:g} s")
        if not os.read(ready, 1):
            assert self._process is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)  # it writes its last words after it has closed the other pipe
            raise self._not_initialized("the embedded service ended while starting")

    def _not_initialized(self, reason: str) -> BridgeNotInitialized:
        self.log.read()
        words = self.log.last_words()
        return BridgeNotInitialized("Lua", f"{reason}; it wrote:\n{words}" if words else reason)

    @property
    def has_ended(self) -> bool:
        """Whether it is gone, and will not come back."""
        return self._process is None or self._process.poll() is not None

    def stop(self) -> None:
        """End it, by force where it must be, and leave nothing. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                # All of its session: what is stopped hears of nothing else. The number is its own until we wait for it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._remove()
        self.log.close()

    def _remove(self) -> None:
        shutil.rmtree(self.run_directory, ignore_errors=True)


def _make_directory(parent: Path) -> Path:
    """Make the run directory.

    Raises:
        BridgeNotInitialized: there is no place for it, or its sockets' paths would be too long.
    """
    name = f"{EMBEDDED_PREFIX}xxxxxxxx/{BROKER_SOCKET}"
    size = len(os.fsencode(parent / name))
    if size > SOCKET_PATH_MAX:
        reason = f"socket paths in {parent} would have {size} bytes; the system's limit is {SOCKET_PATH_MAX}"
        raise BridgeNotInitialized("Lua", f"{reason}: set XDG_RUNTIME_DIR to a shorter path")
    try:
        return Path(tempfile.mkdtemp(prefix=EMBEDDED_PREFIX, dir=parent))
    except OSError as error:
        reason = f"cannot make a run directory in {parent}: {error.strerror}"
        raise BridgeNotInitialized("Lua", f"{reason}; XDG_RUNTIME_DIR names another place") from None


def sweep(parent: Path) -> None:
    """Remove what embedded services left that were killed together with everything that would have cleaned up."""
    oldest_s = time.time() - SWEEP_AGE_S
    for found in sorted(parent.glob(f"{EMBEDDED_PREFIX}*"))[:SWEEP_MAX]:
        with contextlib.suppress(OSError):
            status = found.lstat()
            lock = found / LOCK_FILE
            if status.st_uid == os.geteuid() and status.st_mtime < oldest_s and lock.exists() and _is_unlocked(lock):
                shutil.rmtree(found, ignore_errors=True)


def _is_unlocked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
