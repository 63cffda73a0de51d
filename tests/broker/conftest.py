"""What tests of the broker's threads share."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue

import pytest


@pytest.fixture
def inbox() -> SimpleQueue[Callable[[], None]]:
    """Where a thread delivers what is to be done in the loop."""
    return SimpleQueue()
