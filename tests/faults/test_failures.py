"""Part E of the catalogue: the n-th operation fails. A part of it; `make test-soak SOAK=failures` does the whole."""

from __future__ import annotations

import errno
import sqlite3

import pytest

from tests.soak.failures import Place, run_places, run_starts


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
def test_e_every_call_is_answered_and_nothing_is_left_when_the_nth_operation_fails(place: Place) -> None:
    report = run_places([place])
    report.check()
    assert report.figures["places"] == "1 of 1 met"


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
