"""Takes from a worker process what a contract has no business with, for good.

It owns the limits and the system-call filter that a worker puts on itself between its fork and its first
line of Lua. It does not decide *which* level a worker gets, does not watch workers, and hides nothing inside
Lua: with FFI a contract reaches all of the process, so only what the kernel refuses counts.

    fork -> die_with_parent -> hide_memory, forget_environment, set_limits -> (libzmq is connected) -> confine -> Lua

The filter is data before it is code: `DENY_LIST` says what each system call gets, `assemble` turns such a
table into a BPF program, `confine` installs it. The first two are pure and can be judged without a kernel.

Source: Linux Documentation/userspace-api/seccomp_filter.rst, seccomp(2), prctl(2), bpf_common.h, audit.h.
"""

import ctypes
import errno
import fcntl
import os
import re
import resource
import signal
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

# From the headers of prctl(2) and seccomp(2).
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_SYS_SECCOMP: Final = 317
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1
_SECCOMP_MODE_FILTER: Final = 2

# What a filter may answer.
KILL_PROCESS: Final = 0x8000_0000
ALLOW: Final = 0x7FFF_0000
_ERRNO: Final = 0x0005_0000
REFUSED: Final = _ERRNO | errno.EPERM
UNKNOWN: Final = _ERRNO | errno.ENOSYS

AUDIT_ARCH_X86_64: Final = 0xC000_003E
# One past the newest call that the tables were checked against (469, file_setattr, Linux 6.17). Above lie
# calls that nobody has judged yet, and from 0x40000000 on the x32 twins of all the others; both get the
# answer of an older kernel, for which every libc has a fallback.
FIRST_UNKNOWN_NUMBER: Final = 470

# Classic BPF, and where struct seccomp_data holds what it looks at. An argument's low word comes first, and
# is all that the kernel reads of the pids, commands and clone flags tested here.
_LOAD_WORD: Final = 0x20
_AND: Final = 0x54
_JUMP_IF_EQUAL: Final = 0x15
_JUMP_IF_AT_LEAST: Final = 0x35
_RETURN: Final = 0x06
_NUMBER_OFFSET: Final = 0
_ARCH_OFFSET: Final = 4
_ARGUMENTS_OFFSET: Final = 16
_ARGUMENT_SIZE: Final = 8
_INSTRUCTION: Final = struct.Struct("=HBBI")
_RUN_LENGTH: Final = 8  # rules; about the root of their number makes the shortest way through
MAX_INSTRUCTION_COUNT: Final = 4096  # BPF_MAXINSNS; longer programs are refused by the kernel

_WORD: Final = struct.Struct("=I")
_MAX_PID: Final = 1 << 22  # PID_MAX_LIMIT of a 64-bit kernel
# Stands in a rule for the id of the process to be confined; never itself an id, a number or a verdict.
OWN_PID: Final = 0x7FFF_FFFE
_ALL_BITS: Final = 0xFFFF_FFFF

_CLONE_THREAD: Final = 0x0001_0000
# NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET: a thread may be born into some of them, which
# would be unshare under another name.
_CLONE_NEW_NAMESPACES: Final = 0x7E02_0000

_F_SETOWN_EX: Final = 15
_FIOSETOWN: Final = 0x8901
_SIOCSPGRP: Final = 0x8902
_TIOCSTI: Final = 0x5412
_TIOCLINUX: Final = 0x541C

_ORPHAN_EXIT_CODE: Final = 1
_KEPT_VARIABLES: Final = frozenset(("TZ", "LANG", "LC_ALL", "LC_CTYPE"))
# What a worker of the `default` level has in force when it says that it is ready; without one of them it is not.
DEFAULT_LAYERS: Final = (
    "death with its worker host",
    "not dumpable",
    "no core files",
    "clean environment",
    "no new privileges",
    "seccomp: no processes, sockets, signals or tracing of others",
)

# x86-64 numbers, by what a contract would gain. Each is refused whatever its arguments are.
DENIED: Final[Mapping[str, Mapping[str, int]]] = {
    # A forked child would answer a second time, and write into slots that are another call's by then.
    "another process": {"fork": 57, "vfork": 58, "execve": 59, "execveat": 322},
    "another process's memory and descriptors": {
        "ptrace": 101,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "pidfd_getfd": 438,
        "process_madvise": 440,
    },
    # tkill names a thread without its process, so that no argument tells an own thread from a stranger's.
    "signals to others": {"tkill": 200, "pidfd_send_signal": 424},
    # What is connected stays connected; libzmq only ever needs these to connect anew.
    "new connections": {
        "socket": 41,
        "connect": 42,
        "accept": 43,
        "bind": 49,
        "listen": 50,
        "socketpair": 53,
        "accept4": 288,
    },
    # The worker host may signal a whole group; none of its workers slips out of it.
    "leaving the process group": {"setpgid": 109, "setsid": 112},
    "other namespaces and roots": {"pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308},
    "mounts": {
        "mount": 165,
        "umount2": 166,
        "open_tree": 428,
        "move_mount": 429,
        "fsopen": 430,
        "fsconfig": 431,
        "fsmount": 432,
        "fspick": 433,
        "mount_setattr": 442,
        "open_tree_attr": 467,
    },
    "the machine": {
        "swapon": 167,
        "swapoff": 168,
        "reboot": 169,
        "init_module": 175,
        "delete_module": 176,
        "kexec_load": 246,
        "finit_module": 313,
        "kexec_file_load": 320,
    },
    # Rarely needed, often the way in. io_uring also performs calls that no filter gets to see.
    "a larger kernel surface": {
        "personality": 135,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "perf_event_open": 298,
        "bpf": 321,
        "userfaultfd": 323,
        "io_uring_setup": 425,
        "io_uring_enter": 426,
        "io_uring_register": 427,
    },
}


class SandboxUnavailable(RuntimeError):
    """A layer of the sandbox cannot be had here, so the worker must not run a contract.

    Attributes:
        layer: which one, such as "seccomp".
        reason: what stood in the way.
    """

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(layer, reason)
        self.layer = layer
        self.reason = reason

    def __str__(self) -> str:
        return f"sandbox layer {self.layer} is not available: {self.reason}"


@dataclass(frozen=True, slots=True)
class Condition:
    """Holds when the low 32 bits of an argument, masked, are one of a few values."""

    argument: int
    values: tuple[int, ...]
    mask: int = _ALL_BITS


@dataclass(frozen=True, slots=True)
class Rule:
    """What a filter answers to one system call: `met` where the condition holds, else `verdict`."""

    name: str
    number: int
    verdict: int = REFUSED
    condition: Condition | None = None
    met: int = ALLOW


def assemble(rules: Iterable[Rule], *, otherwise: int) -> bytes:
    """Assemble a filter program from rules.

    A call whose answer does not hang on its arguments is decided on architecture and number alone; that lets
    the kernel (5.11 and later) remember the verdict, and allowed calls then do not run the filter at all. To
    that end it walks the program for every call there is as it installs it: 140 us with the rules in one long
    chain, 60 us with runs of them that higher numbers skip.

    Args:
        rules: at most one for each system call.
        otherwise: the answer to calls that no rule names.

    Returns:
        The BPF program, 8 bytes an instruction.
    """
    in_order = sorted(rules, key=lambda rule: rule.number)
    starts = range(0, len(in_order), _RUN_LENGTH)
    runs = b"".join(_run(in_order[start : start + _RUN_LENGTH], otherwise) for start in starts)
    program = _prologue() + runs + _instruction(_RETURN, otherwise)
    count = len(program) // _INSTRUCTION.size
    assert count <= MAX_INSTRUCTION_COUNT, f"{count} instructions, limit {MAX_INSTRUCTION_COUNT}"
    return program


def _prologue() -> bytes:
    """Turn away foreign architectures and unknown numbers; leave the number loaded for what follows."""
    return b"".join(
        (
            _instruction(_LOAD_WORD, _ARCH_OFFSET),
            # A 64-bit process may still use int 0x80, where the same numbers mean other calls.
            _instruction(_JUMP_IF_EQUAL, AUDIT_ARCH_X86_64, if_so=1),
            _instruction(_RETURN, KILL_PROCESS),
            _instruction(_LOAD_WORD, _NUMBER_OFFSET),
            _instruction(_JUMP_IF_AT_LEAST, FIRST_UNKNOWN_NUMBER, if_not=1),
            _instruction(_RETURN, UNKNOWN),
        )
    )


def _run(rules: Sequence[Rule], otherwise: int) -> bytes:
    """Assemble some rules in order of their numbers, behind a jump over all of them."""
    body = b"".join(_block(rule) for rule in rules) + _instruction(_RETURN, otherwise)
    size = len(body) // _INSTRUCTION.size
    return _instruction(_JUMP_IF_AT_LEAST, rules[-1].number + 1, if_so=size) + body


def _block(rule: Rule) -> bytes:
    """Assemble one rule: skipped as a whole by any other call, else it always returns."""
    body = _instruction(_RETURN, rule.verdict)
    if rule.condition is not None:
        body = _test(rule.condition) + body + _instruction(_RETURN, rule.met)
    size = len(body) // _INSTRUCTION.size
    return _instruction(_JUMP_IF_EQUAL, rule.number, if_not=size) + body


def _test(condition: Condition) -> bytes:
    """Assemble a condition: falls through where it does not hold, else skips one more instruction."""
    load = _instruction(_LOAD_WORD, _ARGUMENTS_OFFSET + _ARGUMENT_SIZE * condition.argument)
    mask = b"" if condition.mask == _ALL_BITS else _instruction(_AND, condition.mask)
    left = range(len(condition.values) - 1, -1, -1)
    compare = (
        _instruction(_JUMP_IF_EQUAL, value, if_so=still + 1)
        for value, still in zip(condition.values, left, strict=True)
    )
    return load + mask + b"".join(compare)


def _instruction(code: int, operand: int, *, if_so: int = 0, if_not: int = 0) -> bytes:
    """Encode one instruction; a jump skips `if_so` or `if_not` of those behind it (at most 255)."""
    return _INSTRUCTION.pack(code, if_so, if_not, operand)


# A descriptor's owner gets any chosen signal when data arrives (F_SETOWN, then F_SETSIG), and a terminal
# passes on what was "typed" into it, to a shell too.
_NEW_OWNER: Final = Condition(1, (fcntl.F_SETOWN, _F_SETOWN_EX))
_NEW_OWNER_OR_TYPING: Final = Condition(1, (_FIOSETOWN, _SIOCSPGRP, _TIOCSTI, _TIOCLINUX))
_TO_ITSELF: Final = Condition(0, (OWN_PID,))
_A_THREAD: Final = Condition(0, (_CLONE_THREAD,), mask=_CLONE_THREAD | _CLONE_NEW_NAMESPACES)

# The `default` level; what is not named here is allowed.
DENY_LIST: Final[tuple[Rule, ...]] = (
    Rule("clone", 56, condition=_A_THREAD),
    # Its flags lie in memory, where no filter can look. Told that there is no such call, glibc uses clone.
    Rule("clone3", 435, UNKNOWN),
    # abort() and raise() send their signal by tgkill, to the process itself.
    Rule("tgkill", 234, condition=_TO_ITSELF),
    Rule("kill", 62, condition=_TO_ITSELF),
    Rule("rt_sigqueueinfo", 129, condition=_TO_ITSELF),
    Rule("rt_tgsigqueueinfo", 297, condition=_TO_ITSELF),
    # A process past its limit of CPU time gets SIGKILL, whoever set the limit. 0 means the caller.
    Rule("prlimit64", 302, condition=Condition(0, (0, OWN_PID))),
    # A worker that took back die_with_parent would outlive it.
    Rule("prctl", 157, ALLOW, condition=Condition(0, (_PR_SET_PDEATHSIG,)), met=REFUSED),
    Rule("fcntl", 72, ALLOW, condition=_NEW_OWNER, met=REFUSED),
    Rule("ioctl", 16, ALLOW, condition=_NEW_OWNER_OR_TYPING, met=REFUSED),
    *(Rule(name, number) for group in DENIED.values() for name, number in group.items()),
)

# Assembled in the zygote, and cut where the process's own id belongs: a process just forked pays for each
# page that it touches, and would spend 0.2 ms on the same work.
_DENY_LIST_PIECES: Final = assemble(DENY_LIST, otherwise=ALLOW).split(_WORD.pack(OWN_PID))


def deny_list_program(own_pid: int) -> bytes:
    """Return the filter of the `default` level.

    Args:
        own_pid: the process that will be confined, as it sees itself; it may signal itself.

    Returns:
        The BPF program, 8 bytes an instruction, x86-64 only: any other architecture's calls kill the process.

    Raises:
        ValueError: own_pid is not the id of a process; 0 and the negative ones would name groups.
    """
    if not 0 < own_pid <= _MAX_PID:
        raise ValueError(f"own_pid is {own_pid}, a process id lies between 1 and {_MAX_PID}")
    return _WORD.pack(own_pid).join(_DENY_LIST_PIECES)


class _Program(ctypes.Structure):
    """struct sock_fprog: a program as seccomp(2) takes it."""

    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


# Prepared in the zygote: whatever a process just forked touches first costs it page faults.
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_prctl: Final = _LIBC.prctl
_prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_syscall: Final = _LIBC.syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p)
_syscall.restype = ctypes.c_long
_MACHINE: Final = os.uname().machine
_WORD_BITS: Final = 8 * struct.calcsize("P")
_STATUS_SIZE: Final = 1 << 16  # bytes; 2 KiB are usual, and each group the process is in may add 11
_SECCOMP_LINES: Final = re.compile(rb"^Seccomp:\s*(\d+)(?:\nSeccomp_filters:\s*(\d+))?", re.MULTILINE)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends; end it now if that has happened already.

    To the kernel the parent is the *thread* that forked, so a worker must be forked by a main thread.

    Args:
        parent_pid: who forked this process, as it saw itself before the fork.

    Raises:
        SandboxUnavailable: the kernel refuses the order.
    """
    _set_attribute("parent-death signal", _PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ordered too late, the signal never comes; whoever adopted the orphan tells.
    if os.getppid() != parent_pid:
        os._exit(_ORPHAN_EXIT_CODE)


def hide_memory() -> None:
    """Let no process of this user look into this one, or write into it: not by ptrace, not through /proc.

    A process with CAP_SYS_PTRACE, such as root's, still can. Source: prctl(2), PR_SET_DUMPABLE.

    Raises:
        SandboxUnavailable: the kernel refuses.
    """
    _set_attribute("not dumpable", _PR_SET_DUMPABLE, 0)


def forget_environment() -> None:
    """Remove what the environment of this process may hold of secrets; time zone and language stay."""
    for name in list(os.environ):
        if name not in _KEPT_VARIABLES:
            del os.environ[name]


def set_limits(stack_size_bytes: int) -> None:
    """Forbid core files, and give the main thread's stack its size.

    The stack of a running process may grow up to the new limit, but the room below it was measured out at
    exec: 128 MiB at least. Other threads keep the stacks they have. No hard limit is lowered but that of core
    files.

    Args:
        stack_size_bytes: how far the stack may grow, in bytes.

    Raises:
        SandboxUnavailable: the stack's hard limit is smaller.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if hard != resource.RLIM_INFINITY and stack_size_bytes > hard:
        raise SandboxUnavailable("stack limit", f"{stack_size_bytes} bytes asked for, hard limit {hard}")
    resource.setrlimit(resource.RLIMIT_STACK, (stack_size_bytes, hard))


def confine(own_pid: int | None = None) -> None:
    """Put the `default` level's filter on all threads of this process for good, and see that it is there.

    Threads, descriptors and connections that exist stay as they are. A ZeroMQ socket must have *heard* from
    its peer: connect() only asks the I/O thread for a connection, and one asked for too late silently never
    comes. Follows `die_with_parent`, which it forbids, and needs a readable /proc.

    Args:
        own_pid: this process, where the caller knows it already.

    Raises:
        SandboxUnavailable: not x86-64, or the kernel refuses; the process must not run a contract then.
        ValueError: own_pid is another process, which the worker would then be allowed to kill.
    """
    _require_x86_64()
    pid = os.getpid()
    if own_pid is not None and own_pid != pid:
        raise ValueError(f"own_pid is {own_pid}, this process is {pid}")
    try:
        before = _filter_state("/proc/thread-self/status")
    except OSError as error:
        raise SandboxUnavailable("seccomp", f"nothing could prove it in force: {error}") from error
    _set_attribute("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    _install(deny_list_program(pid))
    _verify(before)


def _require_x86_64() -> None:
    """Refuse machines whose calls have other numbers, and 32-bit processes on the right ones."""
    if _MACHINE != "x86_64" or _WORD_BITS != 64:
        reason = f"the filter is written for x86_64, this is a {_WORD_BITS}-bit process on {_MACHINE}"
        raise SandboxUnavailable("seccomp", reason)


def _set_attribute(layer: str, option: int, value: int) -> None:
    """Set one attribute of this process; a refusal names the layer."""
    if _prctl(option, value, 0, 0, 0) != 0:
        raise SandboxUnavailable(layer, f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def _install(program: bytes) -> None:
    """Put a filter on every thread of this process, or on none."""
    handed_over = _Program(len(program) // _INSTRUCTION.size, program)
    flags = _SECCOMP_FILTER_FLAG_TSYNC
    outcome = _syscall(_SYS_SECCOMP, _SECCOMP_SET_MODE_FILTER, flags, ctypes.addressof(handed_over))
    if outcome < 0:
        reason = os.strerror(ctypes.get_errno())
        raise SandboxUnavailable("seccomp", f"the kernel refuses the filter: {reason}")
    if outcome > 0:
        raise SandboxUnavailable("seccomp", f"thread {outcome} has other filters and cannot take this one")


@dataclass(frozen=True, slots=True)
class _FilterState:
    """What the kernel says of a thread's filters; before Linux 5.9 it did not count them."""

    mode: int
    count: int | None


def _filter_state(path: str) -> _FilterState:
    """Read a thread's state from its status file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = _SECCOMP_LINES.search(os.read(descriptor, _STATUS_SIZE))
    finally:
        os.close(descriptor)
    if found is None:  # a kernel built without seccomp
        return _FilterState(mode=0, count=None)
    mode, count = found.groups()
    return _FilterState(int(mode), None if count is None else int(count))


def _verify(before: _FilterState) -> None:
    """Check every thread for one filter more than there was before.

    The mode alone would not do: in a container the engine's own filter has set it from the start.
    """
    count = None if before.count is None else before.count + 1
    wanted = _FilterState(_SECCOMP_MODE_FILTER, count)
    for thread in os.listdir("/proc/self/task"):
        try:
            found = _filter_state(f"/proc/self/task/{thread}/status")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        if found != wanted:
            raise SandboxUnavailable("seccomp", f"thread {thread} is in {found}, not in {wanted}")
