"""What the sandbox refuses, what it leaves working, and that its filter says so before any kernel is asked.

The pure half judges the filter with a small interpreter. The other half confines real processes: each test
runs a script of its own in a fresh interpreter, because a filter can never be taken off again.
"""

import errno
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from luacell.client import LuaHostBridge
from luacell.worker.sandbox import attributes, bpf, seccomp
from luacell.worker.sandbox.attributes import SandboxUnavailable
from luacell.worker.sandbox.bpf import ALLOW, KILL_PROCESS, PRETENDED, REFUSED, UNKNOWN
from luacell.worker.sandbox.calls import (
    ALLOW_LIST,
    CONNECTIONS,
    DEFAULT_FILTER,
    DENIED,
    DENY_LIST,
    HARDENED_FILTER,
    NETWORK_DENY_LIST,
    NETWORK_FILTER,
)
from tests.support.children import child_process

OWN_PID = 4321
STRANGER = 4322
TIME_LIMIT_S = 30
STACK_SIZE = 64 << 20

CLONE_THREAD = 0x0001_0000
CLONE_NEWNET = 0x4000_0000
# What glibc asks for: VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID.
GLIBC_THREAD = 0x003D_0F00
AUDIT_ARCH_I386 = 0x4000_0003
X32 = 0x4000_0000

needs_x86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter is written for x86-64")


# The filter, judged without a kernel.


def judge(program: bytes, number: int, *arguments: int, arch: int = bpf.AUDIT_ARCH_X86_64) -> int:
    """Run a filter as the kernel would, and return its verdict."""
    words = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = number.to_bytes(4, "little") + arch.to_bytes(4, "little") + bytes(8)
    data += b"".join((word % (1 << 64)).to_bytes(8, "little") for word in words)
    accumulator, position = 0, 0
    while True:
        code, if_so, if_not, operand = bpf.INSTRUCTION.unpack_from(program, 8 * position)
        position += 1
        match code:
            case 0x20:
                accumulator = int.from_bytes(data[operand : operand + 4], "little")
            case 0x54:
                accumulator &= operand
            case 0x15:
                position += if_so if accumulator == operand else if_not
            case 0x35:
                position += if_so if accumulator >= operand else if_not
            case 0x06:
                return int(operand)
            case _:
                raise AssertionError(f"instruction {position - 1} has the unknown code {code:#x}")


@pytest.fixture(scope="module")
def program() -> bytes:
    return DEFAULT_FILTER.program(OWN_PID)


def test_program_is_short_enough_for_the_kernel(program: bytes) -> None:
    assert len(program) % 8 == 0
    assert 0 < len(program) // 8 < 4096


@pytest.mark.parametrize(
    ("number", "arguments", "verdict"),
    [
        pytest.param(57, (), REFUSED, id="fork"),
        pytest.param(58, (), REFUSED, id="vfork"),
        pytest.param(59, (), REFUSED, id="execve"),
        pytest.param(435, (), UNKNOWN, id="clone3"),
        pytest.param(56, (GLIBC_THREAD,), REFUSED, id="clone of a thread"),
        pytest.param(56, (int(signal.SIGCHLD),), REFUSED, id="clone as fork does"),
        pytest.param(56, (0x4000 | 0x100 | int(signal.SIGCHLD),), REFUSED, id="clone as vfork does"),
        pytest.param(56, (GLIBC_THREAD | CLONE_NEWNET,), REFUSED, id="clone of a thread in a new namespace"),
        pytest.param(56, (CLONE_THREAD << 32,), REFUSED, id="clone with a flag where the kernel ignores it"),
        pytest.param(62, (OWN_PID, 9), ALLOW, id="kill oneself"),
        pytest.param(62, (OWN_PID | 7 << 32, 9), ALLOW, id="kill oneself, with rubbish in the upper half"),
        pytest.param(62, (STRANGER, 0), REFUSED, id="kill a stranger"),
        pytest.param(62, (OWN_PID << 32 | STRANGER, 9), REFUSED, id="kill a stranger in disguise"),
        pytest.param(62, (0, 9), REFUSED, id="kill the own group"),
        pytest.param(62, (-1, 9), REFUSED, id="kill everybody"),
        pytest.param(62, (-OWN_PID, 9), REFUSED, id="kill the group of the same number"),
        pytest.param(62, (OWN_PID | 1 << 16, 9), REFUSED, id="kill a pid equal in 16 bits"),
        pytest.param(200, (OWN_PID, 6), REFUSED, id="tkill"),
        pytest.param(234, (OWN_PID, 99, 6), ALLOW, id="tgkill an own thread"),
        pytest.param(234, (STRANGER, OWN_PID, 6), REFUSED, id="tgkill a stranger's thread"),
        pytest.param(129, (OWN_PID,), ALLOW, id="queue a signal to oneself"),
        pytest.param(129, (STRANGER,), REFUSED, id="queue a signal to a stranger"),
        pytest.param(297, (OWN_PID,), ALLOW, id="queue a signal to an own thread"),
        pytest.param(297, (STRANGER,), REFUSED, id="queue a signal to a stranger's thread"),
        pytest.param(302, (0, 0), ALLOW, id="own limits"),
        pytest.param(302, (OWN_PID, 0), ALLOW, id="own limits by pid"),
        pytest.param(302, (STRANGER, 0), REFUSED, id="a stranger's limits"),
        pytest.param(157, (1, 0), REFUSED, id="prctl to outlive the parent"),
        pytest.param(157, (4, 1), REFUSED, id="prctl to be looked into"),
        pytest.param(9, (0, 4096, 3, 0x22), ALLOW, id="mmap of private memory"),
        pytest.param(9, (0, 4096, 3, 0x01), ALLOW, id="mmap of a shared file"),
        pytest.param(9, (0, 4096, 3, 0x21), REFUSED, id="mmap of memory shared with nobody"),
        pytest.param(9, (0, 4096, 3, 0x8023), REFUSED, id="mmap of the same, with flags checked"),
        pytest.param(9, (0, 4096, 3, 0x122), REFUSED, id="mmap of memory that grows like a stack"),
        pytest.param(9, (0, 4096, 3, 0x102), REFUSED, id="mmap of a file that does"),
        pytest.param(142, (STRANGER,), PRETENDED, id="sched_setparam"),
        pytest.param(203, (STRANGER,), REFUSED, id="a stranger's processors"),
        pytest.param(157, (15,), ALLOW, id="prctl to name a thread"),
        pytest.param(72, (3, 8, STRANGER), REFUSED, id="fcntl F_SETOWN"),
        pytest.param(72, (3, 15), REFUSED, id="fcntl F_SETOWN_EX"),
        pytest.param(72, (3, 4), ALLOW, id="fcntl F_SETFL"),
        pytest.param(16, (3, 0x8901), REFUSED, id="ioctl FIOSETOWN"),
        pytest.param(16, (3, 0x8902), REFUSED, id="ioctl SIOCSPGRP"),
        pytest.param(16, (0, 0x5412 | 1 << 32), REFUSED, id="ioctl TIOCSTI, with rubbish in the upper half"),
        pytest.param(16, (0, 0x541C), REFUSED, id="ioctl TIOCLINUX"),
        pytest.param(16, (0, 0x5401), ALLOW, id="ioctl TCGETS"),
        pytest.param(bpf.FIRST_UNKNOWN_NUMBER - 2, (), ALLOW, id="one of the newest known calls"),
        pytest.param(bpf.FIRST_UNKNOWN_NUMBER, (), UNKNOWN, id="the first unknown call"),
        pytest.param(X32, (), UNKNOWN, id="read of the x32 ABI"),
        pytest.param(X32 | 57, (), UNKNOWN, id="fork of the x32 ABI"),
        pytest.param(0xFFFF_FFFF, (), UNKNOWN, id="the largest number"),
    ],
)
def test_verdict(program: bytes, number: int, arguments: tuple[int, ...], verdict: int) -> None:
    assert judge(program, number, *arguments) == verdict


@pytest.mark.parametrize("arch", [AUDIT_ARCH_I386, 0xC000_00B7, 0])
@pytest.mark.parametrize("number", [0, 1, 20, 57, 500])
def test_calls_of_another_architecture_kill(program: bytes, arch: int, number: int) -> None:
    assert judge(program, number, arch=arch) == KILL_PROCESS


@pytest.mark.parametrize("arguments", [(), (OWN_PID,) * 6, (-1,) * 6])
def test_denied_calls_are_refused_whatever_their_arguments(program: bytes, arguments: tuple[int, ...]) -> None:
    for group in (*DENIED.values(), CONNECTIONS):
        for name, number in group.items():
            assert judge(program, number, *arguments) == REFUSED, name


def test_calls_that_no_rule_names_are_allowed_by_default_and_refused_when_hardened(program: bytes) -> None:
    hardened = HARDENED_FILTER.program(OWN_PID)
    for number in set(range(bpf.FIRST_UNKNOWN_NUMBER)) - {rule.number for rule in DENY_LIST}:
        assert judge(program, number, OWN_PID) == ALLOW, number
    for number in set(range(bpf.FIRST_UNKNOWN_NUMBER)) - {rule.number for rule in ALLOW_LIST}:
        assert judge(hardened, number, OWN_PID) == REFUSED, number


def test_what_is_hardened_allows_nothing_that_the_default_denies(program: bytes) -> None:
    hardened = HARDENED_FILTER.program(OWN_PID)
    for number in range(bpf.FIRST_UNKNOWN_NUMBER):
        for arguments in ((), (OWN_PID,), (STRANGER,), (0, 8), (1,), (16,), (3, 1), (3, 0x8901)):
            if judge(hardened, number, *arguments) == ALLOW:
                assert judge(program, number, *arguments) == ALLOW, number


@pytest.mark.parametrize(
    ("number", "arguments", "verdict"),
    [
        pytest.param(0, (), ALLOW, id="read"),
        pytest.param(9, (0, 4096, 3, 0x22), ALLOW, id="mmap of private memory"),
        pytest.param(9, (0, 4096, 3, 0x01), ALLOW, id="mmap of a shared file"),
        pytest.param(9, (0, 4096, 3, 0x21), REFUSED, id="mmap of memory shared with nobody"),
        pytest.param(9, (0, 4096, 3, 0x122), REFUSED, id="mmap of memory that grows like a stack"),
        pytest.param(2, (), REFUSED, id="open"),
        pytest.param(257, (), REFUSED, id="openat"),
        pytest.param(437, (), REFUSED, id="openat2"),
        pytest.param(319, (), REFUSED, id="memfd_create"),
        pytest.param(262, (), REFUSED, id="newfstatat"),
        pytest.param(435, (), UNKNOWN, id="clone3"),
        pytest.param(144, (), PRETENDED, id="sched_setscheduler"),
        pytest.param(62, (OWN_PID,), ALLOW, id="kill oneself"),
        pytest.param(62, (STRANGER,), REFUSED, id="kill a stranger"),
        pytest.param(72, (3, 3), ALLOW, id="fcntl F_GETFL"),
        pytest.param(72, (3, 0), REFUSED, id="fcntl F_DUPFD"),
        pytest.param(157, (15,), ALLOW, id="prctl to name a thread"),
        pytest.param(157, (22,), REFUSED, id="prctl PR_SET_SECCOMP"),
        pytest.param(16, (), REFUSED, id="ioctl"),
    ],
)
def test_verdict_when_hardened(number: int, arguments: tuple[int, ...], verdict: int) -> None:
    assert judge(HARDENED_FILTER.program(OWN_PID), number, *arguments) == verdict


@pytest.mark.parametrize(
    ("number", "arguments", "verdict"),
    [
        pytest.param(41, (2,), ALLOW, id="socket of IPv4"),
        pytest.param(41, (10,), ALLOW, id="socket of IPv6"),
        pytest.param(41, (1,), REFUSED, id="unix socket"),
        pytest.param(41, (16,), REFUSED, id="netlink socket"),
        pytest.param(41, (17,), REFUSED, id="packet socket"),
        pytest.param(42, (), ALLOW, id="connect"),
        pytest.param(49, (), ALLOW, id="bind"),
        pytest.param(53, (1,), REFUSED, id="socketpair"),
        pytest.param(57, (), REFUSED, id="fork"),
    ],
)
def test_verdict_with_the_network_granted(number: int, arguments: tuple[int, ...], verdict: int) -> None:
    assert judge(NETWORK_FILTER.program(OWN_PID), number, *arguments) == verdict


@pytest.mark.parametrize("rules", [DENY_LIST, NETWORK_DENY_LIST, ALLOW_LIST])
def test_no_call_has_two_rules(rules: tuple[bpf.Rule, ...]) -> None:
    assert len({rule.number for rule in rules}) == len({rule.name for rule in rules}) == len(rules)


def test_numbers_are_those_of_the_system_header() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip(f"{header} is not installed")
    official = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    ours = {rule.name: rule.number for rule in (*DENY_LIST, *ALLOW_LIST)}
    common = ours.keys() & official.keys()
    assert len(common) > 180
    assert {name: ours[name] for name in common} == {name: int(official[name]) for name in common}


@pytest.mark.parametrize("own_pid", [1, OWN_PID, 1 << 22])
def test_own_id_goes_only_where_a_rule_asks_for_it(own_pid: int) -> None:
    def known(rule: bpf.Rule) -> bpf.Rule:
        if rule.condition is None:
            return rule
        values = tuple(own_pid if value == bpf.OWN_PID else value for value in rule.condition.values)
        return replace(rule, condition=replace(rule.condition, values=values))

    assert DEFAULT_FILTER.program(own_pid) == bpf.assemble(map(known, DENY_LIST), otherwise=ALLOW)


@pytest.mark.parametrize("own_pid", [0, -1, -OWN_PID, (1 << 22) + 1, bpf.OWN_PID])
def test_what_is_no_process_id_is_rejected(own_pid: int) -> None:
    with pytest.raises(ValueError, match=str(own_pid)):
        DEFAULT_FILTER.program(own_pid)


# Refusals, typed; none of them reaches the point of no return.


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "_MACHINE", "aarch64")
    with pytest.raises(SandboxUnavailable, match="aarch64") as refusal:
        seccomp.confine(DEFAULT_FILTER, seccomp.Witness())
    assert refusal.value.layer == "seccomp"


def test_a_32_bit_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "_WORD_BITS", 32)
    with pytest.raises(SandboxUnavailable, match="32-bit"):
        seccomp.confine(DEFAULT_FILTER, seccomp.Witness())


def test_without_proc_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "_STATUS_PATH", "/nowhere/status")
    with pytest.raises(SandboxUnavailable, match="/nowhere/status"):
        seccomp.Witness()


def test_a_filter_that_is_not_there_is_noticed() -> None:
    with closing(seccomp.Witness()) as witness, pytest.raises(SandboxUnavailable, match="thread"):
        witness.verify()


# Real processes.

PREAMBLE = """
import ctypes, errno, fcntl, json, os, signal, subprocess, sys, threading
from luacell.worker.sandbox import attributes, bpf, calls, seccomp

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
me = os.getpid()

def call(number, *arguments):
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    outcome = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, padded))
    if os.getpid() != me:
        os._exit(0)  # a child that must not be
    return ctypes.get_errno() if outcome == -1 else 0

def seccomp_lines():
    tasks = [open(f"/proc/self/task/{task}/status").read() for task in os.listdir("/proc/self/task")]
    wanted = ("Seccomp:", "NoNewPrivs:")
    return [[line for line in task.splitlines() if line.startswith(wanted)] for task in tasks]

def said(attempt):
    try:
        return repr(attempt())
    except Exception as error:  # a ZMQError is no OSError
        return errno.errorcode[error.errno]

def confine():
    witness = seccomp.Witness()
    attributes.forgo_privileges()
    seccomp.confine(calls.DEFAULT_FILTER, witness)

attributes.set_limits(64 << 20)
"""


def run(script: str, *arguments: str, confined: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script to its end in an interpreter of its own."""
    source = PREAMBLE + ("confine()\n" if confined else "") + script
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)


def answer(script: str, *arguments: str, confined: bool = True) -> Any:
    """Run a script that ends well, and return the JSON that it printed."""
    result = run(script, *arguments, confined=confined)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# Harmless should the filter fail: null pointers, no descriptors, signal 0.
ATTEMPTS = """
parent = os.getppid()
attempts = {name: [number] for group in calls.DENIED.values() for name, number in group.items()}
attempts |= {
    "clone3": [435], "clone of a thread": [56, 0x003D0F00], "clone as fork does": [56, signal.SIGCHLD],
    "clone of a thread in a new namespace": [56, 0x403D0F00],
    "kill the parent": [62, parent], "kill the own group": [62], "kill everybody": [62, -1],
    "tkill an own thread": [200, me], "tgkill the parent": [234, parent, parent],
    "rt_sigqueueinfo to the parent": [129, parent], "rt_tgsigqueueinfo to the parent": [297, parent, parent],
    "the parent's limits": [302, parent, 4], "outliving the parent": [157, 1],
    "looking into it": [157, 4, 1], **{name: [number] for name, number in calls.CONNECTIONS.items()},
    "another owner of a descriptor": [72, 0, 8, parent], "typing into a terminal": [16, 0, 0x5412],
    "a call from the future": [470], "fork of the x32 ABI": [0x40000000 | 57],
    "kill oneself": [62, me], "tgkill oneself": [234, me, me], "own limits": [302, 0, 4],
}
answers = {name: errno.errorcode.get(call(*arguments), "none") for name, arguments in attempts.items()}
print(json.dumps(answers))
"""
ANSWERED_OTHERWISE = {
    "clone3": "ENOSYS",
    "a call from the future": "ENOSYS",
    "fork of the x32 ABI": "ENOSYS",
    "kill oneself": "none",
    "tgkill oneself": "none",
    "own limits": "none",
}


@needs_x86_64
def test_kernel_answers_as_the_tables_say() -> None:
    answers = answer(ATTEMPTS)
    assert len(answers) > 60
    assert answers == {name: ANSWERED_OTHERWISE.get(name, "EPERM") for name in answers}


@needs_x86_64
@pytest.mark.parametrize(
    "attempt",
    [
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "subprocess.run(['/bin/true'])",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",
        "os.killpg(0, 0)",
        "os.setsid()",
        "__import__('socket').socket()",
        "__import__('socket').socketpair()",
        "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    ],
)
def test_python_gets_permission_denied(attempt: str) -> None:
    assert answer(f"print(json.dumps(said(lambda: {attempt})))") == "EPERM"


@needs_x86_64
def test_call_of_the_32_bit_door_kills() -> None:
    # mov eax, 20 (getpid); int 0x80; ret
    code = "b814000000cd80c3"
    script = f"""
import mmap
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("{code}"))
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
os._exit(0)
"""
    if run(script, confined=False).returncode != 0:
        pytest.skip("this kernel has no 32-bit calls")
    assert run(script).returncode == -signal.SIGSYS


@needs_x86_64
def test_threads_that_are_there_are_confined_and_no_others_begin() -> None:
    script = """
confined, told = threading.Event(), threading.Event()
found = []
def body():
    confined.wait()
    found.append((seccomp_lines(), errno.errorcode[call(57)]))
    told.set()
threading.Thread(target=body).start()
confine()
confined.set()
told.wait()
try:
    threading.Thread(target=print).start()
except RuntimeError as error:
    found.append(str(error))
print(json.dumps(found))
"""
    (lines, refusal), problem = answer(script, confined=False)
    assert refusal == "EPERM"
    assert len(lines) == 2
    assert all(task == ["NoNewPrivs:\t1", "Seccomp:\t2"] for task in lines)
    assert "can't start new thread" in problem


@needs_x86_64
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("os.abort()", signal.SIGABRT),
        ("libc.abort()", signal.SIGABRT),
        ("signal.raise_signal(signal.SIGFPE)", signal.SIGFPE),
        ("os.kill(os.getpid(), signal.SIGKILL)", signal.SIGKILL),
        ("signal.pthread_kill(threading.get_ident(), signal.SIGTERM)", signal.SIGTERM),
        ("signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()", signal.SIGALRM),
        ("ctypes.string_at(0)", signal.SIGSEGV),
    ],
)
def test_a_process_can_still_end_itself(script: str, expected: signal.Signals) -> None:
    assert run(script).returncode == -expected


@needs_x86_64
def test_lua_starts_no_process(tmp_path: Path) -> None:
    script = """
from lupa.luajit21 import LuaRuntime
lua = LuaRuntime(register_eval=False, register_builtins=False)
print(json.dumps(list(lua.execute('''
    local ffi = require("ffi")
    ffi.cdef "int fork(void); int kill(int, int); int getppid(void); long syscall(long, ...);"
    local path = ...
    local status = os.execute("touch " .. path)
    local pipe = io.popen("touch " .. path)
    local fork, fork_errno = ffi.C.fork(), ffi.errno()
    local kill, kill_errno = ffi.C.kill(ffi.C.getppid(), 0), ffi.errno()
    local vfork, vfork_errno = tonumber(ffi.C.syscall(58)), ffi.errno()
    return status ~= 0, pipe == nil, fork, fork_errno, kill, kill_errno, vfork, vfork_errno
''', sys.argv[1]))))
"""
    touched = tmp_path / "touched"
    found = answer(script, str(touched))
    assert found[:2] == [True, True]
    assert found[2:] == [-1, errno.EPERM] * 3
    assert not touched.exists()


@needs_x86_64
def test_filters_add_up() -> None:
    script = """
confine()
state = seccomp.Witness().state()
print(json.dumps([state.mode, state.count]))
"""
    own = seccomp.Witness().state().count
    assert answer(script) == [2, None if own is None else own + 2]


@needs_x86_64
@pytest.mark.parametrize("confined", [False, True])
def test_a_filter_that_is_not_in_force_is_reported_even_where_an_older_one_is(confined: bool) -> None:
    if confined and seccomp.Witness().state().count is None:
        pytest.skip("this kernel does not count filters")
    script = """
seccomp.install = lambda program: None
try:
    confine()
except attributes.SandboxUnavailable as refusal:
    print(json.dumps([refusal.layer, refusal.reason]))
"""
    layer, reason = answer(script, confined=confined)
    assert layer == "seccomp"
    assert "thread" in reason


@needs_x86_64
def test_a_kernel_that_refuses_the_filter_is_reported() -> None:
    script = """
refusing = bpf.assemble([bpf.Rule("seccomp", 317)], otherwise=bpf.ALLOW)
attributes.forgo_privileges()
seccomp.install(refusing)
try:
    confine()
except attributes.SandboxUnavailable as refusal:
    print(json.dumps([refusal.layer, refusal.reason]))
"""
    layer, reason = answer(script, confined=False)
    assert layer == "seccomp"
    assert "not permitted" in reason


@needs_x86_64
def test_a_thread_with_filters_of_its_own_is_reported() -> None:
    script = """
begun, done = threading.Event(), threading.Event()
def body():
    attributes.forgo_privileges()
    harmless = bpf.assemble([], otherwise=bpf.ALLOW)
    handed_over = seccomp._Program(len(harmless) // 8, harmless)
    assert libc.syscall(317, 1, 0, ctypes.byref(handed_over)) == 0
    begun.set()
    done.wait()
thread = threading.Thread(target=body)
thread.start()
begun.wait()
try:
    confine()
except attributes.SandboxUnavailable as refusal:
    print(json.dumps([refusal.reason, thread.native_id]))
done.set()
thread.join()
"""
    reason, thread = answer(script, confined=False)
    assert f"thread {thread} " in reason


# Limits, and the parent's death.


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")
def test_limits_are_set_and_the_hard_ones_kept() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    script = """
import resource
print(json.dumps([resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_STACK)]))
"""
    assert answer(script, confined=False) == [[0, 0], [STACK_SIZE, hard]]


def test_a_stack_beyond_the_hard_limit_is_refused() -> None:
    script = """
import resource
resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, 16 << 20))
try:
    attributes.set_limits(64 << 20)
except attributes.SandboxUnavailable as refusal:
    print(json.dumps([refusal.layer, refusal.reason, resource.getrlimit(resource.RLIMIT_STACK)]))
"""
    layer, reason, kept = answer(script, confined=False)
    assert layer == "stack limit"
    assert str(16 << 20) in reason
    assert kept == [8 << 20, 16 << 20]


def test_memory_is_bounded_for_good_and_never_beyond_what_it_was() -> None:
    script = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
attributes.drop_capabilities()
attributes.limit_memory(1 << 30, 4 << 30)
held = [resource.getrlimit(each) for each in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
try:
    resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
except ValueError:
    print(json.dumps(held))
"""
    assert answer(script, confined=False) == [[1 << 30] * 2, [3 << 30] * 2]


def test_a_stack_grows_to_the_new_limit_in_a_running_process() -> None:
    # Each level is a C frame of some 8 KiB; Lua gives up after 8,000 of them, an 8 MiB stack long before.
    script = """
from lupa.luajit21 import LuaRuntime
lua = LuaRuntime(register_eval=False, register_builtins=False)
print(json.dumps(lua.execute('''
    local function nest(text) return (text:gsub(".", nest)) end
    local ok, reason = pcall(nest, "a")
    return tostring(reason)
''')))
"""
    assert "stack overflow" in str(answer(script, confined=False))


ORPHANED = """
import os, signal, sys
from luacell.worker.sandbox import attributes
zygote = os.getpid()
if os.fork() == 0:
    attributes.die_with_parent(zygote)
    os.write(1, b"r")
    while True:
        signal.pause()
os.close(1)
signal.pause()
"""


def test_a_worker_dies_with_its_parent() -> None:
    with child_process([sys.executable, "-c", ORPHANED], stdout=subprocess.PIPE, bufsize=0) as zygote:
        assert zygote.stdout is not None
        try:
            ready, _, _ = select.select([zygote.stdout], [], [], TIME_LIMIT_S)
            assert ready
            assert zygote.stdout.read(1) == b"r"
        finally:
            zygote.kill()
        # Only the worker still holds the pipe, so its end is the worker's.
        ended, _, _ = select.select([zygote.stdout], [], [], TIME_LIMIT_S)
        assert ended
        assert zygote.stdout.read(1) == b""


def test_a_worker_whose_parent_has_died_already_ends_at_once() -> None:
    script = "attributes.die_with_parent(os.getppid() + 1); print('still here')"
    result = run(script, confined=False)
    assert result.returncode == attributes.ORPHAN_EXIT_CODE
    assert result.stdout == ""


# With libzmq, in a process forked as a worker is: workers have no threads, but what has some is confined as well.

WORKER = """
import zmq
zygote = os.getpid()
worker = os.fork()
if worker:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
attributes.die_with_parent(zygote)
me = os.getpid()
context = zmq.Context()
dealer = context.socket(zmq.DEALER)
dealer.linger = 0
dealer.rcvtimeo = 20_000
dealer.reconnect_ivl = 1
events = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED)
events.rcvtimeo = 20_000
dealer.connect(sys.argv[1])
dealer.send(b"hello")
dealer.recv()  # libzmq connects in its own time, and could not any more once confined
confine()
dealer.send_json(seccomp_lines())
"""
ECHO = """
while message := dealer.recv():
    dealer.send(message)
os._exit(0)
"""
OUTLIVE_BROKER = """
from zmq.utils.monitor import recv_monitor_message
seen = []
while seen.count(zmq.EVENT_CONNECT_RETRIED) < 100:
    seen.append(recv_monitor_message(events)["event"])
assert zmq.EVENT_DISCONNECTED in seen
other = context.socket(zmq.DEALER)
other.linger = 0
print(json.dumps(said(lambda: other.bind("ipc://" + sys.argv[2]))))
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[str, zmq.Socket[bytes]]]:
    """A ROUTER that a worker may connect to, and its endpoint."""
    endpoint = f"ipc://{tmp_path}/broker.sock"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.rcvtimeo = router.sndtimeo = TIME_LIMIT_S * 1000
        router.bind(endpoint)
        yield endpoint, router


@contextmanager
def zygote_of_a_worker(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a zygote whose worker runs a script once it is confined; both are gone afterwards."""
    command = [sys.executable, "-c", PREAMBLE + WORKER + script, *arguments]
    with child_process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as zygote:
        try:
            yield zygote
        finally:
            zygote.kill()


def welcome(router: zmq.Socket[bytes]) -> list[bytes]:
    """Answer a worker's greeting, and return what it says first when it is confined."""
    router.send_multipart(router.recv_multipart())
    return router.recv_multipart()


@needs_x86_64
def test_a_connected_dealer_keeps_exchanging_messages(broker: tuple[str, zmq.Socket[bytes]]) -> None:
    endpoint, router = broker
    with zygote_of_a_worker(ECHO, endpoint) as zygote:
        worker, lines = welcome(router)
        tasks = json.loads(lines)
        assert len(tasks) >= 3  # the worker's own thread, and at least two of libzmq's
        assert all(task == ["NoNewPrivs:\t1", "Seccomp:\t2"] for task in tasks)
        for number in range(1000):
            message = b"%d" % number * (number + 1)
            router.send_multipart([worker, message])
            assert router.recv_multipart() == [worker, message]
        router.send_multipart([worker, b""])
        _, errors = zygote.communicate(timeout=TIME_LIMIT_S)
    assert zygote.returncode == 0, errors


@needs_x86_64
def test_a_dealer_whose_broker_is_gone_stays_alive_and_alone(
    broker: tuple[str, zmq.Socket[bytes]], tmp_path: Path
) -> None:
    endpoint, router = broker
    with zygote_of_a_worker(OUTLIVE_BROKER, endpoint, str(tmp_path / "other.sock")) as zygote:
        welcome(router)
        router.close()
        output, errors = zygote.communicate(timeout=TIME_LIMIT_S)
    assert zygote.returncode == 0, errors
    assert json.loads(output) == "EPERM"
    assert not (tmp_path / "other.sock").exists()


# -- what is hidden ------------------------------------------------------------------------------------------
def test_environment_of_the_host_is_not_the_contract_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUACELL_TEST_SECRET", "s3cret")
    monkeypatch.setenv("TZ", "UTC")
    with LuaHostBridge() as bridge:
        assert bridge.lua().eval("os.getenv('LUACELL_TEST_SECRET')") is None
        assert bridge.lua().eval("os.getenv('PATH')") is None
        assert bridge.lua().eval("os.getenv('TZ')") == "UTC"


def test_worker_is_not_dumpable_and_says_which_layers_are_in_force() -> None:
    with LuaHostBridge() as bridge:
        source = "local ffi = require('ffi') ffi.cdef 'int prctl(int, long, long, long, long);' return ffi.C.prctl({})"
        assert bridge.lua().eval(source.format("3, 0, 0, 0, 0")) == 0
        posture = bridge.health()["posture"]
        assert posture["level"] == "default"
        assert "not dumpable" in posture["layers"]
