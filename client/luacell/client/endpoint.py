"""Where a running broker is: from an argument, the environment, or the default places."""

from __future__ import annotations

import os
from pathlib import Path

from luacell.protocol.endpoints import TCP, parse_tcp
from luacell.protocol.paths import BROKER_SOCKET, DESCRIPTOR_SOCKET, ENDPOINT_VARIABLE, default_run_directory

_IPC = "ipc://"
_INLINE_IPC = "ipc+inline://"


def inline_address_of(endpoint: str | os.PathLike[str] | None) -> str | None:
    """Return where a host without shared memory connects, or None where the endpoint is a local host's.

    Args:
        endpoint: `tcp://HOST:PORT` on loopback, or `ipc+inline://` and a run directory; else as for
            `run_directory_of`.

    Returns:
        An address as libzmq takes it.

    Raises:
        ValueError: the endpoint is malformed.
    """
    given = _given(endpoint)
    if given.startswith(TCP):
        return str(parse_tcp(given))
    if not given.startswith(_INLINE_IPC):
        return None
    path = Path(given.removeprefix(_INLINE_IPC))
    if not path.is_absolute():
        raise ValueError(f"endpoint {given!r}: {str(path)!r} is no absolute path of a run directory")
    return f"{_IPC}{path if path.name == BROKER_SOCKET else path / BROKER_SOCKET}"


def run_directory_of(endpoint: str | os.PathLike[str] | None) -> Path:
    """Return the run directory that an endpoint names.

    Args:
        endpoint: a run directory, `ipc://` and a run directory, or `ipc://…/broker.sock`; None takes
            `$LUACELL_ENDPOINT`, else `$XDG_RUNTIME_DIR/luacell`, else `/run/luacell`.

    Raises:
        ValueError: the endpoint is of another kind.
    """
    given = _given(endpoint)
    if not given:
        return _default()
    if "://" in given and not given.startswith(_IPC):
        raise ValueError(
            f"endpoint {given!r} is neither a run directory nor ipc://…, ipc+inline://… or tcp://…; "
            "other transports are not available"
        )
    path = Path(given.removeprefix(_IPC))
    return path.parent if path.name in (BROKER_SOCKET, DESCRIPTOR_SOCKET) else path


def _given(endpoint: str | os.PathLike[str] | None) -> str:
    given = os.fspath(endpoint) if endpoint is not None else os.environ.get(ENDPOINT_VARIABLE, "")
    if not isinstance(given, str):
        raise TypeError(f"an endpoint is text or a path, not {type(given).__name__}")
    return given


def _default() -> Path:
    """Prefer the user's own service; fall back on the machine's where the user has none."""
    own = Path(default_run_directory(os.environ))
    machine = Path(default_run_directory({}))
    if not (own / DESCRIPTOR_SOCKET).exists() and (machine / DESCRIPTOR_SOCKET).exists():
        return machine
    return own
