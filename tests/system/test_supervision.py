"""The parent, the broker and the worker host: who is started again, who ends whom, and what is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from luacell.client import (
    CallError,
    DeadlineExceeded,
    LuacellError,
    LuaFunction,
    LuaHostBridge,
    Unavailable,
    WorkerCrashed,
)
from tests.support.children import child_process
from tests.support.contracts import DOUBLE, GATED, HEALTHY, PROBE, Stopwatch, answers, deploy, failure, function
from tests.support.pending import has_begun
from tests.support.processes import Process, Processes, children_of, status_of, zombies_of
from tests.support.scheduling import Scheduling
from tests.support.serving import PYTHON, Serving
from tests.support.waiting import LIMIT_S, eventually, settles

ROOT = Path(__file__).parents[2]
ENDLESS = function("while true do end")
BACK_WITHIN_S = 2.0  # twice the promise, which `make test-soak` asserts: tests run beside other work
STARTS = 3  # or as long as this many starts, where the machine is slow: a recovery is a start, a fork and a load
GONE_WITHIN_S = 2.0


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("s") / "run"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def serving(directory: Path) -> Iterator[Serving]:
    with Serving(directory, log_level="info") as serving:
        yield serving


def serve_healthy(directory: Path) -> bool:
    """Tell whether a host that comes now can register a contract and call it."""
    with suppress(LuacellError), LuaHostBridge.connect(directory) as bridge:
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE), replace=True)
        return answers(bridge, HEALTHY)
    return False


def is_back_in_time(serving: Serving, back: Callable[[], bool], what: str) -> bool:
    """Wait until the service is back; tell whether it was in time, for this machine."""
    with Scheduling() as delays, Stopwatch() as stopwatch:
        eventually(back, f"the service is back after {what}")
    within_s = max(BACK_WITHIN_S, STARTS * serving.start_s) + delays.slack_s
    print(f"service back {stopwatch.seconds:.3f} s after {what}, of {within_s:.3f} s")
    return stopwatch.seconds < within_s


# -- kill -9 ----
def test_p08_killed_broker_is_back_within_a_second_and_its_workers_are_gone(serving: Serving) -> None:
    directory = serving.run_directory
    with LuaHostBridge.connect(serving.run_directory) as bridge, ThreadPoolExecutor(4) as pool:
        deploy(bridge, ENDLESS, deadline="30s")
        calls = [pool.submit(failure, bridge, PROBE) for _ in range(4)]
        eventually(lambda: has_begun(bridge), "a call has begun")
        with serving.processes() as before:
            workers = before.look_again()
            assert workers
            with Scheduling() as delays, Stopwatch() as stopwatch:
                before.broker.kill()
                assert all(worker.ends_within() for worker in workers)
            print(f"workers gone {stopwatch.seconds:.3f} s after the death of the broker")
            assert stopwatch.seconds < BACK_WITHIN_S + delays.slack_s
            assert is_back_in_time(serving, lambda: serve_healthy(directory), "the death of the broker")
            assert all(isinstance(call.result(LIMIT_S), Unavailable | WorkerCrashed) for call in calls)
            assert before.worker_host.ends_within()
            assert before.parent.is_alive
    with serving.processes() as after:
        assert after.parent.pid == before.parent.pid
        assert after.broker.pid != before.broker.pid
    (told,) = serving.records("the broker ended with signal 9 (SIGKILL); starting it again")
    assert told["ended"] == "1 time within 60 s"


def test_p07_killed_worker_host_is_back_within_a_second_and_the_broker_knows_its_contracts(serving: Serving) -> None:
    with LuaHostBridge.connect(serving.run_directory) as bridge, ThreadPoolExecutor(2) as pool:
        deploy(bridge, ENDLESS, deadline="30s")
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        running = pool.submit(failure, bridge, PROBE)
        eventually(lambda: has_begun(bridge), "a call has begun")
        with serving.processes() as before:
            before.worker_host.kill()
            # What the old one had started may answer until it is dead as well.
            assert is_back_in_time(
                serving,
                lambda: len(serving.records("worker host joined")) == 2 and healthy_again(bridge),
                "the death of the worker host",
            )
            crashed = running.result(LIMIT_S)
            assert isinstance(crashed, WorkerCrashed)
            assert crashed.began == "yes"
            assert before.broker.is_alive
            with serving.processes() as after:
                assert after.worker_host.pid != before.worker_host.pid
    serving.record("worker host left", level="error")


def test_p07_stopped_worker_host_is_replaced_as_soon_as_it_is_needed(serving: Serving) -> None:
    with LuaHostBridge.connect(serving.run_directory) as bridge:
        deploy(bridge, ENDLESS, deadline="300ms")
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        assert answers(bridge, HEALTHY)
        with serving.processes() as before:
            before.worker_host.send(signal.SIGSTOP)
            assert answers(bridge, HEALTHY), "what is started serves on"
            exceeded = failure(bridge, PROBE)
            assert isinstance(exceeded, DeadlineExceeded), "its worker has to be killed, and nobody does it"
            with Stopwatch() as stopwatch:
                eventually(lambda: len(serving.records("worker host joined")) == 2, "there is another worker host")
                eventually(lambda: healthy_again(bridge), "the same bridge is served")
            print(f"service back {stopwatch.seconds:.3f} s after the worker host was needed")
            assert not before.worker_host.is_alive
            assert before.broker.is_alive
    serving.record("worker host is stopped and will be killed", level="error")


def healthy_again(bridge: LuaHostBridge) -> bool:
    with suppress(CallError):
        return answers(bridge, HEALTHY)
    return False


def test_p11_killed_parent_takes_everything_with_it_and_the_next_one_serves(directory: Path) -> None:
    with Serving(directory) as first, LuaHostBridge.connect(directory) as bridge, ThreadPoolExecutor(1) as pool:
        deploy(bridge, ENDLESS, deadline="30s")
        running = pool.submit(failure, bridge, PROBE)
        eventually(lambda: has_begun(bridge), "a call has begun")
        with first.processes() as processes:
            processes.parent.kill()
            with Serving(directory):  # at once: the old broker may have to give its lock back yet
                assert serve_healthy(directory)
                assert processes.survivors(GONE_WITHIN_S) == []
        assert isinstance(running.result(LIMIT_S), Unavailable | WorkerCrashed)


@pytest.mark.timeout(180)
def test_all_of_them_are_killed_in_turn_under_calls(directory: Path) -> None:
    victims: list[Callable[[Processes], Process]] = [lambda each: each.broker, lambda each: each.worker_host]
    with Serving(directory, "--max-restarts", "100") as serving:
        for round_ in range(4):
            with LuaHostBridge.connect(directory) as bridge, ThreadPoolExecutor(4) as pool:
                bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE), replace=True)
                calls = [pool.submit(outcome, bridge) for _ in range(200)]
                with serving.processes() as processes:
                    victims[round_ % 2](processes).kill()
                assert all(call.result(LIMIT_S) in ("value", "error") for call in calls), "one answer per call"
            assert is_back_in_time(serving, lambda: serve_healthy(directory), "the death of the victim")


def outcome(bridge: LuaHostBridge) -> str:
    try:
        return "value" if answers(bridge, HEALTHY) else "wrong"
    except CallError:
        return "error"


# -- giving up ----
@pytest.mark.parametrize("child", ["broker", "worker host"])
def test_a_child_that_ends_again_and_again_is_given_up_by_name(serving: Serving, child: str) -> None:
    killed: set[int] = set()
    for _ in range(6):
        process = eventually(lambda: other_than(serving, child, killed), f"there is another {child}")
        killed.add(process.pid)
        with closing(process):
            process.kill()
            assert process.ends_within()
    assert serving.process.wait(LIMIT_S) == 1
    (told,) = serving.records(
        f"the {child} ended 6 times within 60 s, the last time with signal 9 (SIGKILL); giving up"
    )
    assert told["level"] == "error"
    assert children_of(serving.process.pid) == []


def other_than(serving: Serving, child: str, known: set[int]) -> Process | None:
    """Return the broker or the worker host, if it is one that was not killed yet."""
    module = b"luacell.broker" if child == "broker" else b"luacell.worker"
    with suppress(AssertionError, ProcessLookupError, FileNotFoundError):
        for pid in children_of(serving.process.pid):
            if pid not in known and module in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return Process(pid)
    return None


def test_a_directory_that_is_taken_is_not_tried_again(serving: Serving) -> None:
    with Stopwatch() as stopwatch:
        second = subprocess.run(
            [*PYTHON, "-m", "luacell.cli.serve", "--run-dir", str(serving.run_directory)],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    assert second.returncode == 78
    assert f"another broker serves {serving.run_directory}" in second.stderr
    assert second.stderr.count("another broker serves") == 1
    assert stopwatch.seconds < LIMIT_S / 4
    assert serve_healthy(serving.run_directory)


# -- orderly ends ----
def test_an_orderly_end_is_no_error_to_anybody(directory: Path) -> None:
    with Serving(directory, log_level="info") as serving:
        assert serve_healthy(directory)
        with serving.processes() as processes:
            serving.process.terminate()
            assert serving.process.wait(LIMIT_S) == 0
            assert processes.survivors(0.0) == [], "the parent is the last to go"
        assert serving.records("broker stopping")
        assert serving.records("broker has ended", level="info", logger="luacell.worker-host")
        assert [record for record in serving.records() if record["level"] in ("error", "critical")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["SIGINT", "SIGHUP"])
def test_ctrl_c_reaches_the_parent_alone(serving: Serving, number: int) -> None:
    """A terminal signals the foreground group; the others are not in it."""
    with serving.processes() as processes:
        group = os.getpgid(processes.parent.pid)
        for process in (processes.broker, processes.worker_host, *processes.look_again()):
            assert os.getpgid(process.pid) != group
            assert os.getsid(process.pid) != os.getsid(processes.parent.pid)
        os.killpg(group, number)
        assert serving.process.wait(LIMIT_S) == 0
        assert processes.survivors(0.0) == []


class MadeUp:
    """The real parent with children that are made up and tell what they hear."""

    def __init__(self, directory: Path, mode: str, *options: str) -> None:
        self._log = directory / "log"
        command = [sys.executable, "-m", "tests.support.parent", str(self._log), mode, "--run-dir", str(directory)]
        self.process = subprocess.Popen([*command, *options], cwd=ROOT, stderr=subprocess.DEVNULL)
        eventually(lambda: {"broker starts", "worker starts"} <= set(self.heard), "the children are there")

    @property
    def heard(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    def hears(self, line: str) -> None:
        eventually(lambda: line in self.heard, line)

    def go_on(self) -> None:
        with self._log.open("a") as log:
            log.write("go on\n")

    def __enter__(self) -> MadeUp:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_the_worker_host_stays_until_the_broker_has_drained(directory: Path) -> None:
    with MadeUp(directory, "drains") as service:
        service.process.terminate()
        service.hears("broker SIGTERM")
        assert "worker SIGTERM" not in service.heard
        service.go_on()
        assert service.process.wait(LIMIT_S) == 0
        order = [line for line in service.heard if "starts" not in line]
        assert order[:3] == ["broker SIGTERM", "go on", "broker ends"]
        assert order[-1] == "worker ends"
        assert set(order[3:-1]) <= {"worker SIGTERM", "worker SIGINT"}, "it may end before it has heard both"


def test_a_second_signal_ends_a_drain_at_once(directory: Path) -> None:
    with MadeUp(directory, "drains") as service:
        service.process.send_signal(signal.SIGINT)
        service.hears("broker SIGTERM")
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(LIMIT_S) == 0
        assert service.heard.count("broker SIGTERM") == 2
        assert "broker ends" in service.heard


def test_a_broker_that_hears_nothing_is_killed_a_second_after_the_second_signal(directory: Path) -> None:
    with MadeUp(directory, "hangs") as service:
        service.process.terminate()
        service.hears("broker SIGTERM")
        with Stopwatch() as stopwatch:
            service.process.terminate()
            assert service.process.wait(LIMIT_S) == 0
        assert 0.9 < stopwatch.seconds < 10


def test_whoever_is_ephemeral_is_gone_within_two_seconds(directory: Path) -> None:
    with MadeUp(directory, "stubborn", "--ephemeral") as service:
        with Stopwatch() as stopwatch:
            service.process.terminate()
            assert service.process.wait(LIMIT_S) == 0
        assert stopwatch.seconds < GONE_WITHIN_S
        assert {"broker SIGTERM", "broker SIGINT"} <= set(service.heard), "a second signal, so that it does not drain"


def test_children_that_hang_are_gone_two_seconds_after_their_host(directory: Path) -> None:
    """This process is the host; the parent is told of its child, which is killed."""
    code = f"""
    import subprocess, sys, os
    from pathlib import Path
    command = [sys.executable, "-m", "tests.support.parent", {str(directory / "log")!r}, "stubborn"]
    parent = subprocess.Popen([*command, "--run-dir", {str(directory)!r}, "--host", str(os.getpid())])
    print(parent.pid, flush=True)
    parent.wait()
    """
    with child_process([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        parent = int(host.stdout.readline())
        log = directory / "log"
        eventually(lambda: log.exists() and log.read_text().count("starts") == 2, "the children are there")
        with closing(Process(parent)) as process:
            children = [Process(pid) for pid in children_of(parent)]
            host.kill()
            assert process.ends_within(GONE_WITHIN_S)
            assert not any(child.is_alive for child in children)
            for child in children:
                child.close()


# -- a worker host that leaves ----
def test_a_worker_host_that_is_told_to_end_lets_its_workers_finish(serving: Serving, tmp_path: Path) -> None:
    with LuaHostBridge.connect(serving.run_directory) as bridge, ThreadPoolExecutor(1) as pool:
        deploy(bridge, GATED, deadline="20s")
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        path = bytes(tmp_path / "go")
        running: Future[bytes] = pool.submit(bridge.call, PROBE, len(path), path, 1)
        eventually(lambda: has_begun(bridge), "a call has begun")
        with serving.processes() as before:
            before.worker_host.send(signal.SIGTERM)
            settles(lambda: len(before.look_again()), 1, "the free workers are gone, the busy one is not")
            assert not running.done()
            (tmp_path / "go").touch()
            assert running.result(LIMIT_S) == bytes([42])
            assert before.worker_host.ends_within()
        eventually(lambda: healthy_again(bridge), "the next worker host serves")
        assert bridge.call(PROBE, len(path), path, 1) == bytes([42])
    serving.record("worker host leaves", logger="luacell.broker")
    serving.record("worker host left", level="info")
    serving.record("the worker host ended with exit code 0; starting it again")


def test_a_worker_host_that_the_parent_did_not_start_is_refused(serving: Serving) -> None:
    with LuaHostBridge.connect(serving.run_directory) as bridge, serving.processes() as before:
        with before.parent.stopped():  # it must not start its own again meanwhile
            before.worker_host.kill()
            eventually(lambda: not bridge.health()["worker_host"], "the broker has no worker host")
            command = [*PYTHON, "-m", "luacell.worker", "--run-dir", str(serving.run_directory)]
            stray = subprocess.run(command, timeout=LIMIT_S, stderr=subprocess.PIPE, check=False)
            assert stray.returncode == 75
            assert not bridge.health()["worker_host"]
        eventually(lambda: bridge.health()["worker_host"], "the parent's own is accepted")
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        assert answers(bridge, HEALTHY)
    refused = [str(record) for record in serving.records("descriptor channel refused", logger="luacell.broker")]
    assert any(f"is no child of process {before.parent.pid}" in text for text in refused), refused


def test_a_worker_host_ends_at_once_at_the_second_signal(serving: Serving) -> None:
    with LuaHostBridge.connect(serving.run_directory) as bridge, ThreadPoolExecutor(1) as pool:
        deploy(bridge, ENDLESS, deadline="30s")
        running = pool.submit(failure, bridge, PROBE)
        eventually(lambda: has_begun(bridge), "a call has begun")
        with serving.processes() as before:
            before.worker_host.send(signal.SIGTERM)
            serving.record("worker host leaves", logger="luacell.broker")
            before.worker_host.send(signal.SIGTERM)
            assert before.worker_host.ends_within()
        assert isinstance(running.result(LIMIT_S), WorkerCrashed)


def test_a_worker_host_without_a_broker_can_be_ended(directory: Path) -> None:
    with child_process([*PYTHON, "-m", "luacell.worker", "--run-dir", str(directory)]) as process:
        caught = 1 << (signal.SIGTERM - 1)
        status = Path(f"/proc/{process.pid}/status")
        eventually(lambda: catches(status, caught), "it listens to signals")
        process.terminate()
        assert process.wait(LIMIT_S) == 0


def catches(status: Path, mask: int) -> bool:
    line = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(line.split()[1], 16) & mask)


# -- orphans ----
def test_p20_orphans_are_reaped(serving: Serving) -> None:
    with LuaHostBridge.connect(serving.run_directory) as bridge:
        for number in range(5):
            name = f"host.probe{number}@1"
            bridge.register_host_contract(name, LuaFunction(DOUBLE))
            assert answers(bridge, name)
        with serving.processes() as processes:
            workers = processes.look_again()
            assert len(workers) >= 5
            processes.worker_host.kill()
            assert all(worker.ends_within() for worker in workers)
            pids = [worker.pid for worker in workers]
            eventually(lambda: all(status_of(pid) is None for pid in pids), "nobody is left as a zombie")
            assert zombies_of([processes.parent.pid]) == []
        eventually(lambda: healthy_again_at(bridge, "host.probe0@1"), "the service goes on")


def healthy_again_at(bridge: LuaHostBridge, name: str) -> bool:
    with suppress(CallError):
        return answers(bridge, name)
    return False


NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def may_unshare() -> bool:
    with suppress(OSError):
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    return False


@pytest.mark.skipif(not may_unshare(), reason="no PID namespaces for this user")
def test_p20_as_pid_1_it_serves_and_reaps_strangers(directory: Path) -> None:
    with Serving(directory, prefix=NAMESPACE, log_level="info") as serving:
        assert serve_healthy(directory)
        (init,) = children_of(serving.process.pid)
        # A process that enters the namespace and whose child is left behind there: it falls to PID 1.
        pipe = directory.parent / "pipe"
        os.mkfifo(pipe)
        left_behind = f"cat {pipe} >/dev/null 2>&1 & echo $!"
        enter = ["nsenter", "--target", str(init), "--pid", "--mount", "sh", "-c", left_behind]
        stranger = subprocess.run(enter, capture_output=True, text=True, timeout=LIMIT_S, check=True)
        inner = f"/proc/{init}/root/proc/{int(stranger.stdout)}"
        settles(lambda: Path(f"{inner}/comm").read_text().strip(), "cat", "it waits for somebody to write")
        pipe.open("w").close()
        settles(lambda: os.path.exists(inner), False, "PID 1 has reaped it")
        assert zombies_of([init]) == []
        with closing(Process(init)) as parent:
            parent.send(signal.SIGTERM)
            assert parent.ends_within(), "PID 1 hears only the signals that it listens to"
        assert serving.process.wait(LIMIT_S) == 0
    assert [record for record in serving.history if record["level"] == "error"] == []


# -- systemd ----
@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_is_told(directory: Path, kind: str) -> None:
    address = str(directory.parent / "notify") if kind == "path" else f"\0luacell-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(address)
        supervisor.settimeout(LIMIT_S)
        with Serving(directory, environment={"NOTIFY_SOCKET": address.replace("\0", "@")}) as serving:
            assert supervisor.recv(4096).decode() == f"READY=1\nSTATUS=serving at {directory}"
            with serving.processes() as processes:
                environment = Path(f"/proc/{processes.broker.pid}/environ").read_bytes()
                assert b"NOTIFY_SOCKET" not in environment
                orphaned = processes.worker_host.pid
                with processes.worker_host.stopped():  # so that it outlives the start of the next broker
                    processes.broker.kill()
                    assert (
                        supervisor.recv(4096) == b"STATUS=the broker ended with signal 9 (SIGKILL); starting it again"
                    )
                    assert supervisor.recv(4096).decode() == f"STATUS=serving at {directory}"
            with serving.processes() as processes:
                assert processes.worker_host.pid != orphaned
                processes.worker_host.kill()
            assert supervisor.recv(4096) == b"STATUS=the worker host ended with signal 9 (SIGKILL); starting it again"
            assert supervisor.recv(4096).decode() == f"STATUS=serving at {directory}"
            serving.process.terminate()
            assert supervisor.recv(4096) == b"STOPPING=1\nSTATUS=finishing the calls in flight"
            assert serving.process.wait(LIMIT_S) == 0


def test_a_supervisor_that_is_gone_or_does_not_read_is_no_matter(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(directory.parent / "notify"))
        with suppress(BlockingIOError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as flood:
            flood.setblocking(False)
            while True:
                flood.sendto(b"x", str(directory.parent / "notify"))
        with Serving(directory, environment={"NOTIFY_SOCKET": str(directory.parent / "notify")}):
            assert serve_healthy(directory)


# -- a broker that hangs while it closes ----
@pytest.mark.parametrize("reader", ["reads", "reads nothing"])
def test_closing_never_takes_longer_than_a_second(reader: str) -> None:
    code = """
    import ctypes, os, sys
    from luacell.broker.__main__ import _closing_limit
    if sys.argv[1] == "reads nothing":
        os.set_blocking(2, False)
        try:
            while True: os.write(2, b"x" * 4096)
        except BlockingIOError: os.set_blocking(2, True)
    with _closing_limit():
        ctypes.PyDLL(None).sleep(60)  # with the interpreter's lock held, as a hang in C may
    """
    command = [sys.executable, "-c", textwrap.dedent(code), reader]
    with child_process(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        started_s = time.monotonic()
        code_ = process.wait(LIMIT_S)
        assert time.monotonic() - started_s < LIMIT_S / 2
        assert process.stderr is not None
        errors = process.stderr.read()
    if reader == "reads":
        assert (code_, b"_closing_limit" in errors or b"most recent call first" in errors) == (1, True)
    else:
        assert code_ == -signal.SIGALRM
