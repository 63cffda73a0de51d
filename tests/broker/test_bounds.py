"""Hosts, workers and segments: as many as the descriptors allow, and a reserve of these is never used."""

import pytest

from luacell.broker.books import Books, Pair, Refusal
from luacell.broker.bounds import OWN, PER_HOST, PER_PAIR, PER_WORKER, Bounds, bounds_for, usable_descriptors
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.limits import SESSIONS_MAX, WORKERS_MAX
from luacell.protocol.slots import SlotShape
from tests.broker.bench import CONTRACT, HOST, Bench

SHAPE = SlotShape.for_payloads(8, 8, 4)


@pytest.mark.parametrize("descriptors", [256, 1024, 4096, 65536, 1 << 20])
def test_what_is_allowed_leaves_the_reserve(descriptors: int) -> None:
    bounds = bounds_for(descriptors)
    used = OWN + bounds.hosts * PER_HOST + bounds.workers * PER_WORKER + bounds.pairs * PER_PAIR
    assert used <= usable_descriptors(descriptors)
    assert bounds.hosts <= SESSIONS_MAX
    assert bounds.workers <= WORKERS_MAX


@pytest.mark.parametrize(
    ("descriptors", "usable"),
    [(0, 0), (120, 96), (256, 160), (1024, 448), (2048, 1280), (4096, 3277), (1 << 20, 838861)],
)
def test_the_reserve_is_a_fifth_and_more_at_small_limits(descriptors: int, usable: int) -> None:
    assert usable_descriptors(descriptors) == usable


@pytest.mark.parametrize("descriptors", [0, 64, 90])
def test_something_is_allowed_however_few_there_are(descriptors: int) -> None:
    assert bounds_for(descriptors) == Bounds(hosts=1, workers=2, pairs=2)


def test_a_pair_too_many_is_refused_by_name_and_one_that_goes_makes_room() -> None:
    books = Books(pairs_max=2)
    first = books.plan_pair(HOST, 1, SHAPE)
    assert isinstance(first, Pair)
    assert isinstance(books.plan_pair(HOST, 2, SHAPE), Pair)
    refused = books.plan_pair(HOST, 3, SHAPE)
    assert isinstance(refused, Refusal)
    assert (refused.code, refused.limit) == (AbiErrorCode.BUSY, "segments of all hosts: 4")
    books.abandon(first)
    assert isinstance(books.plan_pair(HOST, 3, SHAPE), Pair)


def test_a_call_for_which_no_worker_can_be_had_is_refused_by_name() -> None:
    bench = Bench(spares=0)
    bench.workforce.workers_max = 1
    worker = bench.serve(1)
    bench.register(2)
    assert bench.replied == ("Busy", AbiErrorCode.BUSY)
    bench.workforce.workers_max = 2
    other = bench.serve(2)
    bench.done(bench.call(2))
    bench.die(worker)
    bench.workforce.workers_max = 1
    assert bench.workforce.is_full
    bench.send(bench.header(CONTRACT))
    assert (bench.failure.code, bench.failure.limit) == (AbiErrorCode.BUSY, "workers: 1")
    assert "bound on workers: 1" in bench.failure.message
    bench.die(other)
    assert bench.call(CONTRACT)
