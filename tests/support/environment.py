"""The environment of processes that tests start."""

from __future__ import annotations

import os
from collections.abc import Mapping


def untraced(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for a process that is interrupted: without the variables that have coverage measure it.

    Its tracer takes a lock in Python code: a KeyboardInterrupt there leaves the lock taken, and the process waits for
    it for ever.
    """
    return {key: value for key, value in environment.items() if not key.startswith("COVERAGE")}
