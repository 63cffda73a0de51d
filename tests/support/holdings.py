"""What this process holds; afterwards it must not be more than before."""

from __future__ import annotations

import gc
import os
from collections import Counter
from typing import NamedTuple

from tests.support.processes import children_of, descriptors_of, mappings_of, thread_count
from tests.support.waiting import settles


class Holdings(NamedTuple):
    """What this process holds."""

    descriptors: Counter[str]
    threads: int
    mappings: int
    children: int


def holdings() -> Holdings:
    """Return what this process holds now, but for what only the garbage collector has yet to close."""
    gc.collect()
    return Holdings(descriptors_of(), thread_count(), mappings_of(), len(children_of(os.getpid())))


def growth(before: Holdings) -> list[str]:
    """Say of what this process holds more than before; less is no leak, for a thread may have been about to end."""
    now = holdings()
    pairs = zip(Holdings._fields, before, now, strict=True)
    return [f"{name}: {was} and now {has}" for name, was, has in pairs if not has <= was]  # type: ignore[operator]


def holds_no_more_than(before: Holdings) -> None:
    """Wait until this process holds no more than before.

    Raises:
        AssertionError: it still does after a while; says of what.
    """
    nothing: list[str] = []
    settles(lambda: growth(before), nothing, "no descriptors, threads, mappings and children more than before")
