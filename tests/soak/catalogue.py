"""The fault catalogue thrown beside 100 healthy calls a second: every row of `tests/faults`, by pytest.

What fails is said by the names of its tests; the whole output of pytest goes to stderr then.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.soak.report import Report
from tests.support.children import child_process

PLACE: Final = "tests/faults"
LIMIT_S: Final = 900.0  # a run takes 100 s on two CPUs, and three times that beside other work

_ROOT: Final = Path(__file__).parents[2]
_FAILED: Final = ("FAILED ", "ERROR ")


def run(seed: int, place: str = PLACE, selected: str = "") -> Report:
    """Throw the catalogue.

    Args:
        seed: not used: there is no chance in it.
        place: files or directories of tests.
        selected: an expression of pytest's `-k`; "" is all.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.faults.under_load", "-p", "no:cacheprovider", place]
    command += ["-k", selected] if selected else []
    with child_process(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        out, _ = process.communicate(timeout=LIMIT_S)
    lines = out.splitlines()
    violations = [line for line in lines if line.startswith(_FAILED)]
    if process.returncode:
        print(out, file=sys.stderr)
        violations = violations or [f"pytest ended with exit code {process.returncode}: {lines[-1:]}"]
    return Report("the fault catalogue beside 100 healthy calls/s", {"tests": lines[-1] if lines else ""}, violations)
