"""What a broker tells of its state."""

import pytest

from luacell.broker import snapshot as snapshot_module
from luacell.broker.causes import Cause
from luacell.broker.quarantine import CRASHES_MAX
from luacell.broker.snapshot import snapshot
from luacell.protocol.confinement import Layer
from luacell.protocol.limits import NS_PER_S
from tests.broker.bench import HOST, OTHER_HOST, SEGFAULT, Bench

LONG_US = 60_000_000


def test_it_tells_what_is_there() -> None:
    bench = Bench(spares=0, window=1)
    worker = bench.serve(deadline_us=LONG_US, run_limit_us=LONG_US)
    bench.done(bench.call())
    running = bench.call()
    for _ in range(2):
        bench.call()
    worker.pid = 4321
    layers = (Layer("seccomp", True, "no fork"), Layer("landlock", False, "this kernel has none"))
    bench.workforce.posture = {"default": layers}
    assert snapshot(bench.dispatcher, bench.books, bench.now_ns) == {
        "state": "serving",
        "hosts": 2,
        "contracts": 1,
        "worker_host": True,
        "workers": [
            {
                "id": worker.id,
                "pid": 4321,
                "state": "busy",
                "contract": "0x0000000000000001",
                "sandbox": "default",
                "served": 1,
            }
        ],
        "spares": 0,
        "spares_wanted": 0,
        "pools": [
            {
                "contract": "0x0000000000000001",
                "workers_max": 1,
                "workers": 1,
                "idle": 0,
                "busy": 1,
                "loading": 0,
                "ahead": 1,
                "queued": 1,
                "window": 1,
            }
        ],
        "queued": 1,
        "slots_in_flight": 3,
        "slots": {"free": 61, "held": 3, "kept": 0},
        "memory_bytes": running.pair.shape.total_bytes,
        "answered": 1,
        "deaths": {},
        "quarantined": [],
        "posture": {"level": "default", "layers": ["seccomp"]},
        "sandbox": [
            {"level": "default", "layer": "seccomp", "in_force": True, "detail": "no fork"},
            {"level": "default", "layer": "landlock", "in_force": False, "detail": "this kernel has none"},
        ],
    }


def test_slots_of_calls_that_were_given_up_are_kept() -> None:
    bench = Bench()
    bench.serve()
    bench.cancel(bench.call())
    assert snapshot(bench.dispatcher, bench.books, bench.now_ns)["slots"] == {"free": 63, "held": 0, "kept": 1}


def test_it_shows_workers_without_a_contract_and_deaths_by_cause() -> None:
    bench = Bench(spares=2)
    bench.die(bench.ready(), SEGFAULT)
    bench.die(bench.ready(), Cause(exit_code=7))
    bench.ready()
    shown = snapshot(bench.dispatcher, bench.books, bench.now_ns)
    assert {(each["state"], each["contract"]) for each in shown["workers"]} >= {("blank", None)}
    assert shown["deaths"] == {"SIGSEGV": 1, "exit 7": 1}
    assert shown["posture"] == {"level": "default", "layers": []}


def test_private_contracts_are_not_counted_and_pools_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.serve(1, private=True)
    for contract_id in (2, 3):
        bench.serve(contract_id)
    bench.register(4)
    bench.dispatcher.drain()
    monkeypatch.setattr(snapshot_module, "POOLS_MAX", 2)
    shown = snapshot(bench.dispatcher, bench.books, bench.now_ns)
    assert (shown["contracts"], len(shown["pools"]), shown["state"]) == (2, 2, "draining")


def test_it_tells_who_rests_and_for_how_long() -> None:
    bench = Bench(spares=0)
    bench.serve(1)
    bench.serve(2)
    first, second = (bench.catalogue.serving[contract_id] for contract_id in (1, 2))
    second.retry_ns = bench.now_ns + NS_PER_S // 2
    for host in (HOST, OTHER_HOST):
        for _ in range(CRASHES_MAX):
            first.quarantine.crashed(host, bench.call(2), bench.now_ns)
    first.quarantine.accepted(HOST, bench.call(2))
    rows = snapshot(bench.dispatcher, bench.books, bench.now_ns)["quarantined"]
    assert [(row["host"], row["why"], row["retry_after_s"]) for row in rows] == [
        (None, "trying", 1.0),
        (HOST.hex(), "trying", 1.0),
        (OTHER_HOST.hex(), "crashes", 1.0),
        (None, "does not load", 0.5),
    ]
