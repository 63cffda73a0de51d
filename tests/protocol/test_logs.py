"""Log records: one line each, whatever they carry, and nobody waits for whoever should read them."""

import json
import logging
import os
import pty
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luacell.broker.records import make_formatter
from luacell.protocol.logs import (
    RECORDS_MAX,
    DirectHandler,
    JsonFormatter,
    LineWriter,
    QueuedHandler,
    ReadableFormatter,
    configure_logging,
    configure_queued_logging,
)
from tests.support.waiting import LIMIT_S, eventually


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, given back as it was."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    for descriptor in (reader, writer):
        os.close(descriptor)


def record(event: str, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("luacell.broker", logging.WARNING, "x.py", 1, event, (), None)
    made.created = 1_700_000_000.123456
    for name, value in extra.items():
        setattr(made, name, value)
    return made


def failed_record() -> logging.LogRecord:
    try:
        raise ValueError("out of range")
    except ValueError:
        return record("failed", exc_info=sys.exc_info())


def lines_of(reader: int) -> list[str]:
    """Read what a pipe holds."""
    data = b""
    while True:
        try:
            chunk = os.read(reader, 1 << 20)
        except BlockingIOError:
            break
        if not chunk:
            break
        data += chunk
    return data.decode().splitlines()


def fill(writer: int) -> None:
    """Write until a pipe is full."""
    os.set_blocking(writer, False)
    for size in (4096, 1):  # what is left of the last page as well
        try:
            while True:
                os.write(writer, b"x" * (size - 1) + b"\n")
        except BlockingIOError:
            continue
    os.set_blocking(writer, True)


# -- lines ----
@pytest.fixture(params=["by hand", "structlog"])
def formatter(request: pytest.FixtureRequest) -> logging.Formatter:
    """Parent and worker host write by hand what the broker has rendered."""
    return JsonFormatter() if request.param == "by hand" else make_formatter(readable=False)


def test_record_is_one_json_line_with_its_fields(formatter: logging.Formatter) -> None:
    line = formatter.format(record("worker died", fields={"worker": 3, "cause": "signal 11"}))
    assert line == (
        '{"at": 1700000000.123, "level": "warning", "logger": "luacell.broker", "event": "worker died",'
        ' "worker": 3, "cause": "signal 11"}'
    )


def test_line_breaks_and_unknown_types_stay_within_the_line(formatter: logging.Formatter) -> None:
    line = formatter.format(record("a\nb\r\u2028", fields={"raw": b"\n", "kind": ValueError("x\ny")}))
    assert "\n" not in line
    assert "\r" not in line
    assert json.loads(line)["raw"] == "b'\\n'"
    assert json.loads(line)["event"] == "a\nb\r\u2028"


def test_record_without_fields_has_none(formatter: logging.Formatter) -> None:
    assert set(json.loads(formatter.format(record("ready")))) == {"at", "level", "logger", "event"}


def test_arguments_go_into_the_event(formatter: logging.Formatter) -> None:
    assert json.loads(formatter.format(record("%d of %d", args=(1, 2))))["event"] == "1 of 2"


def test_exception_goes_into_the_line(formatter: logging.Formatter) -> None:
    line = formatter.format(failed_record())
    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("ValueError: out of range")


@pytest.mark.parametrize("readable", [ReadableFormatter(), make_formatter(readable=True)], ids=["by hand", "structlog"])
def test_readable_record_has_everything_and_is_no_json(readable: logging.Formatter) -> None:
    line = readable.format(record("worker died", fields={"worker": 3, "text": "a\nb"}))
    assert not line.startswith("{")
    for word in ("warning", "luacell.broker", "worker died", "worker", "3"):
        assert word in line
    assert "\n" not in line


# -- a process with one thread ----
def test_records_are_written_at_once(pipe: tuple[int, int]) -> None:
    handler = DirectHandler(pipe[1], JsonFormatter())
    handler.handle(record("one"))
    handler.close()
    (line,) = lines_of(pipe[0])
    assert json.loads(line)["event"] == "one"


def test_a_full_pipe_costs_records_and_they_are_counted(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = DirectHandler(writer, JsonFormatter())
    fill(writer)
    for _ in range(3):
        handler.handle(record("lost"))
    lines_of(reader)
    handler.handle(record("seen"))
    told = [json.loads(line) for line in lines_of(reader) if line.startswith("{")]
    assert [each["event"] for each in told] == ["3 records dropped", "seen"]
    assert told[0]["dropped"] == 3
    handler.close()


def test_whoever_shares_the_pipe_may_go_on_waiting(pipe: tuple[int, int]) -> None:
    lines = LineWriter(pipe[1])
    lines.write("x")
    assert os.get_blocking(pipe[1])
    lines.close()


def test_a_line_that_fits_only_in_part_does_not_spoil_the_next(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    lines = LineWriter(writer)
    assert not lines.write("x" * (1 << 20))
    lines_of(reader)
    assert lines.write("whole")
    assert lines_of(reader)[-1] == "whole"
    lines.close()


def test_a_socket_that_is_full_costs_records() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        lines = LineWriter(ours.fileno())
        assert lines.write("one")
        while lines.write("x" * 1000):
            pass
        assert ours.getblocking()
        assert theirs.recv(4) == b"one\n"
        lines.close()


def test_a_file_keeps_its_offset(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        file.write(b"before\n")
        file.flush()
        assert LineWriter(file.fileno()).write("after")
    assert (tmp_path / "log").read_text() == "before\nafter\n"


def test_a_reader_that_is_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    handler = DirectHandler(writer, JsonFormatter())
    handler.handle(record("lost"))
    handler.close()
    os.close(writer)


# -- a thread that writes ----
def test_queued_records_are_written_in_order(pipe: tuple[int, int]) -> None:
    handler = QueuedHandler(pipe[1], JsonFormatter)
    for number in range(100):
        handler.handle(record(str(number)))
    handler.close()
    assert [json.loads(line)["event"] for line in lines_of(pipe[0])] == [str(number) for number in range(100)]


def test_a_reader_that_stops_reading_costs_records_and_no_time(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = QueuedHandler(writer, JsonFormatter)
    fill(writer)
    for number in range(RECORDS_MAX + 500):
        handler.handle(record(str(number)))
    told: list[dict[str, Any]] = []

    def is_complete() -> bool:
        told.extend(json.loads(line) for line in lines_of(reader) if line.startswith("{"))
        return any("dropped" in each for each in told)

    eventually(is_complete, "the number of dropped records is told")
    dropped = sum(each.get("dropped", 0) for each in told)
    handler.close()
    is_complete()
    written = [each for each in told if "dropped" not in each]
    assert len(written) + dropped == RECORDS_MAX + 500
    assert 498 <= dropped <= 500


def test_a_record_without_a_text_is_counted_and_others_follow(pipe: tuple[int, int]) -> None:
    class Untellable:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    reader, writer = pipe
    handler = QueuedHandler(writer, JsonFormatter)
    handler.emit(record("lost", fields={"value": Untellable()}))
    handler.emit(record("kept"))
    handler.close()
    events = [json.loads(line)["event"] for line in os.read(reader, 4096).splitlines()]
    assert sorted(events) == ["1 records dropped", "kept"]


def test_closing_does_not_wait_for_a_reader_that_never_comes(pipe: tuple[int, int]) -> None:
    """In a process of its own: its thread is stuck for good, and must not keep the interpreter from ending."""
    code = """
    import logging, os
    from luacell.broker.records import make_formatter
    from luacell.protocol.logs import configure_queued_logging
    os.set_blocking(2, False)
    try:
        while True: os.write(2, b"x" * 4096)
    except BlockingIOError: os.set_blocking(2, True)
    handler = configure_queued_logging("info", make_formatter)
    for _ in range(10): logging.getLogger().info("stuck")
    handler.close()
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], stderr=pipe[1], timeout=LIMIT_S, check=False)
    assert ended.returncode == 0


# -- configuration ----
@pytest.mark.parametrize("queued", [False, True], ids=["direct", "queued"])
def test_configured_logging_writes_to_stderr_from_its_level_on(
    root: logging.Logger, capfd: pytest.CaptureFixture[str], queued: bool
) -> None:
    handlers = []
    for _ in range(2):  # a second time replaces the first
        if queued:
            handlers.append(configure_queued_logging("warning", make_formatter))
        else:
            configure_logging("warning")
    log = logging.getLogger("luacell.test")
    log.info("quiet")
    log.warning("loud", extra={"fields": {"n": 1}})
    for handler in handlers:
        handler.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "loud"
    assert json.loads(line)["n"] == 1


def test_unknown_level_is_refused(root: logging.Logger) -> None:
    with pytest.raises(ValueError):
        configure_logging("loud")


def test_a_terminal_gets_readable_records() -> None:
    code = "import logging; from luacell.protocol.logs import configure_logging; configure_logging('info');"
    terminal, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", code + "logging.getLogger('luacell').info('ready')"],
        stderr=theirs,
        timeout=LIMIT_S,
        check=True,
    )
    line = os.read(terminal, 4096).decode()
    for descriptor in (terminal, theirs):
        os.close(descriptor)
    assert "ready" in line
    assert "{" not in line


def test_processes_that_must_start_fast_do_not_import_structlog() -> None:
    modules = "luacell.worker.__main__, luacell.cli.serve, luacell.broker.__main__"
    code = f"import sys, {modules}; print('structlog' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert shown.stdout.strip() == "False"
