"""The catalogue and its tests know each other, and its document is what they say."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.catalogue import PARTS, PLACES, ROWS, rows_of
from tests.faults.document import DOCUMENT, kept_results, rendered

ROOT = Path(__file__).parents[2]
BESIDE = {"test_catalogue.py"}  # tests that throw nothing


@pytest.mark.parametrize(
    ("node", "rows"),
    [
        ("tests/faults/test_contracts.py::test_c46_c47_floods_are_cut[default]", ["C46", "C47"]),
        ("tests/faults/test_contracts.py::test_c01_wild_accesses[default-C05-a-b]", ["C05"]),
        ("tests/faults/test_contracts.py::test_c40b_sockets", ["C40b"]),
        ("tests/faults/test_contracts.py::test_rows[C08_C09-os.exit(1)]", ["C08", "C09"]),
        ("tests/faults/test_contracts.py::test_other", []),
    ],
)
def test_names_tell_the_rows(node: str, rows: list[str]) -> None:
    assert rows_of(node) == rows


def test_every_row_has_its_tests_and_every_test_its_rows() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", *PLACES]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    nodes = [line for line in collected.splitlines() if "::" in line]
    thrown = {node: rows_of(node) for node in nodes if Path(node.partition("::")[0]).name not in BESIDE}
    whole = [node for node in thrown if node.startswith("tests/faults/") and "test_escapes" not in node]
    assert [node for node in whole if not thrown[node]] == [], "tests that name no row"
    tested = {row for rows in thrown.values() for row in rows}
    assert tested - ROWS.keys() == set(), "rows that the table lacks"
    assert {row.id for row in ROWS.values() if not row.due} - tested == set(), "rows without a test"
    assert {row.id for row in ROWS.values() if row.due} & tested == set(), "due, although there is a test"


def test_ids_are_unique_and_in_order() -> None:
    ids = [row.id for rows in PARTS.values() for row in rows]
    assert [each for each, number in Counter(ids).items() if number > 1] == []


def test_document_is_what_the_table_and_the_kept_results_say() -> None:
    assert DOCUMENT.read_text() == rendered(kept_results()), "make faults"
