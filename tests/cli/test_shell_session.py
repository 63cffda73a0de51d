"""docs/shell.md is true: a real bash runs every line of it, in order, and shows what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.waiting import LIMIT_S, readable

PAGE = Path(__file__).parents[2] / "docs" / "shell.md"
ANY = "…"  # on the page: anything within a line, or any lines where it stands alone


@dataclass(frozen=True, slots=True)
class Step:
    """A command of the page, here-documents included, and the lines that it shows."""

    line: int
    command: str
    shown: tuple[str, ...]


def steps_of(page: str) -> list[Step]:
    steps: list[Step] = []
    in_block = False
    for number, line in enumerate(page.splitlines(), 1):
        if line.startswith("```"):
            in_block = line == "```console"
        elif in_block and line.startswith("$ "):
            steps.append(Step(number, line[2:], ()))
        elif in_block and line.startswith("> "):
            steps[-1] = Step(steps[-1].line, f"{steps[-1].command}\n{line[2:]}", ())
        elif in_block:
            steps[-1] = Step(steps[-1].line, steps[-1].command, (*steps[-1].shown, line))
    return steps


def pattern_of(shown: tuple[str, ...]) -> str:
    lines = ["(?:.*\n)*" if line == ANY else re.escape(line).replace(ANY, ".+") + "\n" for line in shown]
    return "".join(lines)


class Bash:
    """One shell for all lines."""

    def __init__(self, home: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("LUACELL", "XDG"))}
        commands = str(Path(sys.executable).parent)
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=home,
            env={**environment, "HOME": str(home), "PATH": f"{commands}:{environment['PATH']}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._count = 0
        self._output = b""

    def run(self, command: str) -> str:
        """Run a command as it stands; return what it writes to stdout and stderr."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._count += 1
        mark = f"--- done {self._count} ---\n".encode()
        # The status is kept for the next line, which may ask for it.
        tail = f"\n{{ status=$?; echo '{mark.decode().strip()}'; (exit $status); }}\n"
        self._process.stdin.write((command + tail).encode())
        self._process.stdin.flush()
        while mark not in self._output:
            assert readable(self._process.stdout.fileno(), LIMIT_S), f"no end of: {command}"
            read = os.read(self._process.stdout.fileno(), 65536)
            assert read, f"bash ended in: {command}"
            self._output += read
        output, _, self._output = self._output.partition(mark)
        return output.decode()

    def close(self) -> None:
        """End the shell and, should the page not have done so, the service in its background."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"kill $! 2> /dev/null; wait\n")
        self._process.communicate(timeout=LIMIT_S)


@pytest.fixture
def bash() -> Iterator[Bash]:
    with tempfile.TemporaryDirectory(prefix="shell-") as home:
        bash = Bash(Path(home))
        yield bash
        bash.close()


def test_every_line_of_the_page_does_what_the_page_shows(bash: Bash) -> None:
    steps = steps_of(PAGE.read_text())
    assert len(steps) > 20
    for step in steps:
        output = bash.run(step.command)
        assert re.fullmatch(pattern_of(step.shown), output), (
            f"docs/shell.md line {step.line}: $ {step.command}\nthe page shows:\n"
            + "\n".join(step.shown)
            + f"\nit gives:\n{output}"
        )


def test_the_page_goes_through_a_whole_session() -> None:
    commands = " ".join(step.command for step in steps_of(PAGE.read_text()))
    for verb in ("serve", "register", "call", "ls", "health", "unregister", "bench"):
        assert f"luacell {verb}" in commands
    assert "--replace" in commands


def test_what_the_page_shows_is_compared() -> None:
    assert re.fullmatch(pattern_of(("a …", "…", "z")), "a b\nc\nd\nz\n")
    assert not re.fullmatch(pattern_of(("a …", "z")), "a b\nc\nz\n")
    assert not re.fullmatch(pattern_of(()), "something\n")
