"""Directories that must be this user's alone: made, checked, and locked against a second broker.

What lies in them is the business of `rundir` and `statedir`.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from pathlib import Path
from typing import Final

from luacell.protocol.errors import LuacellError

_LOCK_RETRY_S: Final = 0.01


class DirectoryError(LuacellError):
    """A directory of the broker cannot be used; the text names the path and what to do."""


def make_private(path: Path, what: str, fault: type[DirectoryError]) -> None:
    """Make a directory with mode 0700 where it is missing, and refuse one that is not ours alone.

    Args:
        path: of the directory; what leads to it is made as well.
        what: the directory in words, such as "run directory".
        fault: the class to raise.

    Raises:
        DirectoryError: of that class.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise fault(f"cannot make the {what} {path}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise fault(f"{what} {path} is no directory (symbolic links are refused)")
    if found.st_uid != os.geteuid():
        raise fault(f"{what} {path} belongs to uid {found.st_uid}, not to {os.geteuid()}")
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise fault(f"{what} {path} has mode {mode:04o}, open to others; use 0700: chmod 700 {path}")


def take_lock(path: Path, fault: type[DirectoryError], wait_s: float) -> int:
    """Lock a file for as long as the returned descriptor is open; the kernel unlocks it when this process dies.

    Args:
        path: of the file, which is made where it is missing.
        fault: the class to raise.
        wait_s: seconds that its last holder may take to die.

    Raises:
        DirectoryError: of the class `fault`: it cannot be opened, or another broker holds it.
    """
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise fault(f"cannot open {path}: {error.strerror}") from None
    give_up_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError:
            if time.monotonic() >= give_up_s:
                os.close(lock)
                raise fault(f"another broker serves {path.parent} (it holds {path})") from None
        time.sleep(_LOCK_RETRY_S)
