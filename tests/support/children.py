"""Child processes of tests, which never outlast a test that has failed or run out of time."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def child_process(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a process, wait for its end after the block, and kill it where the block or the wait did not end well.

    `with subprocess.Popen(…)` waits for ever then: a test that its time limit interrupts would never end.

    Args:
        options: as `subprocess.Popen` takes them.
    """
    process = subprocess.Popen(command, **options)
    try:
        with process:
            try:
                yield process
            except BaseException:
                process.kill()
                raise
    finally:
        process.kill()  # of one that has been waited for, this does nothing
        process.wait()
