"""A plugin of pytest (`-p tests.faults.recording --results FILE`) that keeps what each row's tests said."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from tests.faults.catalogue import rows_of


@dataclass(slots=True)
class Result:
    """What the tests of one row said.

    Attributes:
        passed, failed: how many tests.
        levels: of the sandbox, that they ran in.
    """

    passed: int = 0
    failed: int = 0
    levels: list[str] = field(default_factory=list)


_results: dict[str, Result] = {}
_failed: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, required=True, help="file for what each row's tests said, as JSON")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of rows only."""
    items[:] = [item for item in items if rows_of(item.nodeid)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome == "passed" and report.when != "teardown":
        return
    if report.outcome != "passed":
        _failed.add(report.nodeid)
    if report.when == "teardown":
        for row in rows_of(report.nodeid):
            result = _results.setdefault(row, Result())
            result.failed += report.nodeid in _failed
            result.passed += report.nodeid not in _failed
            for level in ("default", "hardened", "untrusted"):
                if level in report.nodeid.partition("[")[2] and level not in result.levels:
                    result.levels.append(level)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path = session.config.getoption("--results")
    path.write_text(json.dumps({row: asdict(result) for row, result in sorted(_results.items())}))
