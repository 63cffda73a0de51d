"""What is told of an exception that nobody expected, and that any thread's ends the process."""

from __future__ import annotations

import json
import subprocess
import sys

from luacell.broker.fatal import EXIT_FAILED, TRACE_MAX, describe
from tests.support.waiting import LIMIT_S


def handle(depth: int) -> None:
    if depth:
        handle(depth - 1)
    raise KeyError("text\nof two lines")


def caught(depth: int, note: str = "") -> Exception:
    try:
        handle(depth)
    except KeyError as error:
        if note:
            error.add_note(note)
        return error
    raise AssertionError


def test_record_names_the_functions_the_message_and_the_exception() -> None:
    fields = describe(caught(1, "REGISTER of host ff"))
    assert fields["handler"] == "caught > handle > handle"
    assert fields["context"] == "REGISTER of host ff"
    assert fields["error"] == "KeyError: 'text\\nof two lines'"
    assert "in handle" in str(fields["trace"])


def test_record_is_bounded() -> None:
    fields = describe(caught(500, "x" * 2 * TRACE_MAX))
    assert len(str(fields["trace"])) <= TRACE_MAX
    assert len(str(fields["handler"]).split(" > ")) == 16


PROGRAM = """
import logging, signal, sys, threading
from luacell.broker import fatal
from luacell.protocol.logs import configure_queued_logging, plain_formatter
fatal.end_with_threads(configure_queued_logging("info", plain_formatter))
logging.getLogger("luacell.broker").info("before")
def work():
    raise SystemError("what nobody expected")
threading.Thread(target=work, name="a thread").start()
signal.pause()  # the thread ends the process
"""


def test_any_thread_that_fails_ends_the_process_after_its_records() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, timeout=LIMIT_S, check=False)
    assert ended.returncode == EXIT_FAILED
    before, told = [json.loads(line) for line in ended.stderr.splitlines()]
    assert before["event"] == "before"
    assert (told["event"], told["level"], told["thread"]) == ("broker failed", "critical", "a thread")
    assert told["error"] == "SystemError: what nobody expected"
    assert told["handler"].endswith("> work")
