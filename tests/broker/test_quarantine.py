from dataclasses import dataclass

import pytest

from luacell.broker.quarantine import (
    CRASHES_MAX,
    CRASHES_OF_ALL_MAX,
    HOSTS_MAX,
    PERIOD_NS,
    REST_FIRST_NS,
    REST_MAX_NS,
    TRIAL_WAIT_NS,
    Quarantine,
)
from luacell.protocol.limits import NS_PER_S

HOST, OTHER, THIRD = b"host", b"other", b"third"
START_NS = 1000 * NS_PER_S


@dataclass(eq=False)
class Deed:
    """A call, as far as the quarantine knows one."""

    has_ended: bool = True
    was_handed_over: bool = True


@pytest.fixture
def quarantine() -> Quarantine:
    return Quarantine()


def crash(quarantine: Quarantine, host: bytes = HOST, times: int = CRASHES_MAX, now_ns: int = START_NS) -> bool:
    return [quarantine.crashed(host, Deed(), now_ns) for _ in range(times)][-1]


def test_a_few_crashes_are_no_reason_to_rest(quarantine: Quarantine) -> None:
    assert not crash(quarantine, times=CRASHES_MAX - 1)
    assert not quarantine.is_in_force
    assert quarantine.wait_ns(HOST, START_NS) == 0


def test_the_fifth_crash_in_a_period_ends_the_calls_of_its_host_alone(quarantine: Quarantine) -> None:
    assert crash(quarantine)
    assert quarantine.is_in_force
    assert quarantine.wait_ns(HOST, START_NS) == REST_FIRST_NS
    assert quarantine.wait_ns(OTHER, START_NS) == 0


def test_crashes_that_are_far_apart_do_not_add_up(quarantine: Quarantine) -> None:
    for number in range(2 * CRASHES_MAX):
        assert not quarantine.crashed(HOST, Deed(), START_NS + number * PERIOD_NS // 3)


def test_two_hosts_that_rest_stop_the_contract_for_all(quarantine: Quarantine) -> None:
    crash(quarantine)
    assert crash(quarantine, OTHER)
    assert quarantine.whole is not None
    assert quarantine.wait_ns(THIRD, START_NS) == REST_FIRST_NS


def test_one_call_tries_and_the_others_wait_for_it(quarantine: Quarantine) -> None:
    crash(quarantine)
    later_ns = START_NS + REST_FIRST_NS
    assert quarantine.wait_ns(HOST, later_ns) == 0
    trial = Deed(has_ended=False)
    quarantine.accepted(HOST, trial)
    assert quarantine.is_trial(trial)
    assert not quarantine.is_trial(Deed())
    assert quarantine.wait_ns(HOST, later_ns) == TRIAL_WAIT_NS


def test_a_trial_that_goes_well_ends_the_rest(quarantine: Quarantine) -> None:
    crash(quarantine)
    crash(quarantine, OTHER)
    later_ns = START_NS + REST_FIRST_NS
    quarantine.accepted(HOST, Deed())
    assert quarantine.wait_ns(HOST, later_ns) == 0
    assert quarantine.whole is None
    assert list(quarantine.hosts) == [OTHER]
    assert not crash(quarantine, times=1)


def test_a_trial_that_no_worker_had_proves_nothing(quarantine: Quarantine) -> None:
    crash(quarantine)
    quarantine.accepted(HOST, Deed(was_handed_over=False))
    assert quarantine.wait_ns(HOST, START_NS + REST_FIRST_NS) == 0
    assert quarantine.is_in_force


def test_trials_that_crash_double_the_rest_up_to_a_bound(quarantine: Quarantine) -> None:
    crash(quarantine)
    now_ns, length_ns = START_NS, REST_FIRST_NS
    for _ in range(8):
        now_ns += length_ns
        trial = Deed(has_ended=False)
        quarantine.accepted(HOST, trial)
        assert quarantine.crashed(HOST, trial, now_ns)
        length_ns = min(2 * length_ns, REST_MAX_NS)
        assert quarantine.wait_ns(HOST, now_ns) == length_ns
    assert length_ns == REST_MAX_NS


def test_a_third_host_may_try_for_the_whole_contract(quarantine: Quarantine) -> None:
    crash(quarantine)
    crash(quarantine, OTHER)
    trial = Deed()
    quarantine.accepted(THIRD, trial)
    assert quarantine.crashed(THIRD, trial, START_NS + REST_FIRST_NS)
    assert quarantine.wait_ns(THIRD, START_NS + REST_FIRST_NS) == 2 * REST_FIRST_NS


def test_calls_that_were_under_way_when_the_rest_began_do_not_prolong_it(quarantine: Quarantine) -> None:
    crash(quarantine)
    assert not quarantine.crashed(HOST, Deed(), START_NS + 1)
    assert quarantine.hosts[HOST].length_ns == REST_FIRST_NS


def test_a_rest_that_nobody_asks_about_is_forgotten(quarantine: Quarantine) -> None:
    crash(quarantine)
    crash(quarantine, OTHER)
    quarantine.accepted(HOST, Deed(has_ended=False))
    later_ns = START_NS + REST_FIRST_NS + PERIOD_NS + 1
    quarantine.wait_ns(THIRD, later_ns)
    assert list(quarantine.hosts) == [HOST]
    quarantine.hosts[HOST].trial = None
    assert quarantine.whole is not None
    quarantine.whole.trial = None
    quarantine.wait_ns(THIRD, later_ns)
    assert not quarantine.is_in_force


def test_hosts_that_crash_it_once_each_stop_the_contract_for_all(quarantine: Quarantine) -> None:
    hosts = [str(number).encode() for number in range(CRASHES_OF_ALL_MAX)]
    assert [crash(quarantine, host, times=1) for host in hosts] == [False] * (CRASHES_OF_ALL_MAX - 1) + [True]
    assert quarantine.wait_ns(THIRD, START_NS) == REST_FIRST_NS
    assert not quarantine.hosts
    assert not crash(quarantine, hosts[0], times=1), "one that was under way"


def test_hosts_that_crash_it_once_each_and_seldom_do_not_add_up(quarantine: Quarantine) -> None:
    for number in range(4 * CRASHES_OF_ALL_MAX):
        now_ns = START_NS + number * (PERIOD_NS // (CRASHES_OF_ALL_MAX - 1) + 1)
        assert not crash(quarantine, str(number).encode(), times=1, now_ns=now_ns)


def test_crashes_of_a_host_that_rests_are_not_counted_for_all(quarantine: Quarantine) -> None:
    crash(quarantine)
    assert not crash(quarantine, OTHER, times=CRASHES_MAX - 1)
    assert not crash(quarantine, THIRD, times=CRASHES_MAX - 1)
    assert quarantine.whole is None


def test_the_crashes_of_so_many_hosts_are_remembered(quarantine: Quarantine) -> None:
    crash(quarantine, OTHER)
    crash(quarantine, THIRD)
    assert quarantine.whole is not None, "so that what is under way yet is not counted for all"
    crash(quarantine, times=CRASHES_MAX - 1)
    for number in range(HOSTS_MAX):
        crash(quarantine, str(number).encode(), times=1)
    assert not crash(quarantine, times=1)
    assert HOST not in quarantine.hosts
