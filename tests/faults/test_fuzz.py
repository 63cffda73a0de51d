"""Wire fuzz by hypothesis from golden frames and corpus; `make test-soak SOAK=fuzz` does it by chance, for long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.soak import fuzz
from tests.soak.fuzz import CORPUS, LoneBroker, Target, frames, mutated

SETTINGS = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MUTATIONS = st.builds(
    mutated, st.sampled_from(frames()), st.sampled_from(frames()), st.randoms(use_true_random=False)
) | st.binary(max_size=64)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with Target(tmp_path_factory.mktemp("fuzz")) as target:
        yield target


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoneBroker]:
    with LoneBroker(tmp_path_factory.mktemp("fuzz")) as lone:
        yield lone


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.hex")), ids=lambda path: path.stem)
def test_z18_z20_frame_of_the_corpus_harms_nobody_from_any_side(target: Target, lone: LoneBroker, path: Path) -> None:
    frame = bytes.fromhex(path.read_text())
    for side in (target.as_host, target.as_several_frames, target.as_stranger, target.as_worker, lone.as_worker_host):
        side(frame)
        target.check()
    assert lone.process.poll() is None


@given(frame=MUTATIONS)
@SETTINGS
def test_z18_z20_mutated_frame_of_a_host_harms_nobody(target: Target, frame: bytes) -> None:
    target.as_host(frame)
    target.as_several_frames(frame)
    target.as_stranger(frame)
    target.check()


@given(frame=MUTATIONS)
@SETTINGS
def test_z18_z20_mutated_frame_of_a_worker_host_does_not_end_the_broker(lone: LoneBroker, frame: bytes) -> None:
    lone.as_worker_host(frame)
    assert lone.process.poll() is None


@given(frame=MUTATIONS)
@settings(SETTINGS, max_examples=40)
def test_z18_z20_mutated_frame_of_a_worker_harms_nobody(target: Target, frame: bytes) -> None:
    target.as_worker(frame)
    target.check()


def test_z18_z20_fuzz_by_chance_leaves_memory_as_it_is() -> None:
    fuzz.run(1, rounds=800).check()
