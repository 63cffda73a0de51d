"""Log records: one line of JSON each, whatever they carry."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from luacell.protocol.logs import JsonFormatter, configure_logging


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, given back as it was."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def record(event: str, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("luacell.broker", logging.WARNING, "x.py", 1, event, (), None)
    made.created = 1_700_000_000.123456
    for name, value in extra.items():
        setattr(made, name, value)
    return made


def test_record_is_one_json_line_with_its_fields() -> None:
    line = JsonFormatter().format(record("worker died", fields={"worker": 3, "cause": "signal 11"}))
    assert line == (
        '{"at": 1700000000.123, "level": "warning", "logger": "luacell.broker", "event": "worker died",'
        ' "worker": 3, "cause": "signal 11"}'
    )


def test_line_breaks_and_unknown_types_stay_within_the_line() -> None:
    line = JsonFormatter().format(record("a\nb\r\u2028", fields={"raw": b"\n", "kind": ValueError("x\ny")}))
    assert "\n" not in line
    assert "\r" not in line
    assert json.loads(line)["raw"] == "b'\\n'"
    assert json.loads(line)["event"] == "a\nb\r\u2028"


def test_record_without_fields_has_none() -> None:
    assert set(json.loads(JsonFormatter().format(record("ready")))) == {"at", "level", "logger", "event"}


def test_exception_goes_into_the_line() -> None:
    try:
        raise ValueError("out of range")
    except ValueError:
        failed = record("failed", exc_info=sys.exc_info())
    line = JsonFormatter().format(failed)
    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("ValueError: out of range")


def test_configured_logging_writes_to_stderr_from_its_level_on(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging("warning")
    configure_logging("warning")  # a second time replaces the first
    log = logging.getLogger("luacell.test")
    log.info("quiet")
    log.warning("loud", extra={"fields": {"n": 1}})
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["event"] == "loud"
    assert json.loads(line)["n"] == 1


def test_unknown_level_is_refused(root: logging.Logger) -> None:
    with pytest.raises(ValueError):
        configure_logging("loud")
