"""Part E of the catalogue: the n-th operation fails. A part of it; `make test-soak SOAK=failures` does the whole."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator

import pytest

from tests.soak.failures import Failures, Place, run_starts

pytestmark = pytest.mark.timeout(240)  # a place has many operations, each of which fails once


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failures]:
    """One service for all places: after each it serves as before, or the test of that place has failed."""
    with Failures(tmp_path_factory.mktemp("failures")) as failures:
        yield failures


@pytest.mark.parametrize(
    "place",
    [
        ("memfd_create", "broker", errno.EMFILE),
        ("fallocate", "broker", errno.ENOSPC),
        ("mmap", "broker", errno.ENOMEM),
        ("mmap", "worker", errno.ENOMEM),
        ("fork", "worker host", errno.EAGAIN),
        ("pidfd_open", "worker host", errno.EMFILE),
        ("recv", "worker host", errno.ECONNRESET),
        ("send_descriptors", "broker", errno.ETOOMANYREFS),
        ("epoll_ctl", "broker", errno.ENOSPC),
        ("sqlite", "broker", sqlite3.SQLITE_FULL),
        ("log", "broker", errno.ENOSPC),
    ],
    ids=lambda place: f"E-{place[0]}-{place[1].replace(' ', '_')}",
)
def test_e_every_call_is_answered_and_nothing_is_left_when_the_nth_operation_fails(
    failures: Failures, place: Place
) -> None:
    known = len(failures.tally.violations)
    run_count = failures.run(*place)
    assert failures.tally.violations[known:] == []
    assert run_count > 0, "nothing of the kind was done"


@pytest.mark.parametrize(
    "place",
    [
        ("bind", "broker", errno.EACCES),
        ("sqlite", "broker", sqlite3.SQLITE_BUSY),
        ("fork", "worker host", errno.ENOMEM),
    ],
    ids=lambda place: f"E-start-{place[0]}",
)
def test_e_service_starts_or_says_why_not_when_the_nth_operation_fails(place: Place) -> None:
    report = run_starts([place])
    report.check()
    assert report.figures["places"] == "1 of 1 met"
