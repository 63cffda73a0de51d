"""What becomes of an exception that nobody expected: it is told loudly, and the broker ends.

A handler that was left in the middle may have changed half of what it was to change, so nothing that it touched is to
be trusted any more. The end is as sudden as kill -9, after which nothing stays behind either: hosts are told by the
kernel, within a moment, that the broker is gone, and the parent starts another one, which serves what is in the
registry's file. A thread that fails ends the broker as well: the loop would wait for ever for what it was to do.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from typing import Final, NoReturn

from luacell.protocol.logs import QueuedHandler

EXIT_FAILED: Final = 70  # EX_SOFTWARE; none of the codes for which a parent gives up
FRAMES_MAX: Final = 16  # names of functions, the innermost ones
TRACE_MAX: Final = 16_384  # characters of the traceback, its end

log = logging.getLogger("luacell.broker")


def describe(error: BaseException) -> dict[str, object]:
    """Return the fields of a record about an exception.

    Returns:
        `handler`: the functions that it came through, the innermost last; `error`: what it is; `context`: what its
        notes say was being done; `trace`: where it was raised.
    """
    names = [frame.f_code.co_qualname for frame, _ in traceback.walk_tb(error.__traceback__)]
    return {
        "handler": " > ".join(names[-FRAMES_MAX:]),
        "context": "; ".join(getattr(error, "__notes__", ())),
        "error": "".join(traceback.format_exception_only(error)).splitlines()[0],
        "trace": "".join(traceback.format_exception(error))[-TRACE_MAX:],
    }


def end(error: BaseException, records: QueuedHandler) -> NoReturn:
    """Tell of an exception, and end this process.

    Args:
        error: that nobody has caught.
        records: where records go; gets a moment to write those that wait.
    """
    fields = describe(error)
    log.critical("broker failed", extra={"fields": {"thread": threading.current_thread().name, **fields}})
    records.close()
    os._exit(EXIT_FAILED)


def end_with_threads(records: QueuedHandler) -> None:
    """End this process as soon as any of its threads fails."""

    def hook(caught: threading.ExceptHookArgs) -> None:
        end(caught.exc_value or caught.exc_type(), records)

    threading.excepthook = hook
