"""What an interrupt must not break off.

A signal handler that raises (Ctrl-C's does) can raise between any two bytecodes of the main thread, and only there.
What would be lost then, other than time, is done in another thread, or can be done again.
"""

from __future__ import annotations

import threading
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def uninterrupted(work: Callable[[], T], *, is_within: bool = False, is_short: bool = False) -> T:
    """Do a piece of work to its end, whatever is raised in this thread meanwhile.

    Args:
        work: takes the locks that it needs; the caller holds none of them.
        is_within: what this thread does beneath, interrupted by a signal handler, holds up other threads: the work is
            done in this one, for another would wait until the handler is over.
        is_short: an interrupted caller waits for the end, and is interrupted then.

    Returns:
        What it returned; an interrupted caller does not hear of it.
    """
    if is_within or threading.get_ident() != threading.main_thread().ident:
        return work()
    results: list[T] = []
    errors: list[BaseException] = []
    over = allocate_lock()
    over.acquire()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            over.release()

    # Not threading.Thread: an interrupt in the middle of its start or its join would leave its own books in disorder.
    start_new_thread(run, ())
    try:
        over.acquire()
    except BaseException:
        if is_short:
            _wait_for(over)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _wait_for(over: threading.Lock) -> None:
    while True:
        try:
            over.acquire()
            return
        except BaseException:  # another interrupt: the first is raised when the work is done
            continue
