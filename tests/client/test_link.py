"""How long a bridge looks for its broker, and how often."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from luacell.client.arguments import Arguments
from luacell.client.link import Budget, Place, may_look_again, pauses
from luacell.protocol.errors import Unavailable
from tests.support.waiting import LIMIT_S


def test_hosts_and_workers_that_share_memory_do_not_import_libzmq() -> None:
    code = "import sys, luacell.client, luacell.worker.__main__; print('zmq' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert shown.stdout.strip() == "False"


def test_pauses_double_up_to_a_bound() -> None:
    assert list(islice(pauses(), 7)) == [0.01, 0.02, 0.04, 0.08, 0.16, 0.25, 0.25]


@pytest.mark.parametrize(
    ("timeout_us", "deadline_us", "wanted_s"),
    [(0, 0, 5.0), (2_000_000, 0, 2.0), (0, 3_000_000, 3.0), (2_000_000, 3_000_000, 2.0), (4_000_000, 3_000_000, 3.0)],
)
def test_budget_is_the_smaller_of_timeout_and_deadline(timeout_us: int, deadline_us: int, wanted_s: float) -> None:
    place = Place(Path("/run"), None)
    place.deadlines_us[7] = deadline_us
    budget = Budget.of(Arguments(7, 0, None, None, 0, timeout_us), place)
    before_s = time.monotonic()
    assert wanted_s - 1 < budget.until_s - before_s <= wanted_s
    assert budget.left_us() == 0 if wanted_s == 5.0 else 0 < budget.left_us() <= wanted_s * 1_000_000


def test_budget_that_is_used_up_leaves_the_shortest_timeout() -> None:
    budget = Budget(1)
    while budget.left_s:
        pass
    assert budget.left_us() == 1


@pytest.mark.parametrize(
    ("began", "is_open", "wanted"), [("no", False, True), ("unknown", False, False), ("no", True, False)]
)
def test_only_what_was_never_sent_may_be_sent_again(began: str, is_open: bool, wanted: bool) -> None:
    error = Unavailable("gone", began=began)  # type: ignore[arg-type]
    assert may_look_again(error, is_open) is wanted
