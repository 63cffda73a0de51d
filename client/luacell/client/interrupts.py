"""What an interrupt must not break off.

A signal handler that raises (Ctrl-C's does) can raise between any two bytecodes of the main thread, and only there.
What would be lost then, other than time, is done in another thread, or can be done again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def uninterrupted(work: Callable[[], T]) -> T:
    """Do a piece of work to its end, whatever is raised in this thread meanwhile.

    Args:
        work: takes the locks that it needs; the caller holds none of them.

    Returns:
        What it returned; an interrupted caller does not hear of it.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="luacell uninterrupted", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
