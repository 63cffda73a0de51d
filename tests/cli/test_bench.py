"""bench measures what it says: calls that were answered, by their callers' clocks, and errors by code."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from luacell.client import LuaHostBridge
from tests.support.command import Command
from tests.support.contracts import HEALTHY, PROBE, deploy, function
from tests.support.waiting import LIMIT_S, eventually

ARGS = ("--args-hex", "15000000", "--out-size", "4")


def test_bench_of_a_registered_contract(luacell: Command, endpoint: Path) -> None:
    with LuaHostBridge.connect(endpoint) as bridge:
        before = bridge.health()["answered"]
        words = ("--concurrency", "3", "--duration", "0.5", "--output", "json")
        measured = luacell("bench", HEALTHY, "0", *ARGS, *words).json
        answered = bridge.health()["answered"] - before
    assert measured["contract"] == HEALTHY
    assert (measured["args_bytes"], measured["out_bytes"], measured["concurrency"]) == (4, 4, 3)
    assert measured["errors"] == {}
    assert answered == measured["calls"] + 3, "each thread has called once before the clock ran"
    assert measured["seconds"] >= 0.5
    assert measured["calls_per_second"] == pytest.approx(measured["calls"] / measured["seconds"], rel=0.01)
    assert 0 < measured["p50_us"] <= measured["p90_us"] <= measured["p99_us"] <= measured["max_us"]


def test_percentiles_are_what_callers_wait(luacell: Command, endpoint: Path) -> None:
    """A call that takes 20 ms, from two threads on one worker: each caller waits for about 40."""
    with LuaHostBridge.connect(endpoint) as bridge:
        deploy(
            bridge, function("local e = luacell.deadline() - 0.02 while luacell.deadline() > e do end"), "host.spin@1"
        )
        measured = luacell("bench", "host.spin@1", "--concurrency", "2", "--duration", "1", "--output", "json").json
        bridge.unregister_host_contract("host.spin@1")
    assert measured["p50_us"] >= 20_000
    assert measured["calls"] <= measured["seconds"] / 0.02 + 2
    assert measured["calls"] * measured["p50_us"] / 1e6 <= 2 * 2 * measured["seconds"], "two callers wait at a time"


def test_bench_without_a_name_brings_its_own_service(tmp_path: Path) -> None:
    ended = Command(tmp_path / "nobody")("bench", "--duration", "0.2")
    assert ended.code == 0, ended
    head, *rows = ended.out.splitlines()
    assert head.startswith("host.echo@1 fn 0: 64 bytes in, 64 out, 1 at once, ")
    assert [row.split()[0] for row in rows] == ["calls", "per", "p50", "p90", "p99", "max"]


def test_errors_are_counted_by_code(luacell: Command) -> None:
    ended = luacell("bench", PROBE, "1", "--duration", "0.3", "--output", "json")
    assert ended.code == 1
    measured = ended.json
    assert measured["calls"] == 0
    assert measured["p50_us"] is None
    assert {"WORKER_CRASHED"} <= set(measured["errors"]) <= {"WORKER_CRASHED", "QUARANTINED"}
    shown = luacell("bench", PROBE, "1", "--duration", "0.1")
    assert "errors: WORKER_CRASHED" in shown.out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("host.nope@1",), 3),
        (("host.healthy",), 2),
        ((HEALTHY, "--concurrency", "0"), 2),
        ((HEALTHY, "--timeout", "0"), 2),
        (("--args-hex", "00", "--out-size", "2"), 2),
    ],
)
def test_what_cannot_be_measured_is_told(luacell: Command, words: tuple[str, ...], code: int) -> None:
    ended = luacell("bench", *words, "--duration", "0.1")
    assert ended.code == code, ended
    assert ended.errors
    assert ended.out == ""


def test_ctrl_c_ends_it_without_a_word(luacell: Command, endpoint: Path) -> None:
    with LuaHostBridge.connect(endpoint) as bridge:
        before = bridge.health()["answered"]
        process = luacell.start("bench", HEALTHY, *ARGS, "--concurrency", "4", "--duration", "60", stderr=-1)
        eventually(lambda: bridge.health()["answered"] > before + 50, "it calls")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert errors == b""
