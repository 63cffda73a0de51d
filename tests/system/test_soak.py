"""The long runs of `make test-soak` in small, and the checker that they rely on."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.soak import catalogue, chaos, crashes, crowds, kills, leaky, million, recovery, starts
from tests.soak.chaos import Host
from tests.soak.history import GRACE_S, VALUE, WRONG, End, History
from tests.soak.recovery import Limits
from tests.soak.remains import GONE_WITHIN_S
from tests.soak.report import Report

SEED = 1
BACK_WITHIN_S = 2.0  # twice the promise, which `make test-soak` asserts
TIMEOUT_S = 10.0  # of calls that wait for what is killed to be back, as slowly as the machine starts it


# -- the runs ----
def test_each_process_is_killed_under_calls() -> None:
    kills.run(SEED, rounds=1, back_within_s=BACK_WITHIN_S, timeout_s=TIMEOUT_S).check()


def test_calls_handed_ahead_to_workers_that_crash() -> None:
    crashes.run(SEED, crashes=40).check()


def test_crowds_get_their_own_answers_while_workers_are_killed() -> None:
    crowds.run(SEED, lasts_s=0.6, timeout_s=TIMEOUT_S).check()


def test_chaos_leaves_every_call_with_one_right_answer() -> None:
    chaos.run(SEED, lasts_s=3.0, copies=1, timeout_s=TIMEOUT_S).check()


def test_many_calls_leave_memory_and_descriptors_as_they_are() -> None:
    million.run(SEED, calls=20_000, sequential=500, judges_pace=False).check()


def test_recovery_is_measured_and_leaves_nobody_behind() -> None:
    recovery.run(SEED, rounds=1, limits=Limits(BACK_WITHIN_S, GONE_WITHIN_S)).check()


def test_workers_start_and_end_in_all_ways_and_leave_nothing() -> None:
    starts.run(SEED, ends=40).check()


def test_leaking_contracts_are_recycled_near_their_limits() -> None:
    leaky.run(SEED, calls=14_000, share_max=0.3).check()  # time for a successor to load


def test_the_catalogue_is_thrown_beside_healthy_calls() -> None:
    report = catalogue.run(SEED, "tests/faults/test_contracts.py", "c99")
    report.check()
    assert " passed" in report.figures["tests"]


def test_a_catalogue_that_cannot_be_thrown_is_a_violation(capsys: pytest.CaptureFixture[str]) -> None:
    report = catalogue.run(SEED, "tests/faults/nowhere.py")
    assert report.violations
    assert "nowhere.py" in capsys.readouterr().err


# -- the checker ----
@pytest.fixture
def history() -> History:
    return History(errors=["WorkerCrashed"])


@pytest.mark.parametrize("outcome", [VALUE, "WorkerCrashed"])
def test_one_answer_in_time_is_as_it_should_be(history: History, outcome: str) -> None:
    history.ended(history.sent("host.probe@1", 1.0), outcome)
    assert history.violations() == []
    assert history.outcomes() == {outcome: 1}


@pytest.mark.parametrize("times", [0, 2])
def test_lost_and_second_answers_are_seen(history: History, times: int) -> None:
    entry = history.sent("host.probe@1", 1.0)
    for _ in range(times):
        history.ended(entry, VALUE)
    assert history.violations() == [f"call 0 to host.probe@1 was answered {times} times"]


@pytest.mark.parametrize("outcome", [WRONG, "HostContractNotFound", "RuntimeError"])
def test_other_answers_and_errors_are_seen(history: History, outcome: str) -> None:
    history.ended(history.sent("host.probe@1", 1.0), outcome)
    assert history.violations() == [f"call 0 to host.probe@1 ended with {outcome}"]


def test_late_answers_are_seen(history: History) -> None:
    entry = history.sent("host.probe@1", 1.0)
    entry.ends.append(End(VALUE, entry.sent_s + 1.0 + GRACE_S + 0.1))
    assert history.violations() == ["call 0 to host.probe@1 ended 0.350 s after its deadline"]


def test_only_answers_with_values_show_that_the_service_is_back(history: History) -> None:
    history.ended(history.sent("host.probe@1", 1.0), "WorkerCrashed")
    entry = history.sent("host.probe@1", 1.0)
    history.ended(entry, VALUE)
    assert history.answered == [entry]
    assert entry.ends[0].ended_s <= time.monotonic()


def test_report_with_a_violation_is_a_failure() -> None:
    Report("a run", {"calls": "1"}, []).check()
    with pytest.raises(AssertionError, match="violations = 1; calls: 1\ncall 0 was lost"):
        Report("a run", {"calls": "1"}, ["call 0 was lost"]).check()


# -- the checker of chaos ----
def heard(*lines: str) -> Host:
    """Return what is known of a host that has told these lines."""
    told = "".join("\t".join(line.split(" ", 4)) + "\n" for line in lines)
    host = Host(subprocess.Popen([sys.executable, "-c", f"print({told!r}, end='')"], stdout=subprocess.PIPE))
    host.hear()
    host.process.communicate()
    return host


SENT = "sent 0 host.healthy0@1 10.0 2.0"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        pytest.param([SENT], "was answered 0 times", id="lost"),
        pytest.param([SENT, *["ended 0 value 10.1"] * 2], "was answered 2 times", id="second answer"),
        pytest.param([SENT, "ended 0 OutOfMemory 10.1"], "ended with OutOfMemory after 0.100 s", id="another's code"),
        pytest.param([SENT, "ended 0 value 12.6"], "ended 0.600 s after its deadline, with value", id="late"),
    ],
)
def test_chaos_sees_what_is_against_the_promises(lines: list[str], words: str) -> None:
    (fault,) = heard(*lines).faults(slack_s=0.1)
    assert words in fault


def test_chaos_forgives_what_the_death_or_the_stop_of_the_host_explains() -> None:
    killed = heard(SENT)
    killed.is_killed = True
    stopped = heard(SENT, "ended 0 value 12.6")
    stopped.stops.append((11.0, 11.4))
    assert killed.faults(slack_s=0.1) == stopped.faults(slack_s=0.1) == []
