"""What a process of the service puts right before anything else, whatever it has inherited.

Whoever starts it may have closed the standard descriptors, ignored SIGCHLD or blocked signals; all three survive exec,
and each would break something later, elsewhere: a socket that is taken for stdout, a child whose end nobody hears of,
a SIGTERM that never comes.
"""

from __future__ import annotations

import os
import signal


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
