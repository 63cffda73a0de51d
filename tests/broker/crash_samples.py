"""Crashes that tests put on record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from luacell.broker.crash_files import CrashedCall
from luacell.broker.model import RecordCrash
from luacell.broker.registry import ContractRecord
from luacell.protocol.errors import AbiErrorCode
from tests.broker.bench import HOST, SEGFAULT, Bench, record_of


def crash_on(bench: Bench) -> RecordCrash:
    """Have a worker die of a call, and return what is to be put on record of it."""
    worker = bench.serve()
    call = bench.call()
    bench.begin(call)
    bench.die(worker, replace(SEGFAULT, last_words="bye\n"))
    return bench.only(RecordCrash)


def crashed_call(
    crash_id: str, args: bytes | None = b"args", record: ContractRecord | None = None, time: float = 1.5
) -> CrashedCall:
    """Make a crash as it is to be written."""
    bench = Bench()
    return CrashedCall(crash_id, time, crash_on(bench), record or record_of(), args)


def row_with(**values: Any) -> dict[str, Any]:
    """Return what a list shows of that crash, but for some values."""
    return {
        "id": "0123456789ab",
        "time": 1.5,
        "contract_id": b"\1" + bytes(7),
        "contract": "0x0000000000000001",
        "version": "",
        "fn_id": 7,
        "function": "",
        "code": int(AbiErrorCode.WORKER_CRASHED),
        "cause": "signal 11 (SIGSEGV)",
        "signal": 11,
        "exit_code": None,
        "began": "yes",
        "queued": 0.0,
        "ran": 0.0,
        "cpu": None,
        "args_size": 8,
        "args_kept": 4,
        "out_size": 8,
        "source_digest": "d" * 64,
        "host": HOST.hex(),
        "stderr": "bye\n",
    } | values
