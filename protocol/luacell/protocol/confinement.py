"""How strictly a worker is confined: the levels of the sandbox, and what a contract may have in spite of it.

Pure: it says what was asked for. What each level takes away is the worker's business (`luacell.worker.sandbox`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

SANDBOX_LEVELS: Final = ("default", "hardened", "untrusted")  # each stricter than those before it
DEFAULT, HARDENED, UNTRUSTED = SANDBOX_LEVELS
# Characters of `read`, and of `write`, with an end of line between two paths: both travel in one packet of the
# descriptor channel (4 KiB, up to 4 bytes a character).
GRANTS_TEXT_MAX: Final = 480


class Confinement(NamedTuple):
    """What a worker is made for; workers of equal confinements can stand in for each other.

    Attributes:
        level: of the sandbox.
        read: absolute paths of files and directories that it may read, one a line.
        write: likewise, of those that it may also write, make and remove.
        network: whether it may connect and listen.
    """

    level: str = DEFAULT
    read: str = ""
    write: str = ""
    network: bool = False

    @property
    def has_grants(self) -> bool:
        """Whether it may have more than its level gives everybody."""
        return bool(self.read or self.write or self.network)

    def at_least(self, floor: str) -> Confinement:
        """Return it with its level, or the floor where that is stricter."""
        return self._replace(level=stricter(self.level, floor))

    def objection(self) -> str:
        """Tell why no worker can be confined like this, or ""."""
        if self.level not in SANDBOX_LEVELS:
            return f"sandbox level {self.level!r} is none of {', '.join(SANDBOX_LEVELS)}"
        if self.has_grants and self.level != DEFAULT:
            return f"read, write and network are grants at level {DEFAULT!r}; level {self.level!r} has none"
        for line in (*self.read.split("\n"), *self.write.split("\n")):
            if line and not line.startswith("/"):
                return f"{line!r} is granted, and is no absolute path"
        return ""


UNGRANTED: Final = Confinement()  # what every contract gets that asks for nothing


def stricter(level: str, other: str) -> str:
    """Return the stricter one of two levels."""
    return max(level, other, key=SANDBOX_LEVELS.index)


class Layer(NamedTuple):
    """One thing that a sandbox is made of.

    Attributes:
        name: as people know it.
        in_force: whether it protects.
        detail: what it does; or why it is not in force.
    """

    name: str
    in_force: bool
    detail: str


C_MODULES_TEXT_MAX: Final = 8192  # characters of the paths of C modules, with an end of line between two: 64 of 127
POSTURE_MAX: Final = 4000  # characters: some 15 layers with a sentence each
_IN_FORCE, _NOT_IN_FORCE = "+", "-"


def written(layers: Iterable[Layer]) -> str:
    """Write layers as they travel: a line each, with name and detail."""
    return "\n".join(
        f"{_IN_FORCE if layer.in_force else _NOT_IN_FORCE}{layer.name}\t{layer.detail}" for layer in layers
    )[:POSTURE_MAX]


def read(posture: str) -> tuple[Layer, ...]:
    """Read what `written` wrote; whatever else a peer sends becomes layers that are not in force."""
    lines = [line for line in posture.split("\n") if line]
    parts = [(line[0], *line[1:].partition("\t")) for line in lines]
    return tuple(Layer(name, sign == _IN_FORCE, detail) for sign, name, _, detail in parts)
