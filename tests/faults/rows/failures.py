"""Part E: the n-th operation fails."""

from __future__ import annotations

from typing import Final

from tests.faults.rows.row import Row

ROWS: Final = (
    Row(
        "E",
        "the n-th of each operation that can fail does, for n = 1, 2, … until a run meets no failure",
        "every call is answered, typed; the service goes on",
        "each caller of the system; the parent where nothing else helps",
    ),
)
