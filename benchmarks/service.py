"""A service to be measured, as `luacell serve` runs it, in a directory of its own; and the contracts."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luacell.client import LuaFunction, LuaHostBridge

START_LIMIT_S = 20.0
STOP_LIMIT_S = 40.0  # it drains for 25 s
MIB = 1 << 20

# Both take the number of bytes as their function id: a raw function is not told the sizes.
ECHO = "host.echo@1"
TAKE = "host.take@1"
SOURCES = {
    ECHO: 'local copy = require("ffi").copy return function(size, args, out) copy(out, args, size) end',
    # Reads all of its arguments by copying them to memory of its own, and answers with the first 64 bytes.
    TAKE: f"""
        local ffi = require("ffi")
        local own = ffi.new("uint8_t[?]", {MIB})
        return function(size, args, out) ffi.copy(own, args, size) ffi.copy(out, own, 64) end""",
}


@contextmanager
def service(*options: str) -> Iterator[Path]:
    """Run a service; gives its run directory, and ends it."""
    with tempfile.TemporaryDirectory(prefix="luacell-bench-") as parent:
        run_directory = Path(parent) / "run"
        ready, report = os.pipe()
        command = [
            *(sys.executable, "-P", "-m", "luacell.cli.serve", "--run-dir", str(run_directory), "--ephemeral"),
            *("--host", str(os.getpid()), "--log-level", "error", "--ready-fd", str(report), *options),
        ]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[report])
        os.close(report)
        try:
            if not select.select([ready], [], [], START_LIMIT_S)[0] or os.read(ready, 1) != b"1":
                raise RuntimeError(f"{' '.join(command)} was not ready within {START_LIMIT_S:g} s")
            yield run_directory
        finally:
            os.close(ready)
            process.terminate()
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def served(*options: str) -> Iterator[tuple[LuaHostBridge, Path]]:
    """Run a service; gives a bridge to it, with the contracts registered, and its run directory."""
    with service(*options) as run_directory, LuaHostBridge.connect(run_directory) as bridge:
        for contract, source in SOURCES.items():
            bridge.register_host_contract(contract, LuaFunction(source))
        yield bridge, run_directory
