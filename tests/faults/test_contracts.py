"""Part C of the catalogue: a contract misbehaves."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from luacell.client import (
    AbiErrorCode,
    CallError,
    DeadlineExceeded,
    HostContractCallFailed,
    LuaHostBridge,
    OutOfMemory,
    TooLarge,
    VmRegistrationFailed,
    WorkerCrashed,
)
from tests.support.contracts import CALL_FAILED, HEALTHY, PROBE, Stopwatch, answers, deploy, failure, refusal
from tests.support.processes import Processes, broker_pid, run_directory, services_of, worker_of
from tests.support.scheduling import Scheduling
from tests.support.typed_contracts import deploy_typed

pytestmark = pytest.mark.usefixtures("load")

GRACE_S = 0.25
LIMIT_S = 0.3
Thrower = Callable[..., str]


def serves(bridge: LuaHostBridge) -> bool:
    return bridge.call(PROBE, 0, None, 1, timeout=5) == bytes([42])


def crash(bridge: LuaHostBridge, args: bytes | None = None) -> WorkerCrashed:
    """Call the faulty function, which must cost its worker; the next call must work."""
    crashed = failure(bridge, PROBE, 1, args=args, out_size=64)
    assert isinstance(crashed, WorkerCrashed)
    assert crashed.began == "yes"
    assert serves(bridge)
    return crashed


def late(bridge: LuaHostBridge) -> None:
    """Call the faulty function, which must be answered at its deadline; the next call must work."""
    assert serves(bridge), "the faulty call finds its contract loaded, and begins at once"
    with Scheduling(*services_of(bridge)) as delays, Stopwatch() as stopwatch:
        exceeded = failure(bridge, PROBE, 1, out_size=64, timeout=LIMIT_S)
    assert isinstance(exceeded, DeadlineExceeded)
    assert exceeded.began == "yes"
    assert LIMIT_S <= stopwatch.seconds <= LIMIT_S + GRACE_S + delays.latest_s + delays.waited_s
    assert serves(bridge)


def raised(bridge: LuaHostBridge, words: str = "") -> HostContractCallFailed:
    """Call the faulty function, which must raise; its worker goes on."""
    serves(bridge)
    with closing(worker_of(bridge, PROBE)) as worker:
        error = failure(bridge, PROBE, 1, out_size=64)
        assert isinstance(error, HostContractCallFailed)
        assert error.code == CALL_FAILED
        assert error.message.startswith("Lua exception: ")
        assert words in error.message
        assert serves(bridge)
        assert worker.is_alive
    return error


def returned(bridge: LuaHostBridge, count: int = 1) -> list[int]:
    """Call the faulty function, which must return; return the int32 values that it wrote behind the first byte."""
    reply = bridge.call(PROBE, 1, None, 4 + 4 * count, timeout=5)
    return [int.from_bytes(reply[4 * n : 4 * n + 4], "little", signed=True) for n in range(1, count + 1)]


# -- crashes ----
@pytest.mark.parametrize(
    "body",
    [
        pytest.param("out[1] = ffi.cast('volatile int *', 0)[0]", id="C01"),
        pytest.param("ffi.cast('int *', 0)[0] = 1", id="C02"),
        pytest.param("ffi.cast('void (*)(void)', 0)()", id="C03"),
        pytest.param("ffi.fill(ffi.cast('char *', 0x10000), 1e9, 65)", id="C04"),
        pytest.param("ffi.fill(ffi.new('char[16]'), 2e9, 65)", id="C05"),
        pytest.param("ffi.string(ffi.cast('char *', 0xdeadbeef))", id="C06"),
    ],
)
def test_c01_c06_wild_accesses_are_segfaults(bridge: LuaHostBridge, contract: Thrower, body: str) -> None:
    contract(body)
    assert crash(bridge).signal == signal.SIGSEGV


@pytest.mark.parametrize(
    ("body", "number"), [("ffi.C.abort()", signal.SIGABRT), ("ffi.C.raise(8)", signal.SIGFPE)], ids=["abort", "raise"]
)
def test_c07_abort_and_raise_are_told_by_their_signal(
    bridge: LuaHostBridge, contract: Thrower, body: str, number: int
) -> None:
    contract(body, "void abort(void); int raise(int);")
    assert crash(bridge).signal == number


@pytest.mark.parametrize(
    ("body", "code"),
    [
        pytest.param("os.exit(0)", 0, id="C08-os.exit(0)"),
        pytest.param("os.exit(1)", 1, id="C09-os.exit(1)"),
        pytest.param("os.exit(true, true)", 0, id="C09-os.exit(true, true)"),
        pytest.param("ffi.C.exit(7)", 7, id="C10-exit(7)"),
        pytest.param("ffi.C._exit(0)", 0, id="C11-_exit(0)"),
    ],
)
def test_c08_c11_exits_are_crashes_whatever_the_code(
    bridge: LuaHostBridge, contract: Thrower, body: str, code: int
) -> None:
    contract(body, "void exit(int); void _exit(int);")
    crashed = crash(bridge)
    assert (crashed.exit_code, crashed.signal) == (code, None)


# -- calls that do not end ----
@pytest.mark.parametrize(
    "body",
    [
        pytest.param("while true do end", id="C15-empty"),
        pytest.param("local x = 0 while true do x = (x + 1) % 7 end", id="C16-arithmetic"),
        pytest.param("while true do pcall(error, 'x') end", id="C17-around pcall"),
        pytest.param("ffi.C.sleep(60)", id="C18-sleep"),
        pytest.param("ffi.C.pause()", id="C18-pause"),
        pytest.param(
            "local ends = ffi.new('int[2]') if ffi.C.pipe(ends) < 0 then ffi.C.pause() end ffi.C.read(ends[0], out, 1)",
            id="C19-read",
        ),
        pytest.param("string.find(('a'):rep(30), ('a?'):rep(30) .. ('a'):rep(30))", id="C21-backtracking"),
        pytest.param("string.find(('a'):rep(5000), '.-.-.-.-.-b')", id="C22-lazy repetitions"),
        pytest.param("(('x'):rep(3e5)):gsub('x*y', '')", id="C23-gsub"),
        pytest.param("for _ in (('x'):rep(3e5)):gmatch('x*y') do end", id="C24-gmatch"),
    ],
)
def test_c15_c24_endless_calls_are_answered_at_their_deadline(
    bridge: LuaHostBridge, contract: Thrower, body: str
) -> None:
    contract(body, "int sleep(int); int pause(void); int pipe(int *); long read(int, void *, size_t);")
    late(bridge)


# -- memory ----
@pytest.mark.parametrize(
    "body",
    [
        pytest.param("local s = 'x' while true do s = s .. s end", id="C25"),
        pytest.param("local t = {} while true do t[#t + 1] = {} end", id="C26"),
        pytest.param("local t = {} while true do t[#t + 1] = ffi.new('char[4096]') end", id="C28"),
        pytest.param("local f while true do local g = f f = function() return g() end end", id="C32"),
        pytest.param("local t = {} while true do t[#t + 1] = coroutine.create(print) end", id="C33"),
        pytest.param("collectgarbage('stop') while true do junk = { {} } end", id="C94"),
    ],
)
def test_c25_c94_memory_bombs_are_out_of_memory(bridge: LuaHostBridge, contract: Thrower, body: str) -> None:
    contract(body, memory="16MiB")
    assert serves(bridge)
    with closing(worker_of(bridge, PROBE)) as worker:
        error = failure(bridge, PROBE, 1)
        assert isinstance(error, OutOfMemory)
        assert error.limit == "memory 16 MiB"
        assert worker.ends_within()
    assert serves(bridge)


TAKE = "void *malloc(size_t); void *memset(void *, int, size_t); void *mmap(void *, size_t, int, int, int, long);"
MAP = "ffi.C.mmap(nil, 2^20, 3, {flags}, -1, 0)"
FAILED = "ffi.cast('void *', -1)"


def fill(bridge: LuaHostBridge, contract: Thrower, body: str) -> None:
    """Deploy a contract that takes memory of C, up to twice its max_rss, the least there is: 128 MiB."""
    contract(body, TAKE, memory="16MiB", max_rss="64MiB")
    assert serves(bridge)


@pytest.mark.parametrize("size", [64, 4096, 1 << 20])
def test_c30_memory_of_c_without_end_is_a_segfault_where_nobody_looks(
    bridge: LuaHostBridge, contract: Thrower, size: int
) -> None:
    fill(bridge, contract, f"while true do ffi.C.memset(ffi.C.malloc({size}), 1, {size}) end")
    assert crash(bridge).signal == signal.SIGSEGV


@pytest.mark.parametrize(
    "take",
    ["ffi.C.malloc(2^20)", f"{MAP.format(flags=0x22)} if p == {FAILED} then p = nil end"],
    ids=["malloc", "mmap"],
)
def test_c30_memory_of_c_without_end_is_the_contract_s_own_error_where_it_looks(
    bridge: LuaHostBridge, contract: Thrower, take: str
) -> None:
    fill(
        bridge,
        contract,
        f"local count = 0 while true do local p = {take} if p == nil then error('none after ' .. count) end "
        "ffi.C.memset(p, 1, 2^20) count = count + 1 end",
    )
    error = failure(bridge, PROBE, 1)
    assert isinstance(error, HostContractCallFailed)
    count = int(error.message.partition("none after ")[2].partition("\n")[0])
    assert 96 < count <= 128
    assert serves(bridge)


LUA_BEHIND_C = "while ffi.C.malloc(2^20) ~= nil do end local t = {} for n = 1, 1e6 do t[n] = { n } end"


def test_c30_vm_that_c_left_no_memory_is_out_of_memory(bridge: LuaHostBridge, contract: Thrower) -> None:
    fill(bridge, contract, LUA_BEHIND_C)
    error = failure(bridge, PROBE, 1)
    assert isinstance(error, OutOfMemory)
    assert error.limit == "process memory 128 MiB"
    assert serves(bridge)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("local t = {} for n = 1, 1e6 do t[n] = { n } end", id="tables"),
        pytest.param("local s = ('x'):rep(1e6)", id="a string"),
        pytest.param("local sum = 0 for n = 1, 1e6 do sum = sum + n end", id="machine code"),
    ],
)
def test_c30_vm_that_c_left_no_page_is_out_of_memory(bridge: LuaHostBridge, contract: Thrower, body: str) -> None:
    page = MAP.format(flags=0x22).replace("2^20", "4096")
    fill(bridge, contract, f"while ffi.C.malloc(2^20) ~= nil do end while {page} ~= {FAILED} do end {body}")
    error = failure(bridge, PROBE, 1)
    assert isinstance(error, OutOfMemory)
    assert error.limit == "process memory 128 MiB"
    assert serves(bridge)


@pytest.mark.parametrize("flags", [0x21, 0x122], ids=["shared", "growing"])
def test_c30_memory_that_no_limit_counts_is_refused(bridge: LuaHostBridge, contract: Thrower, flags: int) -> None:
    fill(
        bridge, contract, f"ffi.cast('int *', out + 4)[0] = {MAP.format(flags=flags)} == {FAILED} and ffi.errno() or 0"
    )
    assert returned(bridge) == [errno.EPERM]


def test_c30_limits_cannot_be_raised(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract(
        "local n, limit = ffi.cast('int *', out + 4), ffi.new('unsigned long[2]') "
        "for place, which in ipairs({ 2, 9 }) do "
        "  ffi.C.getrlimit(which, limit) limit[0] = limit[0] + 1 limit[1] = limit[1] + 1 "
        "  n[place - 1] = ffi.C.setrlimit(which, limit) end",
        "int getrlimit(int, unsigned long *); int setrlimit(int, unsigned long *);",
    )
    assert returned(bridge, 2) == [-1, -1]


def test_c28_c30_memory_bombs_while_loading_are_failures_to_load(bridge: LuaHostBridge, level: str) -> None:
    bombs = {
        "while true do ffi.C.memset(ffi.C.malloc(2^20), 1, 2^20) end": "signal 11 (SIGSEGV)",
        "while true do assert(ffi.C.malloc(2^20) ~= nil, 'no more') end": "no more",
        "local t = {} while true do t[#t + 1] = ffi.new('char[4096]') end": "more than its memory 16 MiB while loading",
        LUA_BEHIND_C: "more than its process memory 128 MiB while loading",
    }
    for bomb, words in bombs.items():
        source = f'local ffi = require("ffi") ffi.cdef[[{TAKE}]] {bomb}'
        with pytest.raises(VmRegistrationFailed, match=re.escape(words)):
            deploy(bridge, source, memory="16MiB", max_rss="64MiB", sandbox=level)
        assert answers(bridge, HEALTHY)


def test_c29_array_of_2_to_the_40_bytes_is_refused_or_empty(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("local n = ffi.new('char[?]', 2^40) ffi.cast('int *', out + 4)[0] = ffi.sizeof(n) > 0 and 1 or 0")
    with suppress(HostContractCallFailed, OutOfMemory):
        assert returned(bridge) == [0], "LuaJIT makes an empty one: its size wraps"
    assert serves(bridge)


# -- errors ----
@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param("local function f() return f() + 1 end f()", "stack overflow", id="C34-recursion"),
        pytest.param(
            "local t = setmetatable({}, { __index = function(t, k) return t[k] end }) return t.x",
            "stack overflow",
            id="C34-__index",
        ),
        pytest.param("local function f(s) return (s:gsub('.', f)) end f('x')", "stack overflow", id="C36-gsub"),
        pytest.param("assert(load(('('):rep(1e5)))", "syntax levels", id="C38-parentheses"),
        pytest.param("assert(load('return ' .. ('{'):rep(1e5)))", "syntax levels", id="C38-tables"),
        pytest.param("unpack({}, 1, 1e7)", "too many results", id="C39-unpack"),
        pytest.param("string.find('x', ('()'):rep(33))", "too many captures", id="C40-captures"),
        pytest.param("error('text')", "probe.lua:3: text", id="C62-text"),
        pytest.param("error({ code = 7 })", "table: 0x", id="C63-table"),
        pytest.param(
            "error(setmetatable({}, { __tostring = function() error('again') end }))",
            "(error object of type table)",
            id="C70-__tostring raises",
        ),
        pytest.param(
            "error(setmetatable({}, { __tostring = function() return 42 end }))",
            "(error object of type table)",
            id="C71-__tostring returns 42",
        ),
    ],
)
def test_c34_c71_errors_of_all_kinds_are_102(bridge: LuaHostBridge, contract: Thrower, body: str, words: str) -> None:
    contract(body)
    raised(bridge, words)


def test_c74_error_object_whose_text_never_comes_is_late(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("error(setmetatable({}, { __tostring = function() while true do end end }))")
    late(bridge)


def test_c75_error_of_64_mb_is_cut(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("error(('x'):rep(64e6))", memory="512MiB")
    error = raised(bridge, "truncated")
    assert len(error.message.encode()) <= 4096


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("local p = newproxy(true) getmetatable(p).__gc = function() error('late') end p = nil", id="C78"),
        pytest.param("local p = ffi.gc(ffi.new('char[1]'), function() error('late') end) p = nil", id="C79"),
        pytest.param("jit.off() jit.flush()", id="C95"),
    ],
)
def test_c78_c95_what_the_contract_does_to_its_vm_is_no_failure(
    bridge: LuaHostBridge, contract: Thrower, body: str
) -> None:
    contract(body + " collectgarbage() collectgarbage()")
    assert serves(bridge)
    with closing(worker_of(bridge, PROBE)) as worker:
        for _ in range(5):
            assert returned(bridge, 0) == []
            assert serves(bridge)
        assert worker.is_alive


def test_c91_poisoned_globals_stay_in_their_own_contract(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract(
        "if not getmetatable then return end "
        "getmetatable('').__index = function() error('poisoned') end "
        "debug.setmetatable(0, { __add = function() error('poisoned') end }) "
        "local all, next, names = _G, next, {} "
        "for name in next, all do names[name] = true end for name in next, names do all[name] = nil end"
    )
    for _ in range(3):
        assert returned(bridge, 0) == []
        assert answers(bridge, HEALTHY)
        assert serves(bridge)


RESULTS = """
local Svc = {}
function Svc:text(way)
  if way == 83 then return "\\255\\254" end
  if way == 84 then return coroutine.create(print) end
  if way == 85 then return ("x"):rep(64e6) end
  if way == 86 then return unpack({}, 1, 7000) end
  local deep = {}
  for _ = 1, 100000 do deep = { deep } end
  return deep
end
return Svc
"""
RESULTS_API = """
[[host_contract]]
name = "host.results"
version = "1.0"
[[host_contract.functions]]
name = "text"
params = [{ name = "way", type = "u32" }]
return = "StringView"
"""


@pytest.mark.parametrize("way", [83, 84, 85, 86, 87], ids=lambda way: f"C{way}")
def test_c83_c87_typed_results_of_all_kinds_are_typed_answers(
    bridge: LuaHostBridge, tmp_path: Path, level: str, way: int
) -> None:
    proxy = deploy_typed(bridge, tmp_path / "results", RESULTS_API, RESULTS, sandbox=level, memory="512MiB")
    try:
        value = proxy.text(way)
        assert way == 85 and value == "x" * 64_000_000
    except (HostContractCallFailed, TooLarge) as error:
        assert error.began == "yes" and ("text" in error.message or way == 85)


# -- other processes ----
FORK = "int fork(void); int vfork(void); int getpid(void); void _exit(int);"


def test_c41_fork_is_refused_and_answered_once(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("local n = ffi.cast('int *', out + 4) n[0] = ffi.C.fork() n[1] = ffi.errno()", FORK)
    for _ in range(5):
        assert returned(bridge, 2) == [-1, 1]
    with closing(worker_of(bridge, PROBE)) as worker:
        assert worker.is_alive


def test_c43_fork_is_refused_however_often(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("local n = ffi.cast('int *', out + 4) for _ = 1, 40 do n[0] = n[0] + ffi.C.fork() end", FORK)
    assert returned(bridge) == [-40]


def test_c44_closing_all_descriptors_harms_nobody_else(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("for fd = 0, 255 do ffi.C.close(fd) end", "int close(int);")
    for _ in range(20):
        try:
            assert bridge.call(PROBE, 1, None, 1, timeout=2) == bytes([42])
        except WorkerCrashed as error:
            assert error.began == "yes"
        assert serves(bridge)


def test_c44_closing_its_output_harms_only_what_it_prints(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("ffi.C.close(1) ffi.C.close(2) print('into nothing') io.stderr:write('x')", "int close(int);")
    assert returned(bridge, 0) == []
    assert serves(bridge)
    with closing(worker_of(bridge, PROBE)) as worker:
        assert worker.is_alive


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("for _ = 1, 20000 do print(('x'):rep(99)) end", id="C46-print"),
        pytest.param("io.write(('x'):rep(2e6))", id="C46-io.write"),
        pytest.param("io.stderr:write(('x'):rep(2e6))", id="C47-stderr"),
        pytest.param("local s = ('x'):rep(2e6) for _ = 1, 5 do ffi.C.write(1, s, #s) end", id="C46-write"),
        pytest.param("local s = ('x'):rep(2e6) for _ = 1, 5 do ffi.C.write(2, s, #s) end", id="C47-write"),
    ],
)
def test_c46_c47_floods_of_output_are_cut_and_the_call_returns(
    bridge: LuaHostBridge, contract: Thrower, body: str
) -> None:
    contract(body, "long write(int, const char *, size_t);")
    for _ in range(5):
        assert returned(bridge, 0) == []
        assert serves(bridge)
    with closing(worker_of(bridge, PROBE)) as worker:
        assert worker.is_alive


def test_c46_c47_endless_flood_is_late_as_any_other_loop(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract(
        "local s = ('x'):rep(65536) while true do ffi.C.write(1, s, #s) ffi.C.write(2, s, #s) end",
        "long write(int, const char *, size_t);",
    )
    late(bridge)


def test_c45_answer_before_a_crash_arrives(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("ffi.cast('int *', 0)[0] = 1")
    with ThreadPoolExecutor(2) as pool:
        for _ in range(30):
            answered = pool.submit(serves, bridge)
            crashed = pool.submit(failure, bridge, PROBE, 1)
            assert answered.result()
            assert isinstance(crashed.result(), WorkerCrashed)
            bridge.revive(PROBE)


def test_c48_killing_the_parent_is_refused(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract(
        "local n = ffi.cast('int *', out + 4) n[0] = ffi.C.kill(ffi.C.getppid(), 9) n[1] = ffi.errno()",
        "int kill(int, int); int getppid(void);",
    )
    with Processes.of(bridge) as service:
        assert returned(bridge, 2) == [-1, 1]
        assert service.worker_host.is_alive


@pytest.mark.parametrize(
    ("body", "values"),
    [
        pytest.param("n[0] = os.execute('exit 0') == 0 and 1 or -1", [-1], id="C50-os.execute"),
        pytest.param("n[0] = io.popen('true') and 1 or -1", [-1], id="C51-io.popen"),
        pytest.param(
            "local argv = ffi.new('char *[2]') n[0] = ffi.C.execve('/bin/true', argv, argv) n[1] = ffi.errno()",
            [-1, 1],
            id="C52-execve",
        ),
        pytest.param(
            "local argv = ffi.new('char *[2]', ffi.cast('char *', 'true')) "
            "n[0] = ffi.C.posix_spawn(n + 2, '/bin/true', nil, nil, argv, argv + 1)",
            [1],
            id="C53-posix_spawn",
        ),
    ],
)
def test_c50_c53_other_programs_are_refused(
    bridge: LuaHostBridge, contract: Thrower, body: str, values: list[int]
) -> None:
    contract(
        f"local n = ffi.cast('int *', out + 4) {body}",
        "int execve(const char *, char **, char **);"
        "int posix_spawn(int *, const char *, void *, void *, char **, char **);",
    )
    assert returned(bridge, len(values)) == values
    with closing(worker_of(bridge, PROBE)) as worker:
        assert worker.is_alive


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("n[0] = ffi.C.socket(1, 1, 0) n[1] = ffi.errno()", id="C40b-unix"),
        pytest.param("n[0] = ffi.C.socket(2, 1, 0) n[1] = ffi.errno()", id="C40b-tcp"),
        pytest.param("n[0] = ffi.C.connect(0, n, 16) n[1] = ffi.errno()", id="C40b-connect"),
        pytest.param("n[0] = ffi.C.bind(0, n, 16) n[1] = ffi.errno()", id="C40b-bind"),
    ],
)
def test_c40b_sockets_are_refused(bridge: LuaHostBridge, contract: Thrower, body: str) -> None:
    contract(
        f"local n = ffi.cast('int *', out + 4) {body}",
        "int socket(int, int, int); int connect(int, void *, int); int bind(int, void *, int);",
    )
    assert returned(bridge, 2) == [-1, errno.EPERM]


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param("n[0] = ffi.C.open('{secret}', 0) n[1] = ffi.errno()", id="C54-file"),
        pytest.param("n[0] = ffi.C.open('/proc/' .. ffi.C.getppid() .. '/mem', 2) n[1] = ffi.errno()", id="C54-memory"),
        pytest.param("n[0] = ffi.C.open('{secret}', 1) n[1] = ffi.errno()", id="C55-old"),
        pytest.param("n[0] = ffi.C.open('{secret}.new', 65, 384) n[1] = ffi.errno()", id="C55-new"),
        pytest.param(
            "n[0] = ffi.C.chdir('{run}') if n[0] == 0 then n[0] = ffi.C.open('{file}', 0) end n[1] = ffi.errno()",
            id="C56-file",
        ),
        pytest.param("n[0] = ffi.C.open('{run}', 0) n[1] = ffi.errno()", id="C56-directory"),
    ],
)
def test_c54_c56_files_are_out_of_reach(bridge: LuaHostBridge, contract: Thrower, tmp_path: Path, attempt: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    run = Path(run_directory(broker_pid(bridge)))
    file = next(path.name for path in run.rglob("*") if path.is_file() and path.parent == run)
    body = attempt.format(secret=secret, run=run, file=file)
    contract(
        f"local n = ffi.cast('int *', out + 4) {body}",
        "int open(const char *, int, ...); int chdir(const char *); int getppid(void);",
    )
    result, error = returned(bridge, 2)
    assert result == -1
    assert error in (errno.EACCES, errno.EPERM)
    assert secret.read_text() == "secret"
    assert os.listdir(tmp_path) == ["secret"]


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param("os.open({secret!r}, os.O_RDONLY)", id="C60-file"),
        pytest.param("os.fork()", id="C61-fork"),
        pytest.param("os.posix_spawn('/bin/true', ['true'], {{}})", id="C61-posix_spawn"),
        pytest.param("os.kill(os.getppid(), 9)", id="C61-kill"),
    ],
)
def test_c60_c61_python_through_ffi_may_only_what_lua_may(
    bridge: LuaHostBridge, contract: Thrower, tmp_path: Path, attempt: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    script = (
        f"import os\ntry:\n  {attempt.format(secret=str(secret))}\nexcept PermissionError:\n  pass\nelse:\n  1 / 0\n"
    )
    contract(
        f"local state = ffi.C.PyGILState_Ensure() "
        f"ffi.cast('int *', out + 4)[0] = ffi.C.PyRun_SimpleString([==[{script}]==]) ffi.C.PyGILState_Release(state)",
        "int PyGILState_Ensure(); void PyGILState_Release(int); int PyRun_SimpleString(const char *);",
    )
    assert returned(bridge) == [0]


def test_c59_python_builtins_are_not_there(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("return python.builtins")
    raised(bridge, "global 'python' (a nil value)")


def test_c58_python_is_not_there(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("error(tostring(python) .. tostring(package.loaded.python), 0)")
    raised(bridge, "nilnil")


# -- chunks that are no text ----
def test_c96_c97_bytecode_whole_or_cut_is_refused(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("local code = string.dump(function(a) return a + 1 end) out[1] = #code ffi.copy(out + 2, code)")
    reply = bridge.call(PROBE, 1, None, 250)
    bytecode = reply[2 : 2 + reply[1]]
    assert bytecode.startswith(b"\x1bLJ")
    for size in (1, 2, 3, 4, 5, 10, len(bytecode) // 2, len(bytecode) - 1, len(bytecode)):
        refused = refusal(bridge, bytecode[:size], "host.bytecode@1")
        assert isinstance(refused, VmRegistrationFailed)
    assert [str(each) for each in bridge.contracts() if str(each) == "host.bytecode@1"] == []


# -- answers ----
def test_c99_death_behind_an_answer_is_seen_by_nobody(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("ffi.C.ualarm(100000, 0)", "unsigned ualarm(unsigned, unsigned);")
    for _ in range(5):
        assert serves(bridge)
        with closing(worker_of(bridge, PROBE)) as worker:
            assert bridge.call(PROBE, 1, None, 1) == bytes([42])
            assert worker.ends_within()
        assert serves(bridge)


# Runs Python in the worker, as a contract with FFI can: it answers for a call on the worker's own connection.
FORGE = """
local own = tonumber(ffi.cast("uint64_t *", out - 128)[0])
local state = ffi.C.PyGILState_Ensure()
local failed = ffi.C.PyRun_SimpleString(([[
import gc, socket
from luacell.protocol.headers import DONE, Op, head
from luacell.protocol.zmtp import frame
sockets = [each for each in gc.get_objects() if isinstance(each, socket.socket)]
(stream,) = [each for each in sockets if each.type == socket.SOCK_STREAM]
stream.sendall(frame(head(Op.DONE) + DONE.pack(%d + %d, 0, 1, 0, 0)))
]]):format(own, args[0]))
ffi.C.PyGILState_Release(state)
if failed ~= 0 then error("the forger itself failed") end
if args[0] > 0 then while true do end end
"""


def test_c100_answer_for_another_call_costs_the_forger(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract(FORGE, "int PyGILState_Ensure(); void PyGILState_Release(int); int PyRun_SimpleString(const char *);")
    assert serves(bridge)
    crashed = crash(bridge, args=b"\1")
    assert crashed.signal == signal.SIGKILL
    assert "it answered for call" in crashed.message


def test_c100_second_answer_costs_the_forger_and_the_next_call_nothing(
    bridge: LuaHostBridge, contract: Thrower
) -> None:
    contract(FORGE, "int PyGILState_Ensure(); void PyGILState_Release(int); int PyRun_SimpleString(const char *);")
    for _ in range(5):
        assert serves(bridge)
        with closing(worker_of(bridge, PROBE)) as worker:
            try:
                bridge.call(PROBE, 1, b"\0", 1)
            except CallError as error:
                assert error.code == AbiErrorCode.WORKER_CRASHED
            assert worker.ends_within()
        assert serves(bridge)
