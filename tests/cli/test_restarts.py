"""The policy of restarts: back-off, intensity and period."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luacell.cli.restarts import BACKOFF_MAX_S, HEALTHY_S, INTENSITY, PERIOD_S, Restarts


def crash(restarts: Restarts, now_s: float, after_s: float = 0.0) -> float | None:
    """Start the child, and let it end after a while."""
    restarts.started(now_s)
    return restarts.ended(now_s + after_s)


def test_the_policy_is_five_restarts_in_sixty_seconds() -> None:
    assert (INTENSITY, PERIOD_S) == (5, 60.0)


def test_back_off_doubles_from_ten_milliseconds() -> None:
    restarts = Restarts()
    assert [crash(restarts, 100.0) for _ in range(4)] == pytest.approx([0.01, 0.02, 0.04, 0.08])


def test_back_off_ends_at_its_maximum() -> None:
    restarts = Restarts(intensity=100)
    delays = [crash(restarts, 100.0) for _ in range(20)]
    assert delays[-1] == BACKOFF_MAX_S == 5.0
    assert delays == sorted(delays, key=lambda delay: delay or 0.0)


def test_after_a_healthy_time_the_back_off_starts_anew() -> None:
    restarts = Restarts()
    crash(restarts, 100.0)
    assert crash(restarts, 100.0) == pytest.approx(0.02)
    assert crash(restarts, 101.0, HEALTHY_S) == pytest.approx(0.01)


def test_the_sixth_ending_within_the_period_is_given_up() -> None:
    restarts = Restarts()
    assert None not in [crash(restarts, 100.0 + index) for index in range(5)]
    assert crash(restarts, 159.9) is None
    assert restarts.describe() == "6 times within 60 s"


def test_endings_that_are_older_than_the_period_do_not_count() -> None:
    restarts = Restarts()
    assert None not in [crash(restarts, 100.0 + index) for index in range(5)]
    assert crash(restarts, 160.0) is not None, "the first one is 60 s ago"
    assert crash(restarts, 160.5) is None


def test_a_child_that_ends_now_and_then_is_started_for_ever() -> None:
    restarts = Restarts()
    assert all(crash(restarts, index * 12.0, 11.0) is not None for index in range(1000))
    assert restarts.describe() == "5 times within 60 s"


def test_one_ending_is_one_time() -> None:
    restarts = Restarts(intensity=0, period_s=1.5)
    assert crash(restarts, 1.0) is None
    assert restarts.describe() == "1 time within 1.5 s"


@given(st.lists(st.floats(0, 30), max_size=60))
def test_no_period_has_more_restarts_than_the_intensity(gaps_s: list[float]) -> None:
    restarts, now_s, restarted_s = Restarts(), 0.0, list[float]()
    for gap_s in gaps_s:
        now_s += gap_s
        if crash(restarts, now_s) is None:
            break
        restarted_s.append(now_s)
    for first_s in restarted_s:
        assert sum(first_s <= each_s < first_s + PERIOD_S for each_s in restarted_s) <= INTENSITY
