"""What `luacell serve` and `luacell broker` hand on to the processes that they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from luacell.cli import main


@pytest.mark.parametrize(("verb", "module"), [("serve", "luacell.cli.serve"), ("broker", "luacell.broker")])
@pytest.mark.parametrize("is_off", [True, False])
def test_crash_records_are_switched_off_by_a_flag(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str, module: str, is_off: bool
) -> None:
    became: list[tuple[Any, ...]] = []
    monkeypatch.setattr(main, "_become", lambda *command, **_: became.append(command))
    flags = ["--no-crash-records"] if is_off else []
    ended = CliRunner().invoke(main.app, [verb, "--run-dir", str(tmp_path), *flags])
    assert ended.exit_code == 0
    ((name, _, *own),) = became
    assert name == module
    assert ("--no-crash-records" in own) == is_off
