"""How much memory a worker may have with its contract."""

import pytest

from luacell.protocol.limits import (
    HOST_MEMORY_MAX,
    MEMORY_DEFAULT,
    MEMORY_MAX,
    MEMORY_MIN,
    MIB,
    RSS_HARD_FACTOR,
    RSS_MARGIN,
    RSS_MAX,
    RSS_MIN,
    TOTAL_MEMORY_MAX,
)
from luacell.protocol.messages import Settings
from luacell.worker.sandbox.memory import SUPPOSED, UNLIMITED, Use, excess, headroom, is_full, limits, use

STATM = b"28247 5721 2053 1 0 8242 0\n"
PAGE = 4096
BEFORE = Use(32 * MIB, 111 * MIB, 14 * MIB)


def test_use_is_read_from_statm() -> None:
    assert use(STATM, PAGE) == Use(data=8242 * PAGE, address_space=28247 * PAGE, own=(5721 - 2053) * PAGE)


def test_use_is_supposed_where_proc_does_not_tell() -> None:
    assert use(b"", PAGE) == SUPPOSED
    assert SUPPOSED.data > use(STATM, PAGE).data
    assert excess(SUPPOSED, RSS_MIN) == ""


@pytest.mark.parametrize("memory", [MEMORY_MIN, MEMORY_DEFAULT, MEMORY_MAX])
@pytest.mark.parametrize("max_rss", [0, RSS_MIN, MEMORY_DEFAULT + RSS_MARGIN, RSS_MAX])
def test_worker_is_recycled_and_its_heap_full_before_the_kernel_refuses(memory: int, max_rss: int) -> None:
    headroom = limits(BEFORE, memory, max_rss).data - BEFORE.data
    assert headroom >= RSS_HARD_FACTOR * max_rss
    assert headroom >= 2 * memory
    assert headroom >= 128 * MIB
    assert headroom <= RSS_HARD_FACTOR * max(max_rss, memory + RSS_MARGIN)


def test_segments_of_all_hosts_can_be_mapped_beside_all_data() -> None:
    most = limits(BEFORE, MEMORY_MIN, RSS_MIN)
    rest = most.address_space - BEFORE.address_space - (most.data - BEFORE.data)
    assert rest == TOTAL_MEMORY_MAX >= 4 * HOST_MEMORY_MAX


def test_max_rss_is_memory_and_a_margin_where_the_broker_does_not_say() -> None:
    assert limits(BEFORE, MEMORY_DEFAULT, 0) == limits(BEFORE, MEMORY_DEFAULT, MEMORY_DEFAULT + RSS_MARGIN)


def test_worker_and_broker_agree_on_what_a_process_may_take() -> None:
    for memory, max_rss in ((MEMORY_DEFAULT, 0), (MEMORY_MIN, RSS_MIN), (MEMORY_MAX, RSS_MIN)):
        settings = Settings(memory=memory, max_rss=max_rss)
        assert headroom(memory, settings.rss_limit) == settings.process_memory


@pytest.mark.parametrize(
    ("taken_by_c", "heap", "is_by_process"),
    [
        pytest.param(0, 16, False, id="the heap is full"),
        pytest.param(0, 1, False, id="more was asked for than a heap may have"),
        pytest.param(110, 2, False, id="the heap has little, and there is more"),
        pytest.param(125, 2, True, id="C has taken all"),
        pytest.param(112, 16, False, id="both are full, the heap to the last byte"),
    ],
)
def test_what_lua_could_not_get_was_refused_by_its_heap_or_by_the_process(
    taken_by_c: int, heap: int, is_by_process: bool
) -> None:
    most = limits(BEFORE, 16 * MIB, RSS_MIN)
    now = BEFORE._replace(data=BEFORE.data + (taken_by_c + heap) * MIB)
    assert is_full(now, most, (16 - heap) * MIB) == is_by_process
    assert is_full(now._replace(data=now.data - MIB), most.less(MIB), (16 - heap) * MIB) == is_by_process
    assert not is_full(now, UNLIMITED, 16 * MIB)


@pytest.mark.parametrize(("own", "max_rss", "is_too_much"), [(63, 64, False), (64, 64, True), (64, 0, False)])
def test_contract_at_max_rss_as_soon_as_it_has_loaded_is_too_large(own: int, max_rss: int, is_too_much: bool) -> None:
    reason = excess(BEFORE._replace(own=own * MIB), max_rss * MIB)
    assert bool(reason) == is_too_much
    if reason:
        assert "64 MiB of memory as soon as it has loaded" in reason and "max_rss 64 MiB: raise max_rss" in reason
