"""Percentiles are those of the values themselves, within the width of a bucket."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luacell.cli.latencies import Latencies

values = st.lists(st.one_of(st.integers(0, 5000), st.integers(0, 10**12)), min_size=1, max_size=300)
percents = st.one_of(st.sampled_from([50, 90, 99, 99.9, 100]), st.floats(0.001, 100))


def latencies_of(numbers: list[int]) -> Latencies:
    latencies = Latencies()
    for number in numbers:
        latencies.add(number)
    return latencies


@given(values, percents)
def test_percentile_is_the_nearest_rank(numbers: list[int], percent: float) -> None:
    exact = sorted(numbers)[ceil(len(numbers) * percent / 100) - 1]
    found = latencies_of(numbers).percentile(percent)
    assert exact <= found <= exact + exact // 1024
    assert found <= max(numbers)


@given(values, values, percents)
def test_merged_is_the_same_as_counted_together(first: list[int], second: list[int], percent: float) -> None:
    merged = latencies_of(first)
    merged.merge(latencies_of(second))
    together = latencies_of(first + second)
    assert (merged.count, merged.max_ns) == (together.count, together.max_ns)
    assert merged.percentile(percent) == together.percentile(percent)


def test_small_values_are_exact() -> None:
    latencies = latencies_of(list(range(1, 101)))
    assert [latencies.percentile(percent) for percent in (1, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
    assert latencies_of([7]).percentile(0.001) == 7


@pytest.mark.parametrize("percent", [0, -1, 100.1])
def test_percentile_out_of_range_is_an_error(percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        latencies_of([1]).percentile(percent)


def test_nothing_has_no_percentile() -> None:
    with pytest.raises(ValueError, match="of 0 values"):
        Latencies().percentile(50)
