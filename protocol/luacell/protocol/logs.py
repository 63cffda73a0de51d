"""How processes of luacell write their log records: one JSON object a line, to stderr.

Records are events with fields, given as `extra={"fields": {...}}`; successful calls write none.
"""

from __future__ import annotations

import json
import logging
import sys


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON line: at (wall clock, seconds), level, logger, event, then its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        values = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str, ensure_ascii=False)


def configure_logging(level: str) -> None:
    """Send the records of this process to stderr.

    Args:
        level: "debug", "info", "warning", "error" or "critical".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
