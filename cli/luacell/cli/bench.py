"""The verb bench: how fast a contract answers, under calls from as many threads as told.

Each thread calls, waits for its answer and calls again; a latency is what such a caller waits. Only calls that start
and end while all threads call are counted, and only answered ones have a latency; failures are counted by code.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from luacell.cli.console import EXIT_FAILED, UsageError, connected, print_json, reported
from luacell.cli.contracts import ArgsFile, ArgsHex, OutSize, Timeout, arguments_of
from luacell.cli.latencies import Latencies
from luacell.cli.options import Endpoint, Output, OutputFormat, contract_of, registered_names
from luacell.cli.tables import print_pairs
from luacell.protocol.errors import BridgeError, CallError, ContractNotFound, Unavailable
from luacell.protocol.identity import FN_ID_MAX

if TYPE_CHECKING:
    from luacell.client import LuaHostBridge

ECHO: Final = "host.echo@1"
ECHO_SIZE: Final = 64  # bytes, both ways
CONCURRENCY_MAX: Final = 256  # threads; more of them measure Python's lock
DURATION_MAX_S: Final = 3600.0
_NS_PER_US: Final = 1000
_PERCENTS: Final = (50, 90, 99)

ECHO_SOURCE: Final = """
local ffi = require("ffi")
return function(fn_id, args, out)
  ffi.copy(out, args, %d)
end
"""


def bench(
    contract: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME@V]",
            help="A registered contract; without it a service of its own with an echo of 64 bytes.",
            autocompletion=registered_names,
        ),
    ] = None,
    function: Annotated[int, typer.Argument(metavar="[FUNCTION]", min=0, max=FN_ID_MAX, help="Function id.")] = 0,
    args_hex: ArgsHex = None,
    args_file: ArgsFile = None,
    out_size: OutSize = 0,
    timeout: Timeout = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, max=CONCURRENCY_MAX, help="Threads that call.")
    ] = 1,
    duration: Annotated[
        float, typer.Option("--duration", min=0.1, max=DURATION_MAX_S, help="Seconds to measure for.")
    ] = 5.0,
    endpoint: Endpoint = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Measure calls per second and latencies of any contract."""
    with reported(contract or ""):
        args = arguments_of(args_hex, args_file)
        if contract is None:
            with _echo(args, out_size) as (bridge, args, out_size):
                measured = _measure(bridge, (ECHO, function, args, out_size, timeout), concurrency, duration)
        else:
            target = contract_of(contract)
            with connected(endpoint) as bridge:
                measured = _measure(bridge, (target, function, args, out_size, timeout), concurrency, duration)
        result = {"contract": contract or ECHO, "function": function, "args_bytes": len(args), "out_bytes": out_size}
        result |= {"concurrency": concurrency} | measured.as_dict()
        print_json(result) if output is Output.JSON else _show(result)
        if measured.errors:
            raise typer.Exit(EXIT_FAILED)


@contextmanager
def _echo(args: bytes, out_size: int) -> Iterator[tuple[LuaHostBridge, bytes, int]]:
    """Run a service of our own with a contract that copies its arguments."""
    from luacell.client import LuaFunction, LuaHostBridge

    args = args or os.urandom(out_size or ECHO_SIZE)
    out_size = out_size or len(args)
    if out_size > len(args):
        raise UsageError(f"--out-size {out_size} is over the {len(args)} bytes of arguments that are to come back")
    with LuaHostBridge() as bridge:
        bridge.register_host_contract(ECHO, LuaFunction(ECHO_SOURCE % out_size))
        if bridge.call(ECHO, 0, args, out_size) != args[:out_size]:
            raise AssertionError("the echo is not what was sent")
        yield bridge, args, out_size


class Measured:
    """What came of the calls of one thread, or of all."""

    def __init__(self) -> None:
        self.latencies = Latencies()
        self.errors: Counter[str] = Counter()
        self.seconds = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, times in microseconds."""
        count, seconds = self.latencies.count, self.seconds
        figures: dict[str, Any] = {"seconds": round(seconds, 3), "calls": count}
        figures["calls_per_second"] = round(count / seconds, 1) if seconds else 0.0
        for percent in _PERCENTS:
            value_ns = self.latencies.percentile(percent) if count else None
            figures[f"p{percent}_us"] = None if value_ns is None else value_ns / _NS_PER_US
        figures["max_us"] = self.latencies.max_ns / _NS_PER_US if count else None
        figures["errors"] = dict(self.errors)
        return figures


def _measure(bridge: LuaHostBridge, call: tuple[Any, ...], concurrency: int, duration_s: float) -> Measured:
    """Call from several threads at once, for as long as told."""
    contract, function, args, out_size, timeout = call
    is_over = threading.Event()
    start = threading.Barrier(concurrency + 1)
    broken: list[BaseException] = []

    def run(own: Measured) -> None:
        try:
            with _failures_counted(Counter()):  # brings up workers and memory; it is not measured
                bridge.call(contract, function, args, out_size, timeout=timeout)
            start.wait()
            while not is_over.is_set():
                with _failures_counted(own.errors):
                    began_ns = time.perf_counter_ns()
                    bridge.call(contract, function, args, out_size, timeout=timeout)
                    own.latencies.add(time.perf_counter_ns() - began_ns)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            broken.append(error)
            is_over.set()
            start.abort()

    each = [Measured() for _ in range(concurrency)]
    threads = [threading.Thread(target=run, args=(own,), name="luacell-bench") for own in each]
    for thread in threads:
        thread.start()
    try:
        start.wait()
        began_s = time.perf_counter()
        is_over.wait(duration_s)
    except threading.BrokenBarrierError:
        began_s = time.perf_counter()
    finally:
        is_over.set()
        start.abort()
        for thread in threads:
            thread.join()
    if broken:
        raise broken[0]
    whole = Measured()
    whole.seconds = time.perf_counter() - began_s
    for own in each:
        whole.latencies.merge(own.latencies)
        whole.errors.update(own.errors)
    return whole


@contextmanager
def _failures_counted(errors: Counter[str]) -> Iterator[None]:
    """Count calls that failed; what would fail every further call as well is raised."""
    try:
        yield
    except (Unavailable, ContractNotFound, BridgeError):
        raise
    except CallError as error:
        errors[error.code.name] += 1


def _show(result: dict[str, Any]) -> None:
    typer.echo(
        f"{result['contract']} fn {result['function']}: {result['args_bytes']} bytes in, {result['out_bytes']} out, "
        f"{result['concurrency']} at once, {result['seconds']:g} s"
    )
    rows = [("calls", str(result["calls"])), ("per second", f"{result['calls_per_second']:.0f}")]
    for name in (*(f"p{percent}" for percent in _PERCENTS), "max"):
        value = result[f"{name}_us"]
        rows.append((name, "-" if value is None else f"{value:.1f} us"))
    rows += [(f"errors: {code}", str(count)) for code, count in result["errors"].items()]
    print_pairs(rows)
