"""What a run has shown: its figures in one line, and what was against the promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.soak.history import shown


@dataclass(frozen=True)
class Report:
    """One run.

    Attributes:
        title: what was done.
        figures: by name, as they are to be printed.
        violations: none, if all is well.
    """

    title: str
    figures: Mapping[str, str]
    violations: list[str]

    def __str__(self) -> str:
        figures = "; ".join(f"{name}: {figure}" for name, figure in self.figures.items())
        line = f"{self.title}: violations = {len(self.violations)}; {figures}"
        return "\n".join([line, shown(self.violations)]) if self.violations else line

    def check(self) -> None:
        """Raise unless all is well.

        Raises:
            AssertionError: says what is not.
        """
        assert not self.violations, str(self)
