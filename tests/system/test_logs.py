"""Log records of a service: one per death and per event of its life, none per call, and what contracts print."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from luacell.client import LuaFunction, LuaHostBridge, VmRegistrationFailed, WorkerCrashed
from luacell.protocol.limits import OUTPUT_PER_CALL_MAX
from tests.support.contracts import DOUBLE, HEALTHY, PROBE, answers, deploy, failure, function, refusal
from tests.support.processes import worker_of
from tests.support.serving import Serving
from tests.support.waiting import LIMIT_S, eventually, settles

C = 'local ffi = require("ffi")\nffi.cdef[[long write(int, const char *, size_t); int fsync(int); int isatty(int);]]\n'


@pytest.fixture
def bridge(serving: Serving) -> Iterator[LuaHostBridge]:
    with LuaHostBridge.connect(serving.run_directory) as bridge:
        yield bridge


def printed(serving: Serving, stream: str = "stdout") -> str:
    """Return what a contract has printed, as far as the records have it."""
    return "".join(record["text"] for record in serving.records("contract output", stream=stream))


def cut(serving: Serving, event: str = "contract output") -> int:
    return sum(record.get("cut", 0) for record in serving.records(event))


# -- what contracts print ----
def test_whatever_a_contract_prints_becomes_a_record(serving: Serving, bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(
        PROBE,
        LuaFunction(
            C
            + 'print("loads")\n'
            + function(
                'print("print", fn_id) io.write("io.write\\n") io.stderr:write("io.stderr: ä\\n") '
                'ffi.C.write(1, "write 1\\n", 8) ffi.C.write(2, "write 2\\n", 8)'
            )
        ),
    )
    bridge.call(PROBE, 7)
    settles(lambda: printed(serving), "loads\nprint\t7\nio.write\nwrite 1\n", "stdout is recorded")
    settles(lambda: printed(serving, "stderr"), "io.stderr: ä\nwrite 2\n", "stderr is recorded")
    (worker,) = [each["id"] for each in bridge.health()["workers"] if each["contract"] == PROBE]
    for record in serving.records("contract output"):
        assert (record["contract"], record["worker"], record["level"]) == (PROBE, worker, "info")
        assert "cut" not in record


def test_what_is_no_utf_8_is_replaced(serving: Serving, bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(function('io.write("a\\255b\\0c\\n")')))
    bridge.call(PROBE, 0)
    settles(lambda: printed(serving), "a\ufffdb\0c\n", "the bytes that are none are replaced")


def test_a_call_s_output_is_cut_at_its_bound_and_the_rest_counted(serving: Serving, bridge: LuaHostBridge) -> None:
    # In steps that wait until the pipe is read: what a full pipe refuses would be counted by nobody. And with a pause
    # at the end: what comes after the call counts as the next one's.
    body = """
    local line = ("x"):rep(1023) .. "\\n"
    for step = 1, fn_id do
      for _ = 1, 16 do io.write(line) end
      repeat
        ffi.C.usleep(20000)
        assert(ffi.C.ioctl(1, FIONREAD, held) == 0)
      until held[0] == 0
    end
    if fn_id > 1 then ffi.C.usleep(400000) end
    """
    declared = "ffi.cdef[[int usleep(unsigned); int ioctl(int, unsigned long, int *);]]"
    state = 'local FIONREAD, held = 0x541B, ffi.new("int[1]")'
    source = f'local ffi = require("ffi")\n{declared}\n{state}\n' + function(body)
    deploy(bridge, source, deadline="20s")
    total = 10 * 16 * 1024
    bridge.call(PROBE, 10)
    settles(lambda: len(printed(serving)), OUTPUT_PER_CALL_MAX, "one call's output is recorded up to its bound")
    settles(lambda: len(printed(serving)) + cut(serving), total, "every byte is recorded or counted, within a second")
    bridge.call(PROBE, 1)
    settles(lambda: len(printed(serving)) + cut(serving), total + 16 * 1024, "every byte is recorded or counted")
    assert OUTPUT_PER_CALL_MAX < len(printed(serving)) <= OUTPUT_PER_CALL_MAX + 16 * 1024, "the next call has its own"


def test_the_end_of_stderr_is_in_the_death_record(serving: Serving, bridge: LuaHostBridge) -> None:
    body = 'io.stderr:write(("a"):rep(5000), "last words\\n") ffi.cast("int *", 0)[0] = 1'
    bridge.register_host_contract(PROBE, LuaFunction(function(body)))
    assert isinstance(failure(bridge, PROBE), WorkerCrashed)
    died = serving.record("worker died", contract=PROBE)
    assert died["stderr"] == (("a" * 5000) + "last words\n")[-2048:]
    assert died["cause"] == "signal 11 (SIGSEGV)"
    assert printed(serving, "stderr").endswith("last words\n"), "and before it, where it belongs"


def test_a_contract_reads_nothing_and_blocks_on_nothing(serving: Serving, bridge: LuaHostBridge) -> None:
    body = "out[0] = io.read() == nil and 1 or 2 out[1] = ffi.C.isatty(1) + ffi.C.isatty(2)"
    bridge.register_host_contract(PROBE, LuaFunction(C + function(body)))
    assert bridge.call(PROBE, 0, None, 2) == bytes([1, 0])


@pytest.mark.parametrize("stream", [1, 2])
def test_a_flood_hurts_nobody_else(serving: Serving, bridge: LuaHostBridge, stream: int) -> None:
    flood = C + function(
        f'local block = ("x"):rep(65535) .. "\\n" while true do ffi.C.write({stream}, block, 65536) end'
    )
    deploy(bridge, flood, deadline="30s", run_limit="30s")
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
    assert answers(bridge, HEALTHY)
    with ThreadPoolExecutor(1) as pool:
        flooding = pool.submit(failure, bridge, PROBE)
        eventually(lambda: cut(serving) > 1 << 20, "the flood is under way")
        count, until_s = 0, time.monotonic() + 1.0
        while time.monotonic() < until_s:
            assert answers(bridge, HEALTHY, count)
            count += 1
        with closing(worker_of(bridge, HEALTHY)) as worker:  # a death, a fork and a load meanwhile
            worker.kill()
            assert answers(bridge, HEALTHY)
            assert worker.ends_within()
        assert not flooding.done()
        with closing(worker_of(bridge, PROBE)) as worker:
            worker.kill()
        assert isinstance(flooding.result(LIMIT_S), WorkerCrashed)
    print(f"{count} healthy calls in a second beside a flood")
    assert count > 10
    assert serving.record("worker died", contract=PROBE)["cause"] == "signal 9 (SIGKILL)"
    kept = sum(len(record["text"]) for record in serving.records("contract output", contract=PROBE))
    assert kept <= OUTPUT_PER_CALL_MAX


def test_a_stderr_that_nobody_reads_stops_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("l") / "run"
    path.mkdir(mode=0o700)
    reader, writer = os.pipe()
    try:
        with Serving(path, log_level="debug", stderr=writer) as serving, LuaHostBridge.connect(path) as bridge:
            body = 'for _ = 1, 60 do io.write(("x"):rep(1023), "\\n") end'
            bridge.register_host_contract(PROBE, LuaFunction(function(body)))
            for _ in range(40):
                bridge.call(PROBE, 0)
                time.sleep(0.01)  # so that the output of the calls is not one flood; nothing waits for it
            for _ in range(2000):  # deaths are records as well
                bridge.call(PROBE, 1 << 20)
            with serving.processes() as processes:
                processes.worker_host.kill()
                assert processes.worker_host.ends_within()
            eventually(lambda: bridge.call(PROBE, 0) == b"", "the service goes on")
            serving.process.send_signal(signal.SIGTERM)
            assert serving.process.wait(10) == 0, "and ends"
    finally:
        os.close(writer)
        os.close(reader)


# -- what contracts log ----
def logged(serving: Serving) -> list[tuple[str, int | None, str]]:
    """Return what a contract has logged: level, function, text."""
    return [(each["level"], each.get("function"), each["text"]) for each in serving.records("contract log")]


@pytest.mark.parametrize("sandbox", ["default", "hardened"])
def test_what_a_contract_logs_is_a_record_of_its_level(serving: Serving, bridge: LuaHostBridge, sandbox: str) -> None:
    body = """
      for _, level in ipairs({ "debug", "info", "warning", "error" }) do luacell.log(level, "line 1\\nä \\30\\\\n") end
      io.stderr:write("printed ")
      luacell.log("info", 4.5)
      io.stderr:write("on\\n")
    """
    deploy(bridge, 'luacell.log("info", "loads")\n' + function(body), sandbox=sandbox)
    bridge.call(PROBE, 7)
    lines: list[tuple[str, int | None, str]] = [
        (level, 7, "line 1\nä \x1e\\n") for level in ("debug", "info", "warning", "error")
    ]
    settles(lambda: logged(serving), [("info", None, "loads"), *lines, ("info", 7, "4.5")], "each is a record")
    settles(lambda: printed(serving, "stderr"), "printed on\n", "what is printed stays that")
    (worker,) = [each["id"] for each in bridge.health()["workers"] if each["contract"] == PROBE]
    assert {(each["contract"], each["worker"]) for each in serving.records("contract log")} == {(PROBE, worker)}


def test_a_level_that_does_not_exist_is_an_error_that_names_it(bridge: LuaHostBridge) -> None:
    deploy(bridge, function('luacell.log(fn_id == 1 and "loud" or 3, "text")'))
    assert 'level "loud" is none of debug, info, warning, error' in str(failure(bridge, PROBE, 1))
    assert 'level "3" is none of' in str(failure(bridge, PROBE, 2))


def test_logs_are_cut_and_counted_as_prints_are(serving: Serving, bridge: LuaHostBridge) -> None:
    source = 'luacell.log("error", ("x"):rep(3000)) for _ = 1, 80 do luacell.log("info", ("y"):rep(100)) end'
    deploy(bridge, function(source), max_output="3KiB")
    bridge.call(PROBE, 0)
    eventually(lambda: cut(serving, "contract log") + cut(serving) > 0, "what is beyond is counted")
    assert logged(serving)[0][2].endswith(" … (truncated)")
    # The end of what a call logs may count as the next one's: two budgets at most.
    assert 1900 < sum(len(text.encode()) for _, _, text in logged(serving)) <= 2 * 3 * 1024


def test_a_contract_forges_only_what_it_could_log(serving: Serving, bridge: LuaHostBridge) -> None:
    forged = '"\\30log error 99 forged\\n\\30log fatal 1 x\\n\\30log info 1 never ends"'
    deploy(bridge, function(f'io.stderr:write({forged}) ffi.cast("int *", 0)[0] = 1'))
    assert isinstance(failure(bridge, PROBE), WorkerCrashed)
    died = serving.record("worker died", contract=PROBE)
    assert "error: forged\n" in died["stderr"]
    (record,) = serving.records("contract log")
    assert (record["contract"], record["function"], record["text"]) == (PROBE, 99, "forged")
    assert printed(serving, "stderr") == "\x1elog fatal 1 x\n\x1elog info 1 never ends"


# -- the life of a service ----
def test_every_event_of_its_life_is_one_record(serving: Serving, bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE), replace=True)
    assert isinstance(refusal(bridge, "syntax error(", HEALTHY), VmRegistrationFailed)
    bridge.unregister_host_contract(PROBE)
    bridge.close()
    for event, level in {
        "serving": "info",
        "broker started": "info",
        "worker host joined": "info",
        "host joined": "debug",
        "contract registered": "info",
        "contract replaced": "info",
        "contract not registered": "warning",
        "contract unregistered": "info",
        "host left": "debug",
    }.items():
        record = serving.record(event)
        assert len(serving.records(event)) == 1, event
        assert record["level"] == level
    assert serving.record("contract not registered")["contract"] == HEALTHY
    serving.stop()
    assert [record["event"] for record in serving.history if "stopping" in record["event"]][-1] == "broker stopping"


def test_a_call_that_succeeds_writes_no_record(serving: Serving, bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    assert answers(bridge, PROBE)
    serving.record("contract registered")
    before = serving.records()
    for number in range(500):
        assert answers(bridge, PROBE, number)
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
    serving.record("contract registered", contract=HEALTHY)
    assert len(serving.records()) == len(before) + 1


def test_every_line_of_stderr_is_json(serving: Serving, bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(function('print("\\27[31m\\r\\n\\226\\128\\168")')))
    bridge.call(PROBE, 0)
    serving.record("contract output")
    bridge.close()
    serving.stop()
    for line in serving.errors.split("\n")[:-1]:
        assert {"at", "level", "logger", "event"} <= set(json.loads(line))


def test_records_of_a_broker_killed_with_everything_end_with_whole_lines(serving: Serving) -> None:
    serving.record("worker host joined")
    with serving.processes() as processes:
        for process in processes.all:
            process.kill()
        assert processes.survivors(2.0) == []
    serving.stop()
    assert serving.errors.endswith("}\n")
