"""What a service may leave behind once it has stopped: the files of a quiet one, and records of crashes."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from tests.support.holdings import Holdings, holds_no_more_than
from tests.support.processes import processes_with
from tests.support.serving import Serving
from tests.support.waiting import settles

GONE_WITHIN_S = 2.0
_CRASH_RECORD = re.compile(r"state/crashes/[0-9a-f]+\.(crash|sources)")  # of calls that a kill met


def remains(run_directory: Path, before: Holdings) -> list[str]:
    """Say what is left of a service that has stopped, beside what this process held before it."""
    found: list[str] = []
    try:
        settles(lambda: len(processes_with(run_directory)), 0, "all processes have ended", GONE_WITHIN_S)
        holds_no_more_than(before)
    except AssertionError as error:
        found.append(f"something is left: {error}")
    files = _files_of(run_directory) - _files_after_a_quiet_run()
    unwanted = {name for name in files if not _CRASH_RECORD.fullmatch(name)}
    if unwanted:
        found.append(f"files {sorted(unwanted)} are left in the run directory")
    return found


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
