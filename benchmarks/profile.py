"""Where the broker's time goes: its loop runs under cProfile while a host calls it one call at a time."""

from __future__ import annotations

import cProfile
import os
import pstats
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from luacell.broker.registry_store import RegistryStore
from luacell.broker.rundir import RunDirectory
from luacell.broker.server import Server
from luacell.client import LuaFunction, LuaHostBridge

CALLS = 5000
ROWS = 22


def profile_broker(source: str, contract: str) -> None:
    """Serve in this process under the profiler, call from a thread, print the costliest functions."""
    with tempfile.TemporaryDirectory() as parent:
        run_directory = RunDirectory(Path(parent) / "run")
        server = Server(run_directory, 1, RegistryStore(run_directory.path / "registry.db"))
        worker_host = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "luacell.worker",
                "--run-dir",
                str(run_directory.path),
                "--log-level",
                "critical",
            ]
        )
        profiler = cProfile.Profile()
        caller = threading.Thread(target=_call, args=(run_directory.path, source, contract, server))
        caller.start()
        with suppress(SystemExit):
            profiler.runcall(server.run)
        caller.join()
        server.close()
        worker_host.wait()
        run_directory.close(remove=True)
    print(f"\nbroker under cProfile, {CALLS} calls of 64 B (the profiler doubles the cost of Python code)")
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(ROWS)


def _call(path: Path, source: str, contract: str, server: Server) -> None:
    with LuaHostBridge.connect(path) as bridge:
        bridge.register_host_contract(contract, LuaFunction(source))
        payload = os.urandom(64)
        for _ in range(CALLS):
            bridge.call(contract, 0, payload, 64)
    server.stop()
