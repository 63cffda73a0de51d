"""What the books know of the calls that are under way."""

import time

from luacell.cli.demo.books import Books


def test_the_oldest_waiting_call_is_known() -> None:
    books = Books()
    assert books.longest_wait_s(time.monotonic()) == 0
    with books.call():
        assert books.longest_wait_s(time.monotonic() + 5) >= 5
    assert books.longest_wait_s(time.monotonic()) == 0
