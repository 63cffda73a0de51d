"""Source of generated functions: lines, indentation, constants and fresh names."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

EXPECTED: Final = (
    TypeError,
    ValueError,  # UnicodeError, too
    OverflowError,
    LookupError,
    AttributeError,
    struct.error,
)
"""What generated code raises on a bad value; another walk over the value then tells which and why."""


class Source:
    """A function that is being written.

    Attributes:
        constants: what its code refers to by name.
    """

    def __init__(self, name: str, parameter: str) -> None:
        self._name = name
        self._lines = [f"def {name}({parameter}):"]
        self._indent = 1
        self._count = 0
        self._numbers: dict[tuple[str, int], str] = {}
        self.constants: dict[str, Any] = {"EXPECTED": EXPECTED}

    def add(self, *lines: str) -> None:
        """Write lines at the present indentation."""
        self._lines += (f"{'    ' * self._indent}{line}" for line in lines)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Write a line and indent what follows."""
        self.add(head)
        self._indent += 1
        yield
        self._indent -= 1

    def fresh(self, prefix: str) -> str:
        """Return a name that nothing else has."""
        self._count += 1
        return f"{prefix}{self._count}"

    def constant(self, prefix: str, value: object) -> str:
        """Return a name for a constant; the same one for the same object."""
        known = self._numbers.get((prefix, id(value)))
        if known is None:
            known = self._numbers[prefix, id(value)] = self.fresh(prefix)
            self.constants[known] = value  # kept there, so its id stays its own
        return known

    def compile(self, title: str) -> Callable[[Any], Any]:
        """Compile the function.

        Args:
            title: for tracebacks.
        """
        exec(compile("\n".join(self._lines), f"<{title}>", "exec"), self.constants)
        made: Callable[[Any], Any] = self.constants[self._name]
        return made
