"""What a row of the catalogue says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One fault.

    Attributes:
        id: as in the names of its tests.
        injection: what is done.
        answer: what callers see.
        caught: what notices it, or bounds it.
        due: why there is no test of it yet; empty where there is.
    """

    id: str
    injection: str
    answer: str
    caught: str
    due: str = ""
