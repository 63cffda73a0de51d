"""Processes as the tests see them: found through /proc, held by pidfds, never signalled by number.

A number may be another process's by the time a signal arrives; a pidfd never is.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from luacell.client import LuaHostBridge
from tests.support.waiting import LIMIT_S, eventually, readable

# Fields of proc(5)'s /proc/PID/stat among those behind the name, which may hold anything.
_STATE, _PARENT, _START_TIME = 0, 1, 19


@dataclass(frozen=True, slots=True)
class Status:
    """One line of /proc/PID/stat."""

    pid: int
    parent: int
    state: str
    start: int


def status_of(pid: int) -> Status | None:
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            line = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = line[line.rindex(b")") + 2 :].split()
    return Status(pid, int(fields[_PARENT]), fields[_STATE].decode(), int(fields[_START_TIME]))


def all_statuses() -> list[Status]:
    """Look at every process once; on a machine with many of them that takes milliseconds."""
    found = (status_of(int(name)) for name in os.listdir("/proc") if name.isdecimal())
    return [status for status in found if status is not None]


def children_of(pid: int, statuses: Sequence[Status] | None = None) -> list[int]:
    """Return the children of a process, zombies included, oldest first; as they were seen before, or now."""
    children = [status for status in statuses or all_statuses() if status.parent == pid]
    return [status.pid for status in sorted(children, key=lambda status: (status.start, status.pid))]


def descendants_of(pid: int, statuses: Sequence[Status] | None = None) -> list[int]:
    """Return the children of a process and theirs; as they were seen before, or now."""
    statuses = statuses or all_statuses()
    found: list[int] = []
    for child in children_of(pid, statuses):
        found += [child, *descendants_of(child, statuses)]
    return found


class Process:
    """A process that this test may signal and wait for; not a child, so its exit code stays unknown."""

    def __init__(self, pid: int) -> None:
        before = status_of(pid)
        assert before is not None, f"process {pid} is gone"
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        after = status_of(pid)
        if after is None or after.start != before.start:
            os.close(self.pidfd)
            raise AssertionError(f"process {pid} is gone")

    def __repr__(self) -> str:
        return f"<Process {self.pid}>"

    @property
    def is_alive(self) -> bool:
        return not readable(self.pidfd, 0)

    def send(self, number: int) -> None:
        """Send a signal; a process that is gone gets none."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def ends_within(self, limit_s: float = LIMIT_S) -> bool:
        return readable(self.pidfd, limit_s)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Freeze it, and let it go on afterwards whatever happens."""
        self.send(signal.SIGSTOP)
        try:
            eventually(lambda: (status_of(self.pid) or _GONE).state in "TZ", f"{self} is stopped")
            yield
        finally:
            self.send(signal.SIGCONT)

    def close(self) -> None:
        os.close(self.pidfd)


_GONE = Status(0, 0, "Z", 0)


class Processes:
    """All processes of one service as they were found, held so that they can be waited for."""

    def __init__(self, parent: int, broker: int) -> None:
        self._stack = ExitStack()
        self._held: dict[int, Process] = {}
        try:
            self.parent = self._hold(parent)
            self.broker = self._hold(broker)
            (host,) = [pid for pid in children_of(parent) if pid != broker]
            self.worker_host = self._hold(host)
            self.look_again()
        except BaseException:
            self.close()  # one of them has just ended: nobody will get to close what is held
            raise

    @classmethod
    def of(cls, bridge: LuaHostBridge) -> Self:
        """Find the service behind a bridge."""
        broker = broker_pid(bridge)
        status = status_of(broker)
        assert status is not None
        return cls(status.parent, broker)

    def _hold(self, pid: int) -> Process:
        process = self._held[pid] = Process(pid)
        self._stack.callback(process.close)
        return process

    def look_again(self) -> list[Process]:
        """Hold what has been started since; return the workers that are alive."""
        workers = []
        for pid in children_of(self.worker_host.pid):
            with suppress(AssertionError, ProcessLookupError):
                workers.append(self._held.get(pid) or self._hold(pid))
        return [worker for worker in workers if worker.is_alive]

    @property
    def all(self) -> list[Process]:
        return list(self._held.values())

    def survivors(self, limit_s: float) -> list[Process]:
        """Wait for the end of all of them; return those that are still there."""
        give_up_s = time.monotonic() + limit_s
        return [each for each in self.all if not each.ends_within(max(0.0, give_up_s - time.monotonic()))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()


def broker_pid(bridge: LuaHostBridge) -> int:
    return int(bridge.health()["broker_pid"])


def services_of(bridge: LuaHostBridge) -> list[int]:
    """Return the pids of the broker and its worker host."""
    return children_of(_parent_of(broker_pid(bridge)))


def workers_of(bridge: LuaHostBridge, contract: str) -> list[int]:
    """Return the pids of the workers that serve a contract, as the broker knows them."""
    states = ("idle", "busy", "waiting")
    return [w["pid"] for w in bridge.health()["workers"] if w["contract"] == contract and w["state"] in states]


def worker_of(bridge: LuaHostBridge, contract: str) -> Process:
    """Return the one worker of a contract; the caller closes it."""

    def look() -> Process | None:
        pids = workers_of(bridge, contract)
        with suppress(AssertionError, ProcessLookupError):
            return Process(pids[0]) if len(pids) == 1 else None
        return None

    return eventually(look, f"{contract} has one worker")


def processes_with(run_directory: Path) -> list[int]:
    """Return every process of a run directory; workers keep the command line that they were forked with."""
    word = os.fsencode(run_directory)
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if word in Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0"):
                    found.append(int(name))
    return found


# -- what a process holds ---------------------------------------------------------------------------------
def descriptors_of(pid: int | str = "self") -> Counter[str]:
    """Count the descriptors of a process by what they are; numbers of pipes and sockets are left out."""
    held: Counter[str] = Counter()
    directory = Path(f"/proc/{pid}/fd")
    for name in _names_in(directory):
        with suppress(FileNotFoundError):
            target = os.readlink(directory / name)
            if not target.startswith(f"/proc/{os.getpid()}/"):
                held[re.sub(r":\[\d+\]$", "", target)] += 1
    return held


def _names_in(directory: Path) -> list[str]:
    """List what /proc tells; of a process that is not dumpable it tells root alone."""
    with suppress(PermissionError):
        return os.listdir(directory)
    return []


def mappings_of(pid: int | str = "self") -> int:
    """Count the shared-memory segments that a process has mapped."""
    with suppress(PermissionError):  # likewise
        return Path(f"/proc/{pid}/maps").read_bytes().count(b"/memfd:luacell")
    return 0


def thread_count(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def resident_kib(pid: int | str = "self") -> int:
    """Return the memory of a process that is its own, in KiB."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def zombies_of(pids: Iterable[int], statuses: Sequence[Status] | None = None) -> list[int]:
    """Return the zombies among the children of these; as they were seen before, or now."""
    parents = set(pids)
    return [status.pid for status in statuses or all_statuses() if status.parent in parents and status.state == "Z"]


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a host and its service hold; equal before and after whatever a test did."""

    host_descriptors: Counter[str]
    host_threads: int
    host_mappings: int
    host_children: int
    processes: int
    parent_descriptors: Counter[str]
    broker_descriptors: Counter[str]
    broker_mappings: int
    worker_host_descriptors: Counter[str]
    zombies: int
    files: tuple[str, ...]
    calls: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, bridge: LuaHostBridge) -> Self:
        health = bridge.health()
        calls = tuple((key, health[key]) for key in ("hosts", "contracts", "queued", "slots_in_flight", "memory_bytes"))
        broker = health["broker_pid"]
        statuses = all_statuses()
        parent = _parent_of(broker)
        worker_host = next(pid for pid in children_of(parent, statuses) if pid != broker)
        processes = [parent, *descendants_of(parent, statuses)]
        return cls(
            host_descriptors=descriptors_of(),
            host_threads=thread_count(),
            host_mappings=mappings_of(),
            host_children=len(children_of(os.getpid(), statuses)),
            processes=len(processes),
            parent_descriptors=descriptors_of(parent),
            broker_descriptors=descriptors_of(broker),
            broker_mappings=mappings_of(broker),
            worker_host_descriptors=descriptors_of(worker_host),
            zombies=len(zombies_of(processes, statuses)),
            files=tuple(sorted(os.listdir(run_directory(broker)))),
            calls=calls,
        )

    def beside(self, before: Self) -> Self:
        """Return these, for a comparison: of threads, fewer than before are no leak, one may have been about to end."""
        return replace(self, host_threads=max(self.host_threads, before.host_threads))


def _parent_of(pid: int) -> int:
    status = status_of(pid)
    assert status is not None
    return status.parent


def run_directory(broker: int) -> str:
    """Return the run directory of a broker, from its command line."""
    words = Path(f"/proc/{broker}/cmdline").read_bytes().split(b"\0")
    return os.fsdecode(words[words.index(b"--run-dir") + 1])


@contextmanager
def nothing_left(bridge: LuaHostBridge, clean: Callable[[], None], limit_s: float = LIMIT_S) -> Iterator[None]:
    """Sweep for leaks: once `clean` has run, the host and its service hold what they held before."""
    before = holdings_at_rest(bridge)
    try:
        yield
    finally:
        clean()
    give_up_s = time.monotonic() + limit_s
    while (after := _holdings(bridge)) is None or after.beside(before) != before:
        if time.monotonic() >= give_up_s:
            break
        time.sleep(0.01)
    assert after is not None
    assert after.beside(before) == before


def has_its_spares(bridge: LuaHostBridge) -> bool:
    """Tell whether a service has the spares of one level; one that was taken is replaced a moment later."""
    health = bridge.health()
    return bool(health["spares"] >= health["spares_wanted"])


def _holdings(bridge: LuaHostBridge) -> Holdings | None:
    """Look while processes come and go."""
    with suppress(FileNotFoundError, ProcessLookupError, AssertionError):
        return Holdings.of(bridge)
    return None


def holdings_at_rest(bridge: LuaHostBridge) -> Holdings:
    """Return what is held once two looks give the same, and all workers are spares, none of which is missing."""

    def look() -> Holdings | None:
        states = {worker["state"] for worker in bridge.health()["workers"]}
        first = _holdings(bridge)
        time.sleep(0.005)
        is_steady = has_its_spares(bridge) and states == {"blank"}
        return first if first is not None and first == _holdings(bridge) and is_steady else None

    return eventually(look, "the service is at rest")
