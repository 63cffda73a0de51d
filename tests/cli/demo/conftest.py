"""A fake bridge, and files for it to count."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.demo.support import FakeBridge


@pytest.fixture
def bridge() -> Iterator[FakeBridge]:
    with FakeBridge() as made:
        yield made


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"f{index}.py" for index in range(60)]
    for index, path in enumerate(paths):
        path.write_bytes(b"self.name = self.other\n" * index)
    return paths
