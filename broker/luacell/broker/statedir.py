"""The state directory: made private and locked, so that one broker alone writes the registry in it.

What is in the registry is `registry_store`'s business.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from luacell.broker.directories import DirectoryError, make_private, take_lock
from luacell.protocol.paths import REGISTRY_FILE, STATE_FILES, STATE_LOCK_FILE


class StateDirectoryError(DirectoryError):
    """The state directory cannot be used; the text names the path and what to do."""


class StateDirectory:
    """A state directory that this process holds.

    Args:
        path: made with mode 0700 where it is missing.
        lock_wait_s: seconds that its last holder may take to die.

    Attributes:
        registry: path of the registry's file, which may not be there yet.

    Raises:
        StateDirectoryError: it is not ours alone, another broker holds it, or what is in it is no plain file.
    """

    def __init__(self, path: Path, lock_wait_s: float = 0.0) -> None:
        self.path = path
        self.registry = path / REGISTRY_FILE
        make_private(path, "state directory", StateDirectoryError)
        self._lock = take_lock(path / STATE_LOCK_FILE, StateDirectoryError, lock_wait_s)
        try:
            for name in STATE_FILES:
                _check_file(path / name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the lock back; the files stay."""
        os.close(self._lock)


def _check_file(path: Path) -> None:
    """Refuse what SQLite would follow or wait at: links, pipes, devices, and files that others own."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StateDirectoryError(f"cannot look at {path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise StateDirectoryError(f"{path} is no plain file (symbolic links are refused); move it away")
    if found.st_uid != os.geteuid():
        raise StateDirectoryError(f"{path} belongs to uid {found.st_uid}, not to {os.geteuid()}")
