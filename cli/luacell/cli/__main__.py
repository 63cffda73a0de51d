"""Where the `luacell` command begins and ends: whatever happens, no traceback for Ctrl-C or a reader that left."""

from __future__ import annotations

import os
import sys
from typing import Final, NoReturn

EXIT_INTERRUPTED: Final = 130  # as shells say it: 128 and the signal's number
EXIT_NO_READER: Final = 141
_CHAIN_LIMIT: Final = 16  # exceptions that one may stand for


def main() -> NoReturn:
    """Run the command that the arguments name, and end this process."""
    try:
        from luacell.cli.main import app  # Ctrl-C may come while this is loaded

        app(prog_name="luacell")
        code: object = 0
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        if not _is_interruption(error):
            raise
        code = EXIT_INTERRUPTED
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        abandon_stdout()
        code = EXIT_NO_READER
    except OSError as error:
        abandon_stdout()
        print(f"luacell: cannot write the output: {error.strerror}", file=sys.stderr)
        code = code or 1
    sys.exit(code if isinstance(code, int) or code is None else 1)


def _is_interruption(error: BaseException) -> bool:
    """Whether Ctrl-C is behind an exception: Python 3.11 turns one that strikes in `__set_name__` into RuntimeError."""
    cause: BaseException | None = error
    for _ in range(_CHAIN_LIMIT):
        if cause is None or isinstance(cause, KeyboardInterrupt):
            break
        cause = cause.__cause__
    return isinstance(cause, KeyboardInterrupt)


def abandon_stdout() -> None:
    """Let what is still buffered go nowhere, so that the interpreter does not try to write it at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


if __name__ == "__main__":
    main()
