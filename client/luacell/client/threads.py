"""Work that would hold up an event loop, done in a thread of the loop's executor, and what cancellation does to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

_protected: Final[set[asyncio.Task[Any]]] = set()  # the loop itself holds its tasks but weakly


async def made_in_thread(make: Callable[[], T], undo: Callable[[T], object]) -> T:
    """Make something in a thread; where the task is cancelled meanwhile, it is undone there.

    Args:
        make: makes it.
        undo: closes it again.
    """
    lock = threading.Lock()
    made: list[T] = []
    is_abandoned = False

    def run() -> T:
        thing = make()
        with lock:
            made.append(thing)
            if not is_abandoned:
                return thing
        undo(thing)
        return thing

    try:
        return await asyncio.get_running_loop().run_in_executor(None, run)
    except asyncio.CancelledError:
        with lock:
            is_abandoned = True
            leftover = made[:]
        for thing in leftover:
            undo(thing)
        raise


async def done_in_thread(work: Callable[[], T]) -> T:
    """Do a piece of work in a thread, to its end: a cancelled task waits for it before it ends."""
    working = asyncio.get_running_loop().run_in_executor(None, work)
    cancelled: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        working.exception()
        raise cancelled
    return working.result()


async def uncancelled(work: Coroutine[Any, Any, T]) -> T:
    """Do a piece of work to its end in a task of its own; a cancelled caller does not hear of it."""
    task = asyncio.get_running_loop().create_task(work)
    _protected.add(task)
    task.add_done_callback(_forget)
    return await asyncio.shield(task)


def _forget(task: asyncio.Task[Any]) -> None:
    _protected.discard(task)
    if not task.cancelled():
        task.exception()  # whoever has not waited for it does not want to know
