"""The examples, run as a reader runs them: what they print is what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from luacell.client import LuaHostBridge

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_S = 60.0

LOGGER = """\
Info: started
Warn: disk almost full
Debug: somebody did
"""
KV = """\
colour is now at revision 3
colour = blue (revision 3)
keys: colour, shape
removed: True, again: False
shape is gone
"""
CALLS = """\
2 of lamp, 3 left
3 of lamp, 0 left
refused (1024): lamp: 1 too few
"""
CSV = """\
line 8: OutOfRange: 590 F was never measured
line 10: NoNumber: '' is no temperature
line 11: WrongColumns: 2 columns, not 4
Kyiv, Zhuliany: 2 x -3.5 / -1.0 / 1.5 C
Phoenix: 2 x 15.0 / 17.5 / 20.0 C
The "old" mill: 1 x 4.2 / 4.2 / 4.2 C
Zugspitze: 3 x -14.0 / -11.5 / -9.0 C
"""


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name / "host.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


@pytest.mark.parametrize(("name", "output"), [("logger", LOGGER), ("kv", KV), ("csv", CSV), ("calls", CALLS)])
def test_example_prints_what_it_should(name: str, output: str) -> None:
    done = run(name)
    assert (done.stdout, done.stderr, done.returncode) == (output, "", 0)


def test_pipeline_reads_any_file(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    rows = "".join(f"Station {number % 3},day {number},{number % 40},C\r\n" for number in range(60))
    path.write_text('station,day,temperature,unit\r\n"two\nlines",1,20,C\r\n' + rows)
    done = run("csv", str(path))
    assert done.stderr == ""
    assert done.stdout.splitlines()[:2] == [
        "Station 0: 20 x 0.0 / 16.5 / 39.0 C",
        "Station 1: 20 x 0.0 / 15.5 / 37.0 C",
    ]
    assert done.stdout.endswith("two\nlines: 1 x 20.0 / 20.0 / 20.0 C\n")


def test_store_that_is_deployed_anew_keeps_its_entries(bridge: LuaHostBridge) -> None:
    bridge.deploy(EXAMPLES / "kv")
    store = bridge.contract("host.kv")
    values = {"": b"", "two\nlines": bytes(range(256)), "ключ": b"7 8 9\n" * 1000}
    revisions = {key: store.put(key, value) for key, value in values.items()}
    for _ in range(2):
        bridge.deploy(EXAMPLES / "kv")
    for key, value in values.items():
        entry = store.get(key)
        assert (entry.found, entry.revision, entry.value) == (True, revisions[key], value)
    assert store.keys() == sorted(values, key=str.encode)
    assert store.put("more", b"") == len(values) + 1
