"""P10 of the catalogue: an exception in each handler of the broker's loop, and in each of its threads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from luacell.broker.fatal import EXIT_FAILED
from luacell.client import LuacellError, LuaFunction, LuaHostBridge, Unavailable
from tests.support import scenes
from tests.support.breaking import ENDING_THREADS, HANDLERS, THREADS, Control, threads_of_the_broker
from tests.support.contracts import DOUBLE, HEALTHY, answers, deploy, function
from tests.support.holdings import holdings, holds_no_more_than
from tests.support.pending import has_begun, in_thread
from tests.support.processes import Processes, descriptors_of, processes_with
from tests.support.scenes import Scene, Stage
from tests.support.scheduling import Scheduling
from tests.support.serving import Serving
from tests.support.waiting import LIMIT_S, eventually, settles

WITHIN_S: Final = 1.0  # from the exception to the answers of pending calls; how soon another broker serves, P08 says
WAITING: Final = "host.waiting@1"
SLEEPS: Final = 'local ffi = require("ffi")\nffi.cdef[[int pause(void);]]\n' + function("ffi.C.pause()")

# Which scene makes a handler be called; a handler that is new is missing here, and that is a failure.
SCENES: Final[dict[str, Scene]] = {
    **dict.fromkeys(
        (
            "host HELLO",
            "host REGISTER",
            "host COMMIT",
            "host UNREGISTER",
            "host REVIVE",
            "host CRASHES",
            "host CRASH",
            "host LIST",
            "host DESCRIBE",
            "host HEALTH",
            "host LEASE",
            "host MAPPED",
            "host GIVE_BACK",
            "worker READY",
            "worker LOADED",
            "report STARTED",
            "report EXITED",
            "report OUTPUT",
            "heard Connected",
            "heard Received",
            "heard Ended",
            "heard WorkDone",
            "effect SendCall",
            "effect SendFailure",
            "effect SendReply",
            "effect StoreContract",
            "effect StoreContracts",
            "effect StartWorker",
            "effect LoadWorker",
            "effect KillWorker",
            "effect DropPair",
            "effect RecordCrash",
            "effect Record",
            "Dispatcher quick_call",
            "Dispatcher quick_done",
            "Dispatcher call_arrived",
            "Server _greet",
            "Server _tell_forgotten",
            "Workers send_map",
            "thread luacell-keeper",
            "thread luacell-crashes",
            "thread luacell-gate",
        ),
        scenes.life,
    ),
    "host BYE": scenes.farewell,
    "heard Disconnected": scenes.vanishing,
    "Workers time_passed": scenes.unexplained,
    **dict.fromkeys(
        ("host CALL", "host CANCEL", "worker DONE", "effect SendReleased", "Dispatcher refill"), scenes.together
    ),
    **dict.fromkeys(("report INSPECTED", "timer Call", "effect InspectWorker"), scenes.late),
    "timer Inquiry": scenes.late_and_nobody_looks,
    "timer Worker": scenes.slow,
    "timer Contract": scenes.frail,
    "timer Waiter": scenes.spare_taken,
    **dict.fromkeys(
        (
            "inline CALL_INLINE",
            "inline PIECE",
            "inline MORE",
            "inline CANCEL",
            "inline BYE",
            "Server _greet_inline",
            "InlineHosts time_passed",
            "InlineHosts step",
        ),
        scenes.inline,
    ),
    "Server _find_step": scenes.stranger,
    **dict.fromkeys(("Server _on_nested", "Dispatcher worker_done", "effect SendResult"), scenes.nested),
    **dict.fromkeys(("worker SAVED", "worker RESTORED", "effect SaveState", "effect RestoreState"), scenes.carried),
    "report LEAVING": scenes.worker_host_leaves,
    "heard Signalled": scenes.signalled,
    **dict.fromkeys(("Server _pass_time", "Server _choose_tick", "thread luacell-watcher"), scenes.life),
}


class Service:
    """A service whose broker's handlers can be made to raise, with hosts whose calls wait in it."""

    def __init__(self, directory: Path, control: Control, serving: Serving) -> None:
        self.control = control
        self.serving = serving
        self.directory = directory
        self.bridge = LuaHostBridge.connect(serving.run_directory)
        self.remote = LuaHostBridge.connect(f"ipc+inline://{serving.run_directory}")
        self.bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        deploy(self.bridge, SLEEPS, WAITING, deadline="30s")
        assert self.serves()

    def close(self) -> None:
        self.bridge.close()
        self.remote.close()

    def serves(self) -> bool:
        with suppress(LuacellError):
            return answers(self.bridge, HEALTHY)
        return False

    def breaks(self, handler: str, scene: Scene) -> None:
        """Let a handler raise while a scene is played and calls wait, and check what must follow."""
        with Scheduling() as scheduling, Processes.of(self.bridge) as before:
            waiting = [in_thread(partial(_end_of_call, self.bridge))]
            eventually(lambda: has_begun(self.bridge), "the first call has begun")
            waiting += [in_thread(partial(_end_of_call, bridge)) for bridge in (self.bridge, self.remote)]
            eventually(lambda: self.bridge.health()["slots_in_flight"] == len(waiting), "all calls are under way")
            self.control.arm(handler)
            actors, _ = in_thread(partial(self._play, scene))
            raised_s = eventually(lambda: self.control.raised_ns, f"{handler} has raised") / 1e9
            for thread, _ in waiting:
                thread.join(LIMIT_S)
            ends = [end for _, (end,) in waiting]
            answered_s = max(ended_s for _, ended_s in ends) - raised_s
            assert before.broker.ends_within()
            eventually(self.serves, "the service serves again")
            served_s = time.monotonic() - raised_s
            assert all(each.ends_within() for each in before.all if each is not before.parent)
            actors.join(LIMIT_S)
        print(f"{handler}: answered after {answered_s:.3f} s, served after {served_s:.3f} s")
        errors = [error for error, _ in ends]
        assert [type(error) for error in errors] == [Unavailable] * len(errors), errors
        assert sorted(error.began for error in errors if isinstance(error, Unavailable))[-1] == "yes"
        assert answered_s < WITHIN_S + scheduling.slack_s
        assert {HEALTHY, WAITING} <= {str(each) for each in self.bridge.contracts()}, "the registry is intact"
        self._check_records(handler)

    def _play(self, scene: Scene) -> None:
        with Stage(self.serving.run_directory, self.directory) as stage, suppress(LuacellError):
            for step in scene(stage):
                if self.control.raised_ns:
                    return
                with suppress(LuacellError):
                    step()

    def _check_records(self, handler: str) -> None:
        error = f"KeyError: 'made to fail: {handler}'"
        record = self.serving.record("broker failed", error=error)
        assert record["level"] == "critical"
        word = handler.split()[1].lower()
        assert word in " ".join(str(value) for value in record.values()).lower()
        assert error in record["trace"]
        self.serving.record(f"the broker ended with exit code {EXIT_FAILED}; starting it again")


def _end_of_call(bridge: LuaHostBridge) -> tuple[object, float]:
    """Call the contract that does not answer; return how that ended, and when (seconds, monotonic)."""
    try:
        return bridge.call(WAITING, 0), time.monotonic()
    except LuacellError as error:
        return error, time.monotonic()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("handlers")
    run_directory = directory / "run"
    run_directory.mkdir(mode=0o700)
    before = holdings()
    with Control(directory / "control") as control:
        options = ("--max-restarts", "1000000")
        with Serving(run_directory, *options, log_level="info", program=control.program) as serving:
            service = Service(directory, control, serving)
            held = descriptors_of(serving.process.pid)
            yield service
            service.close()
            settles(lambda: descriptors_of(serving.process.pid), held, "the parent holds what it held")
        assert serving.process.returncode == 0
    settles(lambda: len(processes_with(run_directory)), 0, "all processes have ended")
    holds_no_more_than(before)


@pytest.mark.parametrize("handler", HANDLERS, ids=lambda handler: f"P10-{handler.replace(' ', '_')}")
def test_p10_exception_in_a_handler_ends_the_broker_loudly_and_another_serves(service: Service, handler: str) -> None:
    service.breaks(handler, SCENES[handler])


def test_p10_every_thread_of_the_broker_is_thrown_at() -> None:
    assert threads_of_the_broker() == {*THREADS, *ENDING_THREADS}
    assert SCENES.keys() == set(HANDLERS)
