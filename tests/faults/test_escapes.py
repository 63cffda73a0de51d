"""Escapes from the sandbox: what a contract tries in order to reach what is not its own, by every route it has.

Raw contracts try by three: a function of the C library through FFI, the bare system call, and Python through FFI. Each
attempt must be refused without an exception and without harm to the worker; what a contract needs must still work.
Typed contracts at `untrusted` have none of these routes; they try to get one back.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from luacell.client import BadRequest, HostContractCallFailed, LuaHostBridge, VmRegistrationFailed, WorkerCrashed
from luacell.worker.process import DESCRIPTORS_MAX
from tests.support.contracts import PROBE, deploy
from tests.support.processes import worker_of
from tests.support.serving import Serving

C_MODULES = [Path("/usr/lib/x86_64-linux-gnu/lua/5.1") / name for name in ("cjson.so", "lpeg.so")]
REFUSALS = {errno.EPERM, errno.EACCES, errno.ENOSYS}
MISSING = -1  # this C library has no such function
SUCCEEDED = 0

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filters are written for x86-64")


@dataclass(frozen=True)
class Probe:
    """One attempt.

    Attributes:
        number: of the system call.
        arguments: Lua numbers and texts for it; `parent` and `me` are process ids.
        function: a call of the C library that comes to it, or "".
        declaration: of that function.
        python: an expression of Python that comes to it, or "" for the bare call by ctypes.
        levels: those that refuse it.
    """

    number: int
    arguments: str = ""
    function: str = ""
    declaration: str = ""
    python: str = ""
    levels: tuple[str, ...] = ("default", "hardened")


HARDENED_ONLY = ("hardened",)
PROBES = {
    "fork": Probe(57, "", "fork()", "int fork(void);", "os.fork()"),
    "vfork": Probe(58),
    "clone": Probe(56, "17, nil, nil, nil, nil"),
    "clone of a thread": Probe(56, "0x10f00, nil, nil, nil, nil"),
    "clone3": Probe(435, "nil, ffi.cast('long', 0)"),
    "execve": Probe(
        59,
        "'/bin/true', nil, nil",
        "execve('/bin/true', nil, nil)",
        "int execve(const char *, void *, void *);",
        "os.execv('/bin/true', ['true'])",
    ),
    "execveat": Probe(322, "-100, '/bin/true', nil, nil, 0"),
    "posix_spawn": Probe(59, "'/bin/true', nil, nil", "", "", "os.posix_spawn('/bin/true', ['true'], {})"),
    "ptrace": Probe(
        101, "16, parent, nil, nil", "ptrace(16, parent, nil, nil)", "long ptrace(long, int, void *, void *);"
    ),
    "process_vm_readv": Probe(
        310,
        "parent, nil, 0, nil, 0, 0",
        "process_vm_readv(parent, nil, 0, nil, 0, 0)",
        "long process_vm_readv(int, void *, long, void *, long, long);",
    ),
    "pidfd_open": Probe(434, "parent, 0", "", "", "os.pidfd_open(os.getppid())", HARDENED_ONLY),
    "pidfd_getfd": Probe(438, "0, 0, 0"),
    "socket": Probe(
        41, "1, 1, 0", "socket(1, 1, 0)", "int socket(int, int, int);", "__import__('socket').socket(1, 1)"
    ),
    "connect": Probe(42, "0, nil, 0", "connect(0, nil, 0)", "int connect(int, void *, unsigned);"),
    "bind": Probe(49, "0, nil, 0", "bind(0, nil, 0)", "int bind(int, void *, unsigned);"),
    "open": Probe(
        2, "'/etc/passwd', 0", "open('/etc/passwd', 0)", "int open(const char *, int, ...);", "open('/etc/passwd')"
    ),
    "openat": Probe(257, "-100, '/etc/passwd', 0", "", "", "os.open('/etc/passwd', os.O_RDONLY)"),
    "openat2": Probe(437, "-100, '/etc/passwd', how, 24"),
    "memfd_create": Probe(
        319,
        "'x', 0",
        "memfd_create('x', 0)",
        "int memfd_create(const char *, unsigned);",
        "os.memfd_create('x')",
    ),
    "io_uring_setup": Probe(425, "1, nil"),
    "userfaultfd": Probe(323, "0"),
    "bpf": Probe(321, "0, nil, 0"),
    "perf_event_open": Probe(298, "nil, 0, -1, -1, 0"),
    "mount": Probe(
        165,
        "'none', '/tmp', 'tmpfs', 0, nil",
        "mount('none', '/tmp', 'tmpfs', 0, nil)",
        "int mount(const char *, const char *, const char *, unsigned long, const void *);",
    ),
    "unshare": Probe(272, "0x10000000", "unshare(0x10000000)", "int unshare(int);"),
    "setns": Probe(308, "0, 0", "setns(0, 0)", "int setns(int, int);"),
    "keyctl": Probe(250, "0, -3, 1"),
    "kill": Probe(62, "parent, 0", "kill(parent, 0)", "int kill(int, int);", "os.kill(os.getppid(), 0)"),
    "kill the own group": Probe(62, "0, 0", "kill(0, 0)", "int kill(int, int);", "os.killpg(0, 0)"),
    "tgkill of another": Probe(234, "parent, parent, 0", "tgkill(parent, parent, 0)", "int tgkill(int, int, int);"),
    "chdir": Probe(80, "'/'", "chdir('/')", "int chdir(const char *);", "os.chdir('/')"),
    "chmod": Probe(90, "'/tmp', 511", "chmod('/tmp', 511)", "int chmod(const char *, int);", "os.chmod('/tmp', 0o777)"),
    "unlink": Probe(87, "'/etc/passwd-'", "unlink('/etc/passwd-')", "int unlink(const char *);"),
    "prctl to be looked into": Probe(157, "4, 1, 0, 0, 0", "prctl(4, 1)", "int prctl(int, ...);"),
    "shmget": Probe(29, "0, 4096, 0x3b6", "shmget(0, 4096, 0x3b6)", "int shmget(int, size_t, int);"),
    "shmat": Probe(30, "0, nil, 0", "shmat(0, nil, 0)", "long shmat(int, void *, int);"),
    "shmctl": Probe(31, "0, 13, nil"),
    "semctl": Probe(66, "0, 0, 12, 0"),
    "semop": Probe(65, "0, nil, 1"),
    "msgrcv": Probe(70, "0, nil, 0, 0, 2048"),
    "mq_unlink": Probe(241, "'luacell-escape'"),
}
OTHER = "host.other@1"
ROUTES = ("function", "syscall", "python")

SOURCE = """
local ffi = require("ffi")
ffi.cdef [[
long syscall(long, ...);
int getpid(void);
int getppid(void);
void _exit(int);
int PyGILState_Ensure(void);
void PyGILState_Release(int);
int PyRun_SimpleString(const char *);
{declarations}
]]
local C = ffi.C
local parent, me = C.getppid(), C.getpid()
local how = ffi.new("uint64_t[3]")
local function told(outcome)
  local number = ffi.errno()
  if C.getpid() ~= me then C._exit(0) end -- a child that must not be
  return tonumber(outcome) == -1 and number or 0
end
local function word(value)
  if type(value) == "number" then return ffi.cast("long", value) end
  if value == nil then return ffi.cast("long", 0) end
  return value
end
local function bare(number, count, ...)
  local words = {{}}
  for index = 1, count do words[index] = word((select(index, ...))) end
  return told(C.syscall(number, unpack(words, 1, count)))
end
local result = ffi.new("int[1]")
local function python(text)
  result[0] = -2
  local address = string.format("%d", tonumber(ffi.cast("uintptr_t", result)))
  local code = "import ctypes, os\\nlibc = ctypes.CDLL(None, use_errno=True)\\nme = os.getpid()\\n" ..
    "def bare(*words):\\n  libc.syscall.restype = ctypes.c_long\\n" ..
    "  if libc.syscall(*(ctypes.c_long(w) if isinstance(w, int) else w for w in words)) == -1:\\n" ..
    "    raise OSError(ctypes.get_errno(), '')\\n" ..
    "try:\\n  " .. text .. "\\n  outcome = 0\\nexcept OSError as error:\\n  outcome = error.errno\\n" ..
    "if os.getpid() != me: os._exit(0)\\n" ..
    "ctypes.c_int.from_address(" .. address .. ").value = outcome\\n"
  local state = C.PyGILState_Ensure()
  C.PyRun_SimpleString(code)
  C.PyGILState_Release(state)
  return result[0]
end
local attempts = {{
{attempts}
}}
return function(fn_id, args, out) ffi.cast("int *", out)[0] = attempts[fn_id]() end
"""


def _in_python(probe: Probe) -> str:
    if probe.python:
        return probe.python
    words = probe.arguments.replace("nil", "0").replace("parent", "os.getppid()").replace("how", "bytes(24)")
    words = words.replace("ffi.cast('long', 0)", "0")
    words = ", ".join(f"b{word}" if word.startswith("'") else word for word in words.split(", ") if word)
    return f"bare({', '.join(filter(None, (str(probe.number), words)))})"


def _attempt(probe: Probe, route: str) -> str:
    if route == "function":
        return f"function() return told(C.{probe.function}) end" if probe.function else "function() return -1 end"
    if route == "syscall":
        count = len(probe.arguments.split(", ")) if probe.arguments else 0
        words = f", {probe.arguments}" if count else ""
        return f"function() return bare({probe.number}, {count}{words}) end"
    return f"function() return python({json.dumps(_in_python(probe))}) end"


def _source() -> str:
    declarations = "\n".join(dict.fromkeys(probe.declaration for probe in PROBES.values()))
    attempts = [_attempt(probe, route) for probe in PROBES.values() for route in ROUTES]
    numbered = ",\n".join(f"[{index}] = {attempt}" for index, attempt in enumerate(attempts))
    return SOURCE.format(declarations=declarations, attempts=numbered)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LuaHostBridge]:
    options = [word for path in C_MODULES if path.exists() for word in ("--c-module", str(path))]
    with (
        Serving(tmp_path_factory.mktemp("service") / "run", *options) as service,
        LuaHostBridge.connect(service.run_directory) as bridge,
    ):
        yield bridge


@pytest.fixture(scope="module", params=["default", "hardened"])
def level(request: pytest.FixtureRequest, serving: LuaHostBridge) -> Iterator[str]:
    """The probes are deployed at this level."""
    deploy(serving, _source(), PROBE, sandbox=request.param, deadline="10s")
    yield request.param
    serving.unregister_host_contract(PROBE)


ALSO = {  # rows of the catalogue that an attempt belongs to besides S12
    **dict.fromkeys(("socket", "connect", "bind"), "C40b"),
    "fork": "C41",
    "kill": "C48",
    "execve": "C52",
    "posix_spawn": "C53",
    "chdir": "C56",
}
BY_PYTHON = {"open": "C60", "openat": "C60", "execve": "C61", "posix_spawn": "C61"}


def _named(name: str, route: str) -> str:
    rows = ["S12", ALSO.get(name), BY_PYTHON.get(name) if route == "python" else None]
    return f"{'_'.join(filter(None, rows))}_{name}-{route}"


@pytest.mark.parametrize(
    ("name", "route"), [pytest.param(name, route, id=_named(name, route)) for name in PROBES for route in ROUTES]
)
def test_s12_attempt_is_refused(serving: LuaHostBridge, level: str, name: str, route: str) -> None:
    probe = PROBES[name]
    fn_id = list(PROBES).index(name) * len(ROUTES) + ROUTES.index(route)
    outcome = int.from_bytes(serving.call(PROBE, fn_id, None, 4), "little", signed=True)
    if route == "function" and not probe.function:
        assert outcome == MISSING
    elif level in probe.levels:
        assert outcome in REFUSALS, errno.errorcode.get(outcome, str(outcome))
    else:  # it reaches nobody else
        assert outcome == SUCCEEDED


# -- what must still work ----
def test_s12_hardened_contracts_have_c_modules_and_their_own(serving: LuaHostBridge, tmp_path: Path) -> None:
    present = [path for path in C_MODULES if path.exists()]
    uses = "".join(f" .. type(require('{path.stem}'))" for path in present)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "words.lua").write_text("return { word = 'own' }")
    (tmp_path / "main.lua").write_text(
        "local ffi, words = require('ffi'), require('own.words')\n"
        f"local text = words.word{uses}\n"
        "return function(fn_id, args, out) ffi.copy(out, text .. os.date('!%Y', 0)) end"
    )
    (tmp_path / "luacell.toml").write_text('[contract."host.modules@1"]\nsource = "main.lua"\nsandbox = "hardened"\n')
    serving.deploy(tmp_path)
    assert serving.call("host.modules@1", 0, None, 32).rstrip(b"\0").decode() == "own" + "table" * len(present) + "1970"
    serving.unregister_host_contract("host.modules@1")


@pytest.mark.parametrize("module", ["cjson.nothing", "socket", "own.nothing"])
def test_s12_hardened_contract_is_told_which_module_it_lacks(serving: LuaHostBridge, module: str) -> None:
    with pytest.raises(VmRegistrationFailed, match=f"no C module '{module}' among those of the worker host"):
        deploy(serving, f"require('{module}') return function() end", OTHER, sandbox="hardened")


LUA_ATTEMPTS = {
    "C50": "os.execute('true') == 0 or os.execute('true') == true",
    "C51": "io.popen('true')",
    "C54_a secret file": "io.open('/etc/passwd')",
    "C54_own memory": "io.open('/proc/self/mem', 'r')",
    "C54_another's memory": "io.open('/proc/1/environ')",
    "C55_write": "io.open('/tmp/luacell-escape', 'w')",
    "C55_write beside the libraries": "io.open('/usr/lib/luacell-escape', 'w')",
    "C55_temporary file": "io.tmpfile()",
    "C55_remove": "os.remove('/etc/passwd-')",
    "C55_rename": "os.rename('/etc/passwd-', '/tmp/luacell-escape')",
    "C56_the registry": "io.open('{run}/state/registry.db')",
    "C56_the run directory": "io.open('{run}/broker.lock', 'a')",
    "C58_python": "python or package.loaded.python",
    "C59_python by require": "(pcall(require, 'python'))",
    "S11_the environment": "os.getenv('PATH') or os.getenv('HOME')",
}


@pytest.fixture(scope="module", params=["default", "hardened"])
def evaluate(request: pytest.FixtureRequest, serving: LuaHostBridge) -> Iterator[str]:
    """A contract of this level that says whether what it is given is true."""
    source = (
        "local ffi = require('ffi') return function(size, args, out) "
        "local chunk = assert(loadstring('return ' .. ffi.string(args, size))) out[0] = chunk() and 1 or 0 end"
    )
    deploy(serving, source, "host.evaluate@1", sandbox=request.param)
    yield request.param
    serving.unregister_host_contract("host.evaluate@1")


@pytest.mark.usefixtures("evaluate")
@pytest.mark.parametrize("name", LUA_ATTEMPTS)
def test_lua_library_gets_nowhere(serving: LuaHostBridge, name: str) -> None:
    broker = int(serving.health()["broker_pid"])
    words = Path(f"/proc/{broker}/cmdline").read_bytes().split(b"\0")
    text = LUA_ATTEMPTS[name].replace("{run}", os.fsdecode(words[words.index(b"--run-dir") + 1])).encode()
    assert serving.call("host.evaluate@1", len(text), text, 1) == b"\0"
    assert not Path("/tmp/luacell-escape").exists()


def test_s12_worker_may_open_no_more_than_it_began_with(serving: LuaHostBridge) -> None:
    deploy(serving, "return function() end", OTHER)
    with closing(worker_of(serving, OTHER)) as worker:
        limits = Path(f"/proc/{worker.pid}/limits").read_text().splitlines()
    soft, hard = next(line for line in limits if line.startswith("Max open files")).split()[3:5]
    assert soft == hard == str(DESCRIPTORS_MAX)
    serving.unregister_host_contract(OTHER)


def test_s13_workers_leave_no_core(serving: LuaHostBridge) -> None:
    deploy(serving, "return function() require('ffi').cast('int *', 0)[0] = 1 end", OTHER)
    with closing(worker_of(serving, OTHER)) as worker:
        limits = Path(f"/proc/{worker.pid}/limits").read_text().splitlines()
    assert next(line for line in limits if line.startswith("Max core file size")).split()[4:6] == ["0", "0"]
    with pytest.raises(WorkerCrashed) as crashed:
        serving.call(OTHER, 0)
    assert crashed.value.signal == signal.SIGSEGV
    serving.unregister_host_contract(OTHER)


# -- untrusted ----
API = """
[[host_contract]]
name = "host.untrusted"
version = "1.0.0"
[[host_contract.functions]]
name = "run"
params = [{ name = "text", type = "StringView" }, { name = "wide", type = "u64" }, { name = "place", type = "Ptr" }]
return = "StringView"
"""
RUNNER = """
local M = {}
function M:run(text, wide, place)
  local chunk, problem = load(text, "=text", "t")
  if not chunk then return "refused: " .. problem end
  given, spot, me = wide, place, self
  local fine, value = pcall(chunk)
  return (fine and "" or "raised: ") .. tostring(value)
end
return M
"""
# Each must give nil or false, or raise: ways to FFI, to memory, to files and to our own functions.
WAYS_OUT = {
    **{name: f"return {name}" for name in ("ffi", "io", "debug", "jit", "python", "newproxy", "module", "dofile")},
    **{name: f"return {name}" for name in ("loadfile", "getfenv", "setfenv", "string.dump", "string.buffer")},
    **{f"os.{name}": f"return os.{name}" for name in ("execute", "exit", "getenv", "remove", "rename", "tmpname")},
    "os.setlocale": "return os.setlocale",
    **{f"package.{name}": f"return package.{name}" for name in ("loadlib", "loaders", "preload", "cpath", "seeall")},
    **{
        f"require {name}": f"return (pcall(require, '{name}'))"
        for name in (
            *("ffi", "io", "debug", "jit", "jit.util", "jit.opt", "jit.profile", "string.buffer", "package", "python"),
            *("cjson", "lpeg", "re", "lupa", "jit.v", "jit.dump", "jit.p", "jit.zone"),
        )
    },
    **{
        f"package.loaded {name}": f"return package.loaded['{name}']"
        for name in ("ffi", "io", "debug", "jit", "jit.util", "string.buffer", "package", "python")
    },
    "globals by another name": "return _G.ffi or rawget(_G, 'ffi') or rawget(_G, 'debug') or _G._G.io",
    "the string metatable": "return getmetatable('').__index.dump or ('').dump",
    "the globals' metatable": "return getmetatable(_G)",
    "the api's metatable": "return getmetatable(luacell)",
    "bytecode": r"return (load('\27LJ\2\2\5'))",
    "bytecode by a reader": r"local n = 0 return (load(function() n = n + 1 return n<2 and '\27LJ\2\2\5' or nil end))",
    "bytecode by its mode": r"return (load('\27LJ\2\2\5', 'x', 'b'))",
    "bytecode by both modes": r"return (load('\27LJ\2\2\5', 'x', 'bt'))",
    "bytecode by loadstring": r"return (loadstring('\27LJ\2\2\5'))",
    "an integer's metatable": "return type(getmetatable(1LL)) == 'table'",
    "a given integer's metatable": "return type(getmetatable(given)) == 'table'",
    "a pointer that reads": "return spot[0]",
    "a pointer that writes": "spot[0] = 1 return true",
    "a pointer's fields": "return spot.cast or spot.cdef",
    "an integer that is called": "return given()",
    "an integer as a constructor": "return (1LL).new or getmetatable(1ULL).cast",
    "a complex number that is written": "local z = 1i z[0] = 7 return true",
    "a complex number out of bounds": "local z = 3i return z[1000] ~= z[0]",
    "its own metatable for integers": "return setmetatable(1LL, {})",
    "a coroutine's environment": "return coroutine.wrap(function() return ffi or debug end)()",
    "what raises in ours": "return select(2, pcall(luacell.fail, {})).cast",
    "arguments of its chunk": "return (...)",
}
WALK = """
local seen, found = {}, {}
local wanted = { cdef = 1, cast = 1, popen = 1, getregistry = 1, getinfo = 1, funck = 1, loadlib = 1, dump = 1,
  attach = 1, execute = 1, getfenv = 1, reserve = 1, set_typed_target = 1, execute_ = 1, deliver = 1, tail = 1 }
local function walk(value, path)
  local kind = type(value)
  if kind == "userdata" or kind == "thread" then found[#found + 1] = path .. " is a " .. kind end
  if kind == "cdata" and not tostring(value):match("^%-?[%d.]+U?L?L?$") then found[#found + 1] = path .. " is cdata" end
  if kind ~= "table" or seen[value] then return end
  seen[value] = true
  for key, each in next, value do
    if wanted[key] then found[#found + 1] = path .. "." .. key end
    walk(key, path .. "[key]")
    walk(each, path .. "." .. tostring(key))
  end
  walk(getmetatable(value), path .. "[metatable]")
end
walk(_G, "_G")
walk(getmetatable(""), "string")
walk(me, "self")
return table.concat(found, ", ")
"""


@pytest.fixture(scope="module")
def untrusted(serving: LuaHostBridge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LuaHostBridge]:
    directory = tmp_path_factory.mktemp("untrusted")
    (directory / "api.toml").write_text(API)
    (directory / "run.lua").write_text(RUNNER)
    (directory / "own.lua").write_text("return { name = ..., same = require('own2') }")
    (directory / "own2.lua").write_text("package.loaded.own2 = 7")
    (directory / "luacell.toml").write_text(
        'api = "api.toml"\n[contract."host.untrusted"]\nsource = "run.lua"\nsandbox = "untrusted"\n'
    )
    serving.deploy(directory)
    yield serving
    serving.unregister_host_contract("host.untrusted@1")


def run(bridge: LuaHostBridge, text: str) -> str:
    return str(bridge.contract("host.untrusted@1").run(text, (1 << 64) - 1, 4096))


@pytest.mark.parametrize("name", WAYS_OUT)
def test_s12u_untrusted_contract_finds_no_way_out(untrusted: LuaHostBridge, name: str) -> None:
    answer = run(untrusted, WAYS_OUT[name])
    assert answer in ("nil", "false") or answer.startswith("raised: "), answer


def test_s12u_untrusted_contract_reaches_nothing_but_lua(untrusted: LuaHostBridge) -> None:
    assert run(untrusted, WALK) == ""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("return 1 + 1", "2"),
        ("return require('own').name .. require('own').same", "own7"),
        ("return type(os.time()) .. type(os.clock()) .. os.date('!%Y', 0) .. os.difftime(2, 1)", "numbernumber19701"),
        ("return #require('table.new')(4, 0)", "0"),
        ("return load('return ...')(3) .. loadstring('return 4')()", "34"),
        ("return load('return x', 'x', 't', { x = 5 })()", "5"),
        ("return (('x'):rep(3)):upper()", "XXX"),
        ("return tostring(given)", "18446744073709551615ULL"),
        ("return bit.band(7, 2) .. math.floor(2.5) .. table.concat({1, 2})", "2212"),
        ("return select(2, pcall(luacell.deadline)) > 0", "true"),
    ],
)
def test_s12u_untrusted_contract_has_what_is_harmless(untrusted: LuaHostBridge, text: str, answer: str) -> None:
    assert run(untrusted, text) == answer


def test_s12u_untrusted_contract_fails_as_others_do(untrusted: LuaHostBridge) -> None:
    with pytest.raises(HostContractCallFailed, match="no words"):
        run(untrusted, "return setmetatable({}, { __tostring = function() error('no words') end })")


def test_s12u_raw_contract_cannot_be_untrusted(serving: LuaHostBridge) -> None:
    with pytest.raises(BadRequest, match="typed contracts only: raw ones need FFI"):
        deploy(serving, "return function() end", OTHER, sandbox="untrusted")
