"""Writes docs/faults.md: the catalogue, and what its tests said when they last ran (`make faults`).

python -m tests.faults.document              runs the catalogue, keeps its results and writes the document
python -m tests.faults.document --no-run     writes it with the results that are kept
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests.faults.catalogue import PARTS, PLACES
from tests.faults.rows.row import Row

ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final = ROOT / "docs" / "faults.md"
RESULTS: Final = ROOT / "tests" / "faults" / "results.json"

_HEADS: Final = "| id | what is done | answer | what catches it | last result |"
_INTRODUCTION: Final = """\
<!-- Written by `make faults` from tests/faults/rows and the results of its run; do not edit. -->
# The fault catalogue

What is thrown at luacell, and what it answers. Each row is a test with the row's id in its name (most in
`tests/faults`), part of `make check`; `make faults` runs them all and writes this page. With `pytest tests/faults
-p tests.faults.under_load` they are thrown beside 100 healthy calls a second.

Each test asserts the code, the cause, whether the call had begun, and that the answer came at most 250 ms after its
deadline (what the machine itself delayed is measured beside it and allowed for). Around each one, a healthy contract
gives its right answers, before and after, by the same worker; and afterwards host, parent, broker and worker host
together hold no process, zombie, thread, descriptor, mapping, slot or file more than before. Rows that are about a
contract run in each level of the sandbox that the result names.
"""


def rendered(results: Mapping[str, Any]) -> str:
    """Return the document."""
    rows: Mapping[str, Mapping[str, Any]] = results["rows"]
    tests = sum(row["passed"] + row["failed"] for row in rows.values())
    lines = [_INTRODUCTION, f"Last run: {results['date']}, {results['versions']}: {tests} results of {len(rows)} rows."]
    for title, part in PARTS.items():
        lines += [
            "",
            f"## {part[0].id[0]}. {title}",
            "",
            _HEADS,
        ]
        lines += ["|---|---|---|---|---|", *(_line(row, rows.get(row.id)) for row in part)]
    return "\n".join(lines) + "\n"


def _line(row: Row, result: Mapping[str, Any] | None) -> str:
    return f"| {row.id} | {row.injection} | {row.answer} | {row.caught} | {_said(row, result)} |"


def _said(row: Row, result: Mapping[str, Any] | None) -> str:
    if row.due:
        return "not tested yet"
    if result is None:
        return "has not run"
    passed, failed = result["passed"], result["failed"]
    levels = f" ({', '.join(result['levels'])})" if result["levels"] else ""
    return (f"**{failed} of {passed + failed} failed**" if failed else f"passed: {passed}") + levels


def kept_results() -> dict[str, Any]:
    """Return the results of the last run that was kept."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text())
    return kept


def _versions() -> str:
    import zmq
    from lupa import luajit21

    from luacell.protocol.release import __version__

    lua = luajit21.LuaRuntime().eval("jit.version")
    return (
        f"luacell {__version__}, Python {platform.python_version()}, {lua}, libzmq {zmq.zmq_version()}, "
        f"Linux {platform.release().partition('-')[0]}, {os.cpu_count()} CPUs"
    )


def _run() -> int:
    """Run the catalogue; keep its results."""
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        path = Path(directory) / "results"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.faults.recording", "--results", str(path)]
        ended = subprocess.run([*command, *PLACES], cwd=ROOT, check=False)
        rows = json.loads(path.read_text())
    results = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "versions": _versions(), "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return ended.returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.document", description="Write docs/faults.md.")
    parser.add_argument("--no-run", action="store_true", help="with the results that are kept")
    code = 0 if parser.parse_args().no_run else _run()
    DOCUMENT.write_text(rendered(kept_results()))
    return code


if __name__ == "__main__":
    sys.exit(main())
