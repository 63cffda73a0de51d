"""How the broker's log records look: structlog renders what the standard logging carries.

Importing structlog costs about 100 ms, so this module is cheap to import and only what it makes is not: the writer
thread of `luacell.protocol.logs` asks for it at its first record. Parent and worker host, which must start fast and
have one thread, write the same JSON by hand; a test holds the two forms together.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from luacell.protocol.logs import values_of


def make_formatter(*, readable: bool) -> logging.Formatter:
    """Return a formatter on top of structlog.

    Args:
        readable: for people at a terminal; else one JSON object a line.
    """
    import structlog

    if readable:
        timestamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
        rendering: list[Any] = [timestamp, structlog.dev.ConsoleRenderer()]
    else:
        rendering = [structlog.processors.JSONRenderer(serializer=_to_json)]
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[_lift_fields], processors=[remove_meta, *([_drop_at] if readable else []), *rendering]
    )


def _lift_fields(logger: Any, method: str, event: Any) -> Any:
    """Make a record of the standard logging what its line is to say."""
    values = values_of(event["_record"])
    return values | {key: event[key] for key in ("event", "_record", "_from_structlog")}


def _drop_at(logger: Any, method: str, event: Any) -> Any:
    del event["at"]
    return event


def _to_json(values: Any, **_: Any) -> str:
    return json.dumps(values, default=str, ensure_ascii=False)
