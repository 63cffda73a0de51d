"""What a process of the service puts right before anything else, whatever it has inherited.

Whoever starts it may have closed the standard descriptors, ignored SIGCHLD or blocked signals; all three survive exec,
and each would break something later, elsewhere: a socket that is taken for stdout, a child whose end nobody hears of,
a SIGTERM that never comes.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping
from typing import Final

_PR_SET_DUMPABLE: Final = 4
# Of the environment that a worker host is started with: what Python, the linker and a tool that measures coverage read,
# time zone and language.
_PASSED_ON: Final = ("PYTHON", "LD_", "COVERAGE_", "LC_", "LANG", "TZ")


def put_right() -> None:
    """Open the standard descriptors that are closed, and take signals as they come by default. Main thread only."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(descriptor, True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a worker host needs of an environment; all of it lies in the memory of its workers."""
    return {name: value for name, value in environment.items() if name.startswith(_PASSED_ON)}


def hide_memory() -> None:
    """Let no other process of this user look into this one, by ptrace or /proc, and no core file show what it held.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
