"""Part P: processes and their supervision."""

from __future__ import annotations

from typing import Final

from tests.faults.rows.row import Row

ROWS: Final = (
    Row(
        "P00",
        "a host with 1 ms budgets floods a contract whose calls take 20 ms",
        "DEADLINE_EXCEEDED for it; the contract's worker lives, and others are served",
        "a worker is killed for its run limit, or at a deadline once it has run for 100 ms",
    ),
    Row("P01", "kill -9 of an idle worker, and of a spare", "nobody sees it", "pidfd; a spare takes over"),
    Row("P03", "kill -9 of a worker after the call began", "WORKER_CRASHED, signal 9, began yes", "pidfd; `begun`"),
    Row("P05", "death at each step of a worker's start", "nobody sees it", "back-off from 10 ms to 5 s"),
    Row(
        "P06",
        "a contract that never loads",
        "VmRegistrationFailed with file and line; nothing is registered",
        "it is loaded before it is registered",
    ),
    Row(
        "P07",
        "the worker host is killed, or stopped",
        "running calls end typed; it is back within 1 s",
        "the parent; the end of its channel; the broker kills one that is stopped",
    ),
    Row(
        "P08",
        "kill -9 of the broker",
        "UNAVAILABLE within 1 s; all workers gone within 100 ms; serving within 1 s, with its registry",
        "pidfds and the ends of channels; the parent starts another",
    ),
    Row(
        "P10",
        "an exception in each handler of the broker's loop, and in each of its threads",
        "UNAVAILABLE within 1 s, `began` as it was; a record names the handler and the message; another broker serves, "
        "with its registry",
        "the broker ends at once, with exit code 70; the parent",
    ),
    Row("P11", "kill -9 of the parent", "everything ends", "PDEATHSIG, pidfds"),
    Row(
        "P12",
        "every call of a contract crashes",
        "5 times WORKER_CRASHED, then QUARANTINED with when to try again; other contracts are served",
        "counted for each contract and host",
    ),
    Row("P13", "a crash storm over 100 contracts", "BUSY beyond the bound", "a token bucket of starts"),
    Row("P14", "recycling under load", "no call fails", "the successor is ready first"),
    Row(
        "P15",
        "SIGTERM with calls in flight, a second one, SIGINT",
        "finished up to the drain deadline, the rest CANCELLED",
        "the broker drains",
    ),
    Row("P17", "the number of a process is used again", "no signal to a stranger", "pidfds only"),
    Row("P18", "10,000 starts and stops of workers", "descriptors, memory, zombies, files flat", "books"),
    Row("P19", "the wall clock jumps", "nobody sees it", "all times are monotonic"),
    Row("P20", "PID 1 with orphans", "they are reaped", "the parent waits for any child"),
    Row("P22", "no processor for a while", "late, never lost; queued and run time told apart", "stamps"),
)
