"""Where a running broker is: from an argument, the environment, or the default places."""

from __future__ import annotations

import os
from pathlib import Path

from luacell.protocol.paths import BROKER_SOCKET, DESCRIPTOR_SOCKET, ENDPOINT_VARIABLE, default_run_directory

_IPC = "ipc://"


def run_directory_of(endpoint: str | os.PathLike[str] | None) -> Path:
    """Return the run directory that an endpoint names.

    Args:
        endpoint: a run directory, `ipc://` and a run directory, or `ipc://…/broker.sock`; None takes
            `$LUACELL_ENDPOINT`, else `$XDG_RUNTIME_DIR/luacell`, else `/run/luacell`.

    Raises:
        ValueError: the endpoint is of another kind.
    """
    given = os.fspath(endpoint) if endpoint is not None else os.environ.get(ENDPOINT_VARIABLE, "")
    if not given:
        return _default()
    if "://" in given and not given.startswith(_IPC):
        raise ValueError(
            f"endpoint {given!r} is neither a run directory nor ipc://…; other transports are not available"
        )
    path = Path(given.removeprefix(_IPC))
    return path.parent if path.name in (BROKER_SOCKET, DESCRIPTOR_SOCKET) else path


def _default() -> Path:
    """Prefer the user's own service; fall back on the machine's where the user has none."""
    own = Path(default_run_directory(os.environ))
    machine = Path(default_run_directory({}))
    if not (own / DESCRIPTOR_SOCKET).exists() and (machine / DESCRIPTOR_SOCKET).exists():
        return machine
    return own
