"""What the host itself does around the contract's counts; the counts are in `test_contract.py`."""

from pathlib import Path

from luacell.cli.demo import counting
from luacell.cli.demo.counting import Statistics


def test_source_files_leaves_out_packages_and_large_files(tmp_path: Path) -> None:
    for name in ("b.py", "a/c.py", "site-packages/d.py", "a/dist-packages/e.py", "f.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    with (tmp_path / "huge.py").open("wb") as file:
        file.truncate(counting.FILE_SIZE_MAX + 1)
    assert counting.source_files(tmp_path) == [tmp_path / "a/c.py", tmp_path / "b.py"]
    assert counting.source_files(tmp_path, limit=1) == [tmp_path / "a/c.py"]


def test_a_name_without_its_padding_is_read_from_out() -> None:
    out = counting.RESULT.pack(1, 2, 3, 4, 5, 6, 7, b"name")
    assert Statistics.from_bytes(out) == Statistics(1, 2, 3, 4, 5, 6, 7, b"name")
