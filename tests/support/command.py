"""The `luacell` command as a user runs it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.environment import untraced
from tests.support.waiting import LIMIT_S

LUACELL = (sys.executable, "-P", "-m", "luacell.cli")


class Ended:
    """A command that has ended."""

    def __init__(self, process: subprocess.CompletedProcess[bytes]) -> None:
        self.code = process.returncode
        self.raw = process.stdout
        self.errors = process.stderr.decode()
        assert "Traceback" not in self.errors, self.errors

    @property
    def out(self) -> str:
        return self.raw.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def __repr__(self) -> str:
        return f"exit {self.code}\n{self.raw!r}\n{self.errors}"


class Command:
    """Runs verbs against one service."""

    def __init__(self, endpoint: Path | str | None = None) -> None:
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("LUACELL")}
        if endpoint is not None:
            self.environment["LUACELL_ENDPOINT"] = str(endpoint)

    def __call__(self, *words: str, stdin: bytes = b"", **environment: str) -> Ended:
        return Ended(
            subprocess.run(
                [*LUACELL, *words],
                input=stdin,
                capture_output=True,
                env={**self.environment, **environment},
                timeout=LIMIT_S * 3,
                check=False,
            )
        )

    def start(self, *words: str, prefix: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[bytes]:
        """Start a verb that does not end by itself, or not as usual: it may be interrupted."""
        return subprocess.Popen([*prefix, *LUACELL, *words], env=untraced(self.environment), **options)
