"""Takes attributes and limits from a process: what the kernel keeps of it apart from filters and rules.

Most of them hold for the thread that asks and for those that it starts later, so a worker asks while it has but
one. Each layer that cannot be had is a SandboxUnavailable with its name.

Source: prctl(2), capabilities(7), getrlimit(2), environ(7), proc_pid_stat(5).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522
_SYS_CAPSET: Final = 126

ORPHAN_EXIT_CODE: Final = 1
_KEPT_VARIABLES: Final = frozenset(("TZ", "LANG", "LC_ALL", "LC_CTYPE"))


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


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


# Prepared in the zygote: whatever a process just forked touches first costs it page faults.
LIBC: Final = ctypes.CDLL(None, use_errno=True)
_prctl: Final = LIBC.prctl
_prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
syscall: Final = LIBC.syscall
syscall.argtypes = (ctypes.c_long, *(ctypes.c_void_p,) * 4)
syscall.restype = ctypes.c_long
_NO_CAPABILITIES: Final = (_CapabilityHeader(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends; end it now if that has happened already.

    To the kernel the parent is the *thread* that forked, so a worker must be forked by a main thread.

    Args:
        parent_pid: who forked this process, as it saw itself before the fork.

    Raises:
        SandboxUnavailable: the kernel refuses the order.
    """
    set_attribute("parent-death signal", _PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ordered too late, the signal never comes; whoever adopted the orphan tells.
    if os.getppid() != parent_pid:
        os._exit(ORPHAN_EXIT_CODE)


def hide_memory() -> None:
    """Let no process of this user look into this one, or write into it: not by ptrace, not through /proc.

    A process with CAP_SYS_PTRACE, such as root's, still can. Source: prctl(2), PR_SET_DUMPABLE.

    Raises:
        SandboxUnavailable: the kernel refuses.
    """
    set_attribute("not dumpable", _PR_SET_DUMPABLE, 0)


def forgo_privileges() -> None:
    """Gain no privileges any more, by whatever is executed.

    Raises:
        SandboxUnavailable: the kernel refuses.
    """
    set_attribute("no new privileges", _PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Give up what root may do beyond others; a process without any gives up nothing.

    Raises:
        SandboxUnavailable: the kernel refuses.
    """
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)  # before Linux 4.3 there were none
    header, nothing = _NO_CAPABILITIES
    if syscall(_SYS_CAPSET, ctypes.addressof(header), ctypes.addressof(nothing), None, None) != 0:
        raise SandboxUnavailable("capabilities", f"capset: {os.strerror(ctypes.get_errno())}")


def forget_environment() -> None:
    """Remove what the environment of this process may hold of secrets; time zone and language stay.

    That is what the process *sees*. What lay in its memory when it was started is `wipe_environment`'s.
    """
    for name in list(os.environ):
        if name not in _KEPT_VARIABLES:
            del os.environ[name]


def wipe_environment() -> None:
    """Overwrite the environment that this process was started with, which stays readable in its memory and in /proc.

    Variables keep their values, at another place. For a worker host, before its first fork; needs /proc, and does
    nothing without.
    """
    try:
        fields = Path("/proc/self/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return
    start, end = int(fields[47]), int(fields[48])  # env_start and env_end; the third field is the first behind ")"
    values = dict(os.environ)
    for name in values:
        del os.environ[name]
    os.environ.update(values)
    if 0 < start < end:
        ctypes.memset(start, 0, end - start)


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


def forbid_growth(*, may_write: bool) -> None:
    """Allow no more processes or threads, and no bytes in files: not on a disk, and not in memory (memfd).

    For a worker that has all its threads. Processes are counted per user, and root's are not: the filter is what
    holds for all.

    Args:
        may_write: the contract was granted files that it may write.
    """
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if not may_write:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def trim_heap() -> None:
    """Give back to the kernel what the heap of C has free."""
    LIBC.malloc_trim(ctypes.c_size_t(0))


def limit_memory(data: int, address_space: int) -> None:
    """Bound what this process may map, for good: a process without privileges cannot raise a hard limit.

    Args:
        data: bytes of private memory that can be written.
        address_space: bytes of all.
    """
    for which, limit in ((resource.RLIMIT_DATA, data), (resource.RLIMIT_AS, address_space)):
        _, hard = resource.getrlimit(which)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))


def set_attribute(layer: str, option: int, value: int) -> None:
    """Set one attribute of this process; a refusal names the layer."""
    if _prctl(option, value, 0, 0, 0) != 0:
        raise SandboxUnavailable(layer, f"prctl({option}): {os.strerror(ctypes.get_errno())}")
