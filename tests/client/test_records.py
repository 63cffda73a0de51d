"""What a service writes becomes records of the stdlib logger, whatever it is, and never stops the service."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luacell.client.records import LINE_MAX, OTHER, PIPE_SIZE, ServiceLog, Splitter, read_line, wanted_level


def line(**values: object) -> bytes:
    return json.dumps(values).encode()


# -- lines ----
def test_line_of_the_service_keeps_logger_level_time_and_fields() -> None:
    raw = line(at=12.5, level="warning", logger="luacell.broker", event="worker died", worker=3, cause="signal 11")
    read = read_line(raw)
    assert read.logger == "luacell.broker"
    assert read.level == logging.WARNING
    assert read.text == 'worker died worker=3 cause="signal 11"'
    assert read.at_s == 12.5


@pytest.mark.parametrize(
    "raw",
    [
        b"Segmentation fault",
        b"\xff\xfe",
        b"{",
        b"[1, 2]",
        b"42",
        line(event="no level"),
        line(level="warning"),
        line(level="loud", event="x"),
        line(level=["info"], event="x"),
        b"[" * 100_000,
    ],
)
def test_anything_else_is_a_warning(raw: bytes) -> None:
    read = read_line(raw)
    assert (read.logger, read.level, read.at_s) == (OTHER, logging.WARNING, None)
    assert read.text == raw.decode("utf-8", "replace")[: len(read.text)]
    assert read.text


@pytest.mark.parametrize(
    ("name", "wanted"), [("luacell", "luacell"), ("root", OTHER), ("luacellar", OTHER), (3, OTHER)]
)
def test_no_line_speaks_for_another_logger(name: object, wanted: str) -> None:
    assert read_line(line(level="info", logger=name, event="x")).logger == wanted
    assert read_line(line(level="info", logger=name, event="x", at="noon")).at_s is None


@given(st.lists(st.binary(max_size=50).filter(lambda raw: b"\n" not in raw)), st.randoms(use_true_random=False))
def test_lines_are_the_same_however_they_arrive(lines: list[bytes], dice: object) -> None:
    stream = b"".join(each + b"\n" for each in lines)
    splitter, found = Splitter(), []
    while stream:
        size = dice.randrange(1, 20)  # type: ignore[attr-defined]
        found += splitter.feed(stream[:size])
        stream = stream[size:]
    assert found + splitter.end() == [each for each in lines if each.strip()]


def test_endless_line_is_cut_and_the_rest_is_not_kept_for_ever() -> None:
    splitter = Splitter()
    pieces = splitter.feed(b"x" * (3 * LINE_MAX + 5))
    assert [len(piece) for piece in pieces] == [LINE_MAX] * 3
    assert splitter.end() == [b"x" * 5]


# -- the pipe ----
@pytest.fixture
def service_log() -> Iterator[ServiceLog]:
    with closing(ServiceLog()) as log:
        yield log


def test_records_reach_the_logger_with_their_own_time(
    service_log: ServiceLog, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "luacell")
    os.write(service_log.writer, line(at=1.5, level="info", logger="luacell.broker", event="100 % done") + b"\nplain")
    assert service_log.read()
    assert [(r.name, r.levelno, r.getMessage(), r.created) for r in caplog.records] == [
        ("luacell.broker", logging.INFO, "100 % done", 1.5)
    ]
    service_log.close_writer()
    assert not service_log.read()
    assert caplog.records[-1].getMessage() == "plain"
    assert caplog.records[-1].name == OTHER
    assert service_log.last_words() == "100 % done\nplain"


def test_records_below_the_level_are_not_handled(service_log: ServiceLog, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "luacell")
    os.write(service_log.writer, line(level="info", event="x") + b"\n")
    service_log.read()
    assert not caplog.records


def test_service_never_waits_for_its_reader(service_log: ServiceLog) -> None:
    written = 0
    with pytest.raises(BlockingIOError):
        while True:
            written += os.write(service_log.writer, b"x" * 100 + b"\n")
    assert 0 < written <= PIPE_SIZE
    assert service_log.read()
    assert os.write(service_log.writer, b"more\n") == 5


def test_handler_that_reads_the_log_again_does_no_harm(
    service_log: ServiceLog, caplog: pytest.LogCaptureFixture
) -> None:
    class Curious(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert service_log.read()

    handler = Curious()
    logging.getLogger("luacell").addHandler(handler)
    try:
        os.write(service_log.writer, b"one\ntwo\n")
        service_log.read()
    finally:
        logging.getLogger("luacell").removeHandler(handler)
    assert [record.getMessage() for record in caplog.records] == ["one", "two"]


def test_closed_log_is_closed() -> None:
    log = ServiceLog()
    log.close()
    log.close()
    assert not log.read()
    assert log.descriptor == log.writer == -1


@pytest.mark.parametrize(
    ("level", "wanted"),
    [(logging.DEBUG, "debug"), (15, "info"), (logging.WARNING, "warning"), (99, "critical")],
)
def test_service_writes_what_somebody_listens_to(level: int, wanted: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(level, "luacell")
    assert wanted_level() == wanted
