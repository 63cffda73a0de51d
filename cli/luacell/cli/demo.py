"""Show what luacell is for: a contract that works through the standard library and keeps dying.

Four threads have the contract in `demo_contract/` count every `.py` file of the running Python; on
the way it is made to crash, to end its process and to loop, and its workers are killed from outside.
The books say what became of each call. This module uses luacell as any host does, through
`luacell.client`; it knows nothing of how calls travel.

    source_files ──> Caller (one per thread) ──call──> bridge
                        │   FaultPlan: is a fault due?
                        └─> Books ──> report
"""

import collections
import enum
import os
import queue
import re
import select
import signal
import struct
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from luacell.client import (
    Busy,
    CallError,
    DeadlineExceeded,
    LuaHostBridge,
    Quarantined,
    Unavailable,
    WorkerCrashed,
)

CONTRACT = "host.textstats@1"
CONTRACT_DIRECTORY = Path(__file__).parent / "demo_contract"
COUNT, DEREFERENCE_NULL, EXIT, LOOP = range(4)  # the contract's functions

CALLERS_COUNT = 4
FILE_SIZE_MAX = 4 << 20  # bytes; the largest of CPython's own are below 1 MiB
FILES_PER_FAULT = 40  # ~1,800 files: ~45 faults
FILES_PER_CHECK = 20
LOOP_TIMEOUT_S = 0.25
# A contract that crashes five times in 30 s is quarantined. The demo shows recovery, so it stays below;
# then it kills workers from outside instead, which is not held against the contract.
OWN_CRASHES_MAX = 4
OWN_CRASHES_WINDOW_S = 30.0
ATTEMPTS_MAX = 20  # per file; with the pauses of REFUSED_PAUSE_S ~10 s
REFUSED_PAUSE_S = 0.5
KILL_ATTEMPTS_MAX = 20
KILL_PAUSE_S = 0.01
KILL_WAIT_S = 1.0
LOST_AFTER_S = 10.0  # the contract's deadline is 2 s, an answer is promised 0.25 s behind it
LAST_CALLS_S = 2.5
SHOWN_EVERY_S = 0.02
PROBLEMS_SHOWN_MAX = 5


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the contract's `count` finds in one text; `Result` in `textstats.lua` is the same in C."""

    lines: int
    blank_lines: int
    words: int
    identifiers: int
    distinct_identifiers: int
    longest_line: int
    top_count: int
    top_name: bytes

    @classmethod
    def from_bytes(cls, out: bytes) -> "Statistics":
        """Read the `out` of a call.

        Args:
            out: RESULT.size bytes.

        Raises:
            struct.error: `out` has another size.
        """
        *numbers, name = RESULT.unpack(out)
        return cls(*[*numbers, name.rstrip(b"\0")])


RESULT = struct.Struct("<7Q64s")
TOP_NAME_MAX = 63  # bytes

TOKEN = re.compile(
    rb'''
      """ (?: [^"\\] | \\[\s\S] | "(?!"") )* (?:""")?
    | \'\'\' (?: [^'\\] | \\[\s\S] | '(?!\'\') )* (?:\'\'\')?
    | " (?: [^"\\\n] | \\[\s\S] )* "?
    | ' (?: [^'\\\n] | \\[\s\S] )* '?
    | \# [^\n]*
    | (?P<word> [0-9A-Za-z_\x80-\xff]+ ) (?P<prefix> (?=["']) )?
    ''',
    re.VERBOSE,
)
KEYWORDS = frozenset(
    b"False None True and as assert async await break class continue def del elif else except finally for "
    b"from global if import in is lambda nonlocal not or pass raise return try while with yield".split()
)


def count_in_python(source: bytes) -> Statistics:
    """Count as the contract does, by other means: the yardstick for its answers.

    Args:
        source: The text, any bytes.
    """
    lines = source.split(b"\n")
    if not lines[-1]:
        del lines[-1]
    names = collections.Counter(
        match["word"]
        for match in TOKEN.finditer(source)
        if match["word"] and match["prefix"] is None and not match["word"][:1].isdigit()
    )
    for keyword in KEYWORDS & names.keys():
        del names[keyword]
    top_name, top_count = min(names.items(), key=lambda item: (-item[1], item[0]), default=(b"", 0))
    return Statistics(
        lines=len(lines),
        blank_lines=sum(not line.strip() for line in lines),
        words=len(source.split()),
        identifiers=names.total(),
        distinct_identifiers=len(names),
        longest_line=max(map(len, lines), default=0),
        top_count=top_count,
        top_name=top_name[:TOP_NAME_MAX],
    )


def encode_args(source: bytes) -> bytes:
    """Return the args of `count`: a u32 length, then the text."""
    return struct.pack("<I", len(source)) + source


def source_files(root: Path, limit: int | None = None) -> list[Path]:
    """Return the `.py` files below `root` in order, but no installed packages, and none above FILE_SIZE_MAX.

    Args:
        root: The standard library's directory.
        limit: At most so many; None for all.
    """
    installed = {"site-packages", "dist-packages"}
    found = (path for path in root.rglob("*.py") if installed.isdisjoint(path.relative_to(root).parts))
    return sorted(path for path in found if path.is_file() and path.stat().st_size <= FILE_SIZE_MAX)[:limit]


class Bridge(Protocol):
    """What the callers need of a `LuaHostBridge`."""

    def call(
        self, contract: str, fn_id: int, args: bytes = b"", out_size: int = 0, *, timeout: float | None = None
    ) -> bytes:
        """Return what the contract wrote, or raise a CallError; `timeout` in seconds."""

    def health(self) -> Mapping[str, object]:
        """Return, among others, "workers": a list of dicts with "pid", "contract" and "state"."""


class Fault(enum.Enum):
    """A way in which a worker dies; the value is what the report calls it."""

    NULL = "null dereference"
    EXIT = "os.exit(0)"
    LOOP = "endless loop"
    KILL = "kill -9 from outside"


INJECTIONS: dict[Fault, tuple[int, float | None]] = {  # the function, and the timeout in seconds
    Fault.NULL: (DEREFERENCE_NULL, None),
    Fault.EXIT: (EXIT, None),
    Fault.LOOP: (LOOP, LOOP_TIMEOUT_S),
}


def has_blamed(fault: Fault, error: CallError) -> bool:
    """Is this the answer that the fault must have?"""
    match error:
        case WorkerCrashed() if fault is Fault.NULL:
            return error.signal == signal.SIGSEGV
        case WorkerCrashed() if fault is Fault.EXIT:
            return error.exit_code == 0
        case DeadlineExceeded():
            return fault is Fault.LOOP and error.began != "no"
    return False


def was_killed_from_outside(error: CallError) -> bool:
    """Is this the answer of a call whose worker somebody killed?"""
    return isinstance(error, WorkerCrashed) and error.signal == signal.SIGKILL


def is_refusal(error: CallError) -> bool:
    """Is this an answer that says "not now"?"""
    return isinstance(error, Busy | Quarantined | Unavailable | DeadlineExceeded)


def is_passing(error: CallError) -> bool:
    """Is this an answer after which the same call may well succeed?"""
    return was_killed_from_outside(error) or is_refusal(error)


class FaultPlan:
    """Decides which file comes with a fault, and with which; safe from any thread."""

    def __init__(self, files_count: int) -> None:
        # A short run sees each kind twice, too.
        self._files_per_fault = max(2, min(FILES_PER_FAULT, files_count // (2 * len(Fault))))
        self._lock = threading.Lock()
        self._own_crashes: collections.deque[float] = collections.deque(maxlen=OWN_CRASHES_MAX)

    def due(self, index: int, now: float) -> Fault | None:
        """Return the fault that goes before a file.

        Args:
            index: The file's, from 0.
            now: Seconds, monotonic.
        """
        turn, is_between = divmod(index + 1, self._files_per_fault)
        if is_between:
            return None
        fault = list(Fault)[(turn - 1) % len(Fault)]
        if fault in (Fault.NULL, Fault.EXIT) and not self._may_crash(now):
            return Fault.KILL
        return fault

    def _may_crash(self, now: float) -> bool:
        with self._lock:
            spent = len(self._own_crashes) == OWN_CRASHES_MAX
            if spent and now - self._own_crashes[0] < OWN_CRASHES_WINDOW_S:
                return False
            self._own_crashes.append(now)
            return True


def worker_pids(bridge: Bridge) -> list[int]:
    """Return the process ids of the demo's own workers, those at work first."""
    workers = bridge.health().get("workers")
    if not isinstance(workers, list):
        return []
    own = [worker for worker in workers if worker.get("contract") == CONTRACT]
    own.sort(key=lambda worker: worker.get("state") != "busy")
    return [pid for worker in own if isinstance(pid := worker.get("pid"), int)]


def kill_worker(bridge: Bridge) -> bool:
    """Kill one of the demo's own workers with SIGKILL, as an operator or the kernel might.

    Returns:
        Whether one has died of it.
    """
    for _ in range(KILL_ATTEMPTS_MAX):
        if any(kill_listed(bridge, pid) for pid in worker_pids(bridge)):
            return True
        time.sleep(KILL_PAUSE_S)  # a fresh worker may be on its way
    return False


def kill_listed(bridge: Bridge, pid: int) -> bool:
    """Kill a worker unless it is dead already or another process has its number by now."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # Listed still, now that the descriptor holds the process: so it is no stranger with a reused number.
        if has_ended(descriptor, within_s=0) or pid not in worker_pids(bridge):
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return has_ended(descriptor, within_s=KILL_WAIT_S)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)


def has_ended(descriptor: int, *, within_s: float) -> bool:
    """Has the process of a pidfd ended, or does it within that time?"""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(within_s * 1000))


@dataclass
class Books:
    """What became of each call. Methods are safe from any thread; fields are final when the callers end."""

    calls_issued: int = 0
    calls_answered: int = 0
    calls_again: int = 0
    files_count: int = 0
    size: int = 0  # bytes of all counted files
    lines: int = 0
    blank_lines: int = 0
    words: int = 0
    identifiers: int = 0
    longest_line: tuple[int, str] = (0, "")
    top_names: collections.Counter[bytes] = field(default_factory=collections.Counter)
    top_name_files: collections.Counter[bytes] = field(default_factory=collections.Counter)
    survived: collections.Counter[Fault] = field(default_factory=collections.Counter)
    slowest_recovery_s: float = 0.0
    to_check: list[tuple[Path, bytes, Statistics]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _waiting: dict[int, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def calls_lost(self) -> int:
        """Calls that have had no answer."""
        return self.calls_issued - self.calls_answered

    @property
    def crashes_survived(self) -> int:
        """Deaths of workers that the demo brought about."""
        return self.survived.total()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Book a call: answered when the block ends, lost if it ends by an exception or not at all."""
        caller = threading.get_ident()
        with self._lock:
            self.calls_issued += 1
            self._waiting[caller] = time.monotonic()
        answered_count = 0
        try:
            yield
            answered_count = 1
        finally:
            with self._lock:
                self.calls_answered += answered_count
                del self._waiting[caller]

    def longest_wait_s(self, now: float) -> float:
        """Return how long the oldest unanswered call has waited, in seconds."""
        with self._lock:
            return now - min(self._waiting.values(), default=now)

    def recovered(self, seconds: float) -> None:
        """Book the time from a failed answer to the next good one."""
        with self._lock:
            self.slowest_recovery_s = max(self.slowest_recovery_s, seconds)

    def died(self, fault: Fault) -> None:
        """Book the death of a worker."""
        with self._lock:
            self.survived[fault] += 1

    def called_again(self) -> None:
        """Book that a file is called for again: somebody killed its worker, or it was refused."""
        with self._lock:
            self.calls_again += 1

    def went_wrong(self, problem: str) -> None:
        """Book an answer that should not have been."""
        with self._lock:
            self.problems.append(problem)

    def counted(self, path: Path, source: bytes, answer: Statistics, *, check: bool) -> None:
        """Book a file's statistics; with `check` they are verified in the end."""
        with self._lock:
            self.files_count += 1
            self.size += len(source)
            self.lines += answer.lines
            self.blank_lines += answer.blank_lines
            self.words += answer.words
            self.identifiers += answer.identifiers
            self.longest_line = max(self.longest_line, (answer.longest_line, path.name))
            if answer.top_name:
                self.top_names[answer.top_name] += answer.top_count
                self.top_name_files[answer.top_name] += 1
            if check:
                self.to_check.append((path, source, answer))

    def check_answers(self) -> None:
        """Count the samples again in Python and book each difference."""
        for path, source, answer in self.to_check:
            if answer != (expected := count_in_python(source)):
                self.went_wrong(f"{path}: the contract answered {answer}, Python counts {expected}")


class Caller:
    """One thread of the host: takes file after file, has it counted, and causes the faults that are due."""

    def __init__(
        self,
        bridge: Bridge,
        files: "queue.SimpleQueue[tuple[int, Path]]",
        plan: FaultPlan,
        books: Books,
        stop: threading.Event,
    ) -> None:
        self._bridge = bridge
        self._files = files
        self._plan = plan
        self._books = books
        self._stop = stop
        self._failed_at: float | None = None

    def run(self) -> None:
        """Work until no file is left; what should not happen ends this caller and stands in the books."""
        try:
            while not self._stop.is_set():
                index, path = self._files.get_nowait()
                source = path.read_bytes()
                if fault := self._plan.due(index, time.monotonic()):
                    self._cause(fault)
                self._count(index, path, source)
        except queue.Empty:
            return
        except Exception as error:
            self._books.went_wrong(f"a caller ended: {error!r}")

    def _cause(self, fault: Fault) -> None:
        if fault is Fault.KILL:
            if kill_worker(self._bridge):
                self._books.died(fault)
            return
        fn_id, timeout = INJECTIONS[fault]
        answer = self._insist(was_killed_from_outside, fn_id, timeout=timeout)
        if isinstance(answer, bytes):
            self._books.went_wrong(f"{fault.value}: answered as if nothing had happened")
        elif has_blamed(fault, answer):
            self._books.died(fault)
        elif not is_passing(answer):
            self._books.went_wrong(f"{fault.value}: answered {answer!r}")

    def _count(self, index: int, path: Path, source: bytes) -> None:
        answer = self._insist(is_passing, COUNT, encode_args(source), RESULT.size)
        now = time.monotonic()
        if isinstance(answer, CallError):
            self._books.went_wrong(f"{path}: answered {answer!r}")
            return
        check = index % FILES_PER_CHECK == 0
        if self._failed_at is not None:
            self._books.recovered(now - self._failed_at)
            self._failed_at = None
            check = True  # when something has just died a wrong answer is most likely
        self._books.counted(path, source, Statistics.from_bytes(answer), check=check)

    def _insist(
        self,
        again: Callable[[CallError], bool],
        fn_id: int,
        args: bytes = b"",
        out_size: int = 0,
        timeout: float | None = None,
    ) -> bytes | CallError:
        for _ in range(ATTEMPTS_MAX):
            answer = self._call(fn_id, args, out_size, timeout)
            if isinstance(answer, bytes) or not again(answer):
                break
            self._books.called_again()
            if is_refusal(answer):
                self._stop.wait(REFUSED_PAUSE_S)
        return answer

    def _call(self, fn_id: int, args: bytes, out_size: int, timeout: float | None) -> bytes | CallError:
        with self._books.call():
            try:
                return self._bridge.call(CONTRACT, fn_id, args, out_size, timeout=timeout)
            except CallError as error:
                self._failed_at = self._failed_at or time.monotonic()
                return error


def run_demo(console: Console | None = None, *, limit: int | None = None) -> int:
    """Run the demo and print what it has shown.

    Args:
        console: Where to; None for the standard output.
        limit: Count at most so many files; None for all.

    Returns:
        The exit code: 0, or 1 if an answer was lost or wrong.

    Raises:
        LuacellError: luacell could not be started, or the contract not be deployed.
    """
    console = console or Console()
    root = Path(sysconfig.get_path("stdlib"))
    files = source_files(root, limit)
    console.print(
        f"[bold]{CONTRACT}[/], a contract written in Lua, counts the lines, words and identifiers of "
        f"{len(files):,} files in {root}.\nOn the way it is made to crash, and its workers are killed.",
        highlight=False,
    )
    if not files:
        console.print("There is nothing to count.", style="red")
        return 1
    with LuaHostBridge.with_capacity(CALLERS_COUNT) as bridge:
        bridge.deploy(CONTRACT_DIRECTORY)
        books, elapsed_s = count_files(bridge, files, console)
    books.check_answers()
    report(books, elapsed_s, console)
    return 1 if books.calls_lost or books.problems else 0


def count_files(bridge: Bridge, files: list[Path], console: Console) -> tuple[Books, float]:
    """Have all files counted by CALLERS_COUNT threads.

    Args:
        bridge: With the contract deployed.
        files: In the order of their counting.
        console: For the progress bar.

    Returns:
        The books, and the seconds it took.
    """
    books, plan, stop = Books(), FaultPlan(len(files)), threading.Event()
    todo: queue.SimpleQueue[tuple[int, Path]] = queue.SimpleQueue()
    for entry in enumerate(files):
        todo.put(entry)
    # Daemons, so that a call which is never answered cannot keep the demo from reporting it.
    threads = [
        threading.Thread(target=Caller(bridge, todo, plan, books, stop).run, daemon=True)
        for _ in range(CALLERS_COUNT)
    ]
    started = time.monotonic()
    try:
        with progress_bar(console) as progress:
            bar = progress.add_task("counting", total=len(files), crashes=0)
            for thread in threads:
                thread.start()
            is_working = True
            while is_working and books.longest_wait_s(time.monotonic()) < LOST_AFTER_S:
                time.sleep(SHOWN_EVERY_S)
                is_working = any(thread.is_alive() for thread in threads)
                progress.update(bar, completed=books.files_count, crashes=books.crashes_survived)
    finally:
        stop.set()
    elapsed_s = time.monotonic() - started
    for thread in threads:  # where one hangs, the others' calls are not lost, only under way
        thread.join(LAST_CALLS_S)
    return books, elapsed_s


def progress_bar(console: Console) -> Progress:
    """Return the bar: files done, crashes survived, time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[red]{task.fields[crashes]} crashes survived"),
        TimeElapsedColumn(),
        console=console,
    )


def report(books: Books, elapsed_s: float, console: Console) -> None:
    """Print the tables and what they mean."""
    console.print("", what_happened(books, elapsed_s), "", what_was_counted(books), "", sep="\n")
    for problem in books.problems[:PROBLEMS_SHOWN_MAX]:
        console.print(f"wrong: {problem}", style="red", markup=False)
    if books.calls_lost or books.problems:
        console.print("[bold red]A promise is broken:[/] each call gets one answer, and the right one.")
        return
    console.print(
        f"The contract's process died {books.crashes_survived} times. A program that runs its Lua in its own "
        "process would have died with it the first time, or hung.\n"
        "With luacell it is a worker, a process apart, that dies: the call that it was running was "
        "answered with the cause, a fresh worker took over, and all other calls went on.\n"
        f"The contract is in {CONTRACT_DIRECTORY}: change it, break it, and run this again.",
        highlight=False,
    )


def what_happened(books: Books, elapsed_s: float) -> Table:
    """Return the table of files, calls and crashes."""
    faults = ", ".join(f"{count} x {fault.value}" for fault in Fault if (count := books.survived[fault]))
    again = (
        f"{books.calls_again:,} of them made again, after a kill or a refusal" if books.calls_again else ""
    )
    checked = f"{len(books.to_check):,} were counted again in Python"
    recovery = f"{books.slowest_recovery_s * 1000:,.1f} ms"
    return table_of(
        "What happened",
        ("files", f"{books.files_count:,}", ""),
        ("bytes", f"{books.size:,}", ""),
        ("calls", f"{books.calls_issued:,}", again),
        ("crashes survived", f"{books.crashes_survived:,}", faults),
        ("answers lost", f"{books.calls_lost:,}", "calls made less answers received"),
        ("answers wrong", f"{len(books.problems):,}", checked),
        ("calls/s", f"{books.calls_answered / elapsed_s:,.0f}", "crashes and endless loops included"),
        ("slowest recovery", recovery, "from a failed answer to the next good one"),
    )


def what_was_counted(books: Books) -> Table:
    """Return the table of statistics."""
    longest_line, longest_in = books.longest_line
    (name, name_count), *_ = [*books.top_names.most_common(1), (b"", 0)]
    name_use = f"{name_count:,} times in the {books.top_name_files[name]:,} files that have it most"
    return table_of(
        "What the contract counted",
        ("lines", f"{books.lines:,}", f"{books.blank_lines:,} of them blank"),
        ("words", f"{books.words:,}", ""),
        ("identifiers", f"{books.identifiers:,}", "without keywords, strings and comments"),
        ("longest line", f"{longest_line:,}", f"bytes, in {longest_in}"),
        ("top identifier", name.decode(errors="replace"), name_use),
    )


def table_of(title: str, *rows: tuple[str, str, str]) -> Table:
    """Return a table of a figure per row: its name, its value, what there is to know about it."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table
