"""The levels of the sandbox in which contracts' faults are thrown."""

from __future__ import annotations

from typing import Final

OFFERED: Final = ("default", "hardened")
