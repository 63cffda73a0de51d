"""What a service may leave behind once it has stopped: nothing but the files of a quiet one."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.support.processes import children_of, descriptors_of, mappings_of, processes_with, thread_count
from tests.support.serving import Serving
from tests.support.waiting import settles

GONE_WITHIN_S = 2.0


class Holdings(NamedTuple):
    """What this process holds."""

    descriptors: Counter[str]
    threads: int
    mappings: int
    children: int


def holdings() -> Holdings:
    """Return what this process holds now."""
    return Holdings(descriptors_of(), thread_count(), mappings_of(), len(children_of(os.getpid())))


def remains(run_directory: Path, before: Holdings) -> list[str]:
    """Say what is left of a service that has stopped, beside what this process held before it."""
    found: list[str] = []
    nothing: list[str] = []
    try:
        settles(lambda: len(processes_with(run_directory)), 0, "all processes have ended", GONE_WITHIN_S)
        settles(lambda: _growth(before), nothing, "no descriptors, threads, mappings and children more than before")
    except AssertionError as error:
        found.append(f"something is left: {error}")
    unwanted = _files_of(run_directory) - _files_after_a_quiet_run()
    if unwanted:
        found.append(f"files {sorted(unwanted)} are left in the run directory")
    return found


def _growth(before: Holdings) -> list[str]:
    """Say of what this process holds more than before; less is no leak, for a thread may have been about to end."""
    now = holdings()
    pairs = zip(Holdings._fields, before, now, strict=True)
    return [f"{name}: {was} and now {has}" for name, was, has in pairs if not has <= was]  # type: ignore[operator]


def _files_of(run_directory: Path) -> set[str]:
    return {str(path.relative_to(run_directory)) for path in run_directory.rglob("*")}


def _files_after_a_quiet_run() -> set[str]:
    """Return what a service that nothing has happened to leaves in its run directory: its registry and its lock."""
    with tempfile.TemporaryDirectory(prefix="quiet-") as directory:
        run_directory = Path(directory) / "run"
        run_directory.mkdir(mode=0o700)
        with Serving(run_directory) as serving:
            serving.processes().close()
        return _files_of(run_directory)
