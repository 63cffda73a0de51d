"""A crash made again: its call, in a fresh worker of a service of its own, and how that compares with the record.

The service has the floor and the C modules of the one that recorded the crash.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luacell.cli.reproduction import Reproduction
from luacell.protocol.errors import AbiErrorCode, CallError

if TYPE_CHECKING:
    from luacell.client import CrashInfo, LuaHostBridge


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the call ended this time.

    Attributes:
        out: what it wrote; b"" where it failed.
        error: why it failed, or None.
    """

    out: bytes
    error: CallError | None

    def is_as_recorded(self, info: CrashInfo) -> bool:
        """Whether it ended as it had: by the same code, and for a crash the same signal or exit code."""
        error = self.error
        if error is None or error.code != info.code:
            return False
        ends = (error.signal, error.exit_code), (info.signal, info.exit_code)
        return info.code != AbiErrorCode.WORKER_CRASHED or ends[0] == ends[1]

    def as_dict(self) -> dict[str, Any]:
        """Return it for programs."""
        error = self.error
        if error is None:
            return {"ok": True, "out": self.out.hex()}
        return {
            "ok": False,
            "code": int(error.code),
            "message": error.message,
            "signal": error.signal,
            "exit_code": error.exit_code,
            "began": error.began,
        }


def replay(reproduction: Reproduction, source: bytes | None) -> Outcome:
    """Make a call again, in an embedded service that is gone afterwards.

    Args:
        reproduction: the call and its contract.
        source: to try in place of the recorded one, or None.

    Raises:
        LuacellError: the contract does not load, or the service does not start.
    """
    from luacell.client import LuaHostBridge
    from luacell.client.embedded import EmbeddedService

    service = EmbeddedService(spares=1, options=reproduction.service_options)
    try:
        with LuaHostBridge.connect(service.run_directory) as bridge:
            return _call(bridge, reproduction, reproduction.source if source is None else source)
    finally:
        service.stop()


def _call(bridge: LuaHostBridge, made: Reproduction, source: bytes) -> Outcome:
    from luacell.client import LuaFunction

    if made.files:
        with tempfile.TemporaryDirectory(prefix="luacell-replay-") as directory:
            made.write(Path(directory), source)
            bridge.deploy(directory)
    else:
        bridge.register_host_contract(made.contract, LuaFunction(source, chunk_name=made.chunk_name))
    try:
        out = bridge.call(made.contract, made.fn_id, made.args, made.out_size, timeout=made.timeout)
    except CallError as error:
        return Outcome(b"", error)
    return Outcome(out, None)
