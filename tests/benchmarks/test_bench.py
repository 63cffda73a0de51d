"""The benchmark runs, and every figure is there and sane; how fast anything is, is not a test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure import Target

ROOT = Path(__file__).parents[2]
SIZES = ("64 B", "4 KiB", "64 KiB", "1 MiB", "16 MiB", "64 MiB")
NAMES = {
    "sequential": {"in-process lupa, 64 B", "pipe ping-pong, 64 B", "brokered, 64 B"},
    "in-flight": {
        f"{count} in flight, {how} per message" for count in (1, 8, 32, 128) for how in ("one call", "several")
    },
    "idle": {"with 4 idle hosts", "with 3 idle workers", "with 5 registered contracts"},
    "argument": {"1 MiB argument"},
    "sizes": {f"echo of {size}" for size in SIZES},
    "callers": {"asyncio bridge, 1 task", "asyncio bridge, 50 tasks", "bridge, 16 threads"},
    "inline": {"inline over TCP, echo of 64 B", "inline over TCP, echo of 1 MiB"},
    "typed": {"typed (u8, f64, bool) -> f64", "record of 9 fields to bytes and back"},
    "sandbox": {"start, default", "start, hardened", "start, untrusted", "call, hardened"},
}
TARGETS = {
    "brokered, 64 B": (1.5, 1.25),
    "128 in flight, one call per message": (0.25, 0.5),
    "128 in flight, several per message": (0.4, 1.0),
    "with 4 idle hosts": (1.25, 1.1),
    "with 3 idle workers": (1.25, 1.1),
    "with 5 registered contracts": (1.25, 1.1),
    "1 MiB argument": (1.5, 1.2),
    "echo of 16 MiB": (1.4, 1.1),
    "typed (u8, f64, bool) -> f64": (1.3, 1.15),
    "record of 9 fields to bytes and back": (1.0, 0.5),
    "call, hardened": (1.05, 1.02),
}

pytestmark = pytest.mark.timeout(240)  # the whole run is part of the first test


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--profile", "--json", str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=220)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, json.loads(path.read_text())


def test_every_figure_is_there_and_sane(run: tuple[str, dict[str, Any]]) -> None:
    figures = run[1]["figures"]
    found: dict[str, set[str]] = {}
    for figure in figures:
        found.setdefault(figure["group"], set()).add(figure["name"])
        assert figure["unit"] in ("us", "calls/s")
        assert figure["value"] > 0 and figure["beside_value"] > 0 and figure["p99"] > 0
        assert len(figure["batches"]) == len(figure["beside_batches"]) == 2
        first, second = (a / b for a, b in zip(figure["batches"], figure["beside_batches"], strict=True))
        assert figure["ratio"] == pytest.approx((first + second) / 2)
        assert min(figure["batches"]) <= figure["value"] <= max(figure["batches"])
    assert found == NAMES
    assert run[1]["left_out"] == []


def test_targets_stand_beside_their_figures(run: tuple[str, dict[str, Any]]) -> None:
    targets = {each["name"]: each["target"] for each in run[1]["figures"] if each["target"]}
    assert {name: (target["must"], target["goal"]) for name, target in targets.items()} == TARGETS
    for figure in run[1]["figures"]:
        assert (figure["verdict"] in ("goal", "must", "MISSED")) == (figure["name"] in targets)


def test_the_table_shows_all_of_it_and_where_it_was_taken(run: tuple[str, dict[str, Any]]) -> None:
    out, told = run
    assert told["placement"] == "all processes on one CPU"
    for fact in (told["placement"], told["python"], told["kernel"], *(figure["name"] for figure in told["figures"])):
        assert fact in out


def test_the_profile_shows_the_broker_s_hot_path_in_each_way(run: tuple[str, dict[str, Any]]) -> None:
    _, *profiles = run[0].split("\nbroker, ")
    assert len(profiles) == 3
    for profile in profiles:
        assert "dispatcher.py" in profile and "server.py" in profile


@pytest.mark.parametrize(
    ("target", "ratio", "verdict"),
    [
        (Target(1.5, 1.25), 1.25, "goal"),
        (Target(1.5, 1.25), 1.26, "must"),
        (Target(1.5, 1.25), 1.51, "MISSED"),
        (Target(0.25, 0.5, at_least=True), 0.5, "goal"),
        (Target(0.25, 0.5, at_least=True), 0.49, "must"),
        (Target(0.25, 0.5, at_least=True), 0.24, "MISSED"),
    ],
)
def test_verdicts(target: Target, ratio: float, verdict: str) -> None:
    assert target.verdict(ratio) == verdict
