"""Names of the files in run and state directories, and the default directories; it opens nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Final

BROKER_SOCKET: Final = "broker.sock"
BROKER_SOCKET_ASIDE: Final = "broker.sock.aside"  # while descriptors are too short for connections
DESCRIPTOR_SOCKET: Final = "fd.sock"
LOCK_FILE: Final = "broker.lock"
STATE_DIRECTORY: Final = "state"  # in a run directory that was chosen without a state directory
REGISTRY_FILE: Final = "registry.db"
STATE_LOCK_FILE: Final = "registry.lock"
STATE_FILES: Final = (REGISTRY_FILE, f"{REGISTRY_FILE}-wal", f"{REGISTRY_FILE}-shm", STATE_LOCK_FILE)
CRASHES_DIRECTORY: Final = "crashes"  # in a state directory; what it holds:
CRASH_SUFFIX: Final = ".crash"  # calls, by id
CRASH_SOURCES_SUFFIX: Final = ".sources"  # what they ran on, by digest
CRASH_PARTIAL: Final = ".partial"  # the file that is being written
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


def default_state_directory(environment: Mapping[str, str], home: str, *, is_root: bool) -> PurePath:
    """Return the state directory of a service in the default run directory.

    Args:
        environment: of the process.
        home: the user's home directory.
        is_root: whether the user is root.

    Returns:
        `$XDG_STATE_HOME/luacell`; where that variable is unset `/var/lib/luacell` for root, and
        `~/.local/state/luacell` for anybody else.
    """
    state = environment.get("XDG_STATE_HOME", "")
    if state:
        return PurePath(state) / "luacell"
    return PurePath("/var/lib/luacell") if is_root else PurePath(home) / ".local/state/luacell"
