"""Names of the files in a run directory, and the default directory; it opens nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Final

BROKER_SOCKET: Final = "broker.sock"
DESCRIPTOR_SOCKET: Final = "fd.sock"
LOCK_FILE: Final = "broker.lock"
EMBEDDED_PREFIX: Final = "luacell-"
ENDPOINT_VARIABLE: Final = "LUACELL_ENDPOINT"


def default_run_directory(environment: Mapping[str, str]) -> PurePath:
    """Return the run directory of a machine-wide or user-wide service.

    Args:
        environment: of the process.

    Returns:
        `$XDG_RUNTIME_DIR/luacell`, or `/run/luacell` where that variable is unset.
    """
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    return PurePath(runtime) / "luacell" if runtime else PurePath("/run/luacell")
