"""new: what it writes works, its own test included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import Command

luacell = Command("/nonexistent")


def run(directory: Path, *words: str) -> str:
    ended = subprocess.run(
        [sys.executable, *words], cwd=directory, capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_directory_is_valid_and_its_host_and_test_run(tmp_path: Path) -> None:
    ended = luacell("new", "shapes", "--in", str(tmp_path))
    assert ended.code == 0, ended
    directory = tmp_path / "shapes"
    assert sorted(map(Path, ended.out.split())) == sorted(directory.iterdir())
    assert not [file for file in directory.iterdir() if "example" in file.name + file.read_text()]
    assert luacell("validate", str(directory), "--load").code == 0
    assert run(directory, "use_shapes.py") == "1 Info the disk is half full\n2 Warning the disk is full\n"
    assert "3 passed" in run(directory, "-m", "pytest", "-q", "-p", "no:cacheprovider", ".")


@pytest.mark.parametrize("name", ["", "Shapes", "a.b", "../x", "1a", "class", "x" * 65])
def test_name_that_is_no_identifier_is_usage(tmp_path: Path, name: str) -> None:
    ended = luacell("new", name, "--in", str(tmp_path))
    assert ended.code == 2
    assert "lower-case identifier" in ended.errors
    assert list(tmp_path.iterdir()) == []


def test_directory_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    ended = luacell("new", "shapes", "--in", str(tmp_path))
    assert ended.code == 2
    assert "is there already; nothing was written" in ended.errors
    assert list((tmp_path / "shapes").iterdir()) == []
