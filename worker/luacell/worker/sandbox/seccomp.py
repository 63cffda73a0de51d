"""Puts a system-call filter on all threads of this process for good, and sees that it is there.

It knows neither levels nor calls. Source: seccomp(2).
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from dataclasses import dataclass
from typing import Final

from luacell.worker.sandbox.attributes import SandboxUnavailable, syscall
from luacell.worker.sandbox.bpf import INSTRUCTION, Template

LAYER: Final = "seccomp"
_SYS_SECCOMP: Final = 317
_SET_MODE_FILTER: Final = 1
_FLAG_TSYNC: Final = 1
_MODE_FILTER: Final = 2
_MACHINE: Final = os.uname().machine
_WORD_BITS: Final = 8 * struct.calcsize("P")
_STATUS_PATH: Final = "/proc/thread-self/status"
_STATUS_SIZE: Final = 1 << 16  # bytes; 2 KiB are usual, and each group the process is in may add 11
_LINES: Final = re.compile(rb"^Seccomp:\s*(\d+)(?:\nSeccomp_filters:\s*(\d+))?", re.MULTILINE)


class _Program(ctypes.Structure):
    """struct sock_fprog: a program as seccomp(2) takes it."""

    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


@dataclass(frozen=True, slots=True)
class FilterState:
    """What the kernel says of a thread's filters; before Linux 5.9 it did not count them."""

    mode: int
    count: int | None


class Witness:
    """A thread's status file, opened while that is still possible; it proves the filter afterwards.

    Raises:
        SandboxUnavailable: there is no /proc, so that nothing could prove a filter in force.
    """

    def __init__(self) -> None:
        try:
            self.descriptor = os.open(_STATUS_PATH, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SandboxUnavailable(LAYER, f"nothing could prove it in force: {error}") from error
        self._before = self.state()

    def state(self) -> FilterState:
        """Return what the kernel says now."""
        found = _LINES.search(os.pread(self.descriptor, _STATUS_SIZE, 0))
        if found is None:  # a kernel built without seccomp
            return FilterState(mode=0, count=None)
        mode, count = found.groups()
        return FilterState(int(mode), None if count is None else int(count))

    def verify(self) -> None:
        """Check for one filter more than there was before.

        The mode alone would not do: in a container the engine's own filter has set it from the start. The other
        threads have what this one has: the kernel puts a filter on all of them, or on none and says so.

        Raises:
            SandboxUnavailable: there is none.
        """
        before = self._before.count
        wanted = FilterState(_MODE_FILTER, None if before is None else before + 1)
        found = self.state()
        if found != wanted:
            raise SandboxUnavailable(LAYER, f"this thread is in {found}, not in {wanted}")

    def close(self) -> None:
        """Give the file back."""
        os.close(self.descriptor)


def require_x86_64() -> None:
    """Refuse machines whose calls have other numbers, and 32-bit processes on the right ones.

    Raises:
        SandboxUnavailable: this is one.
    """
    if _MACHINE != "x86_64" or _WORD_BITS != 64:
        reason = f"the filter is written for x86_64, this is a {_WORD_BITS}-bit process on {_MACHINE}"
        raise SandboxUnavailable(LAYER, reason)


def confine(template: Template, witness: Witness) -> None:
    """Put a filter on all threads of this process for good, and see that it is there.

    Threads, descriptors and connections that exist stay as they are. A ZeroMQ socket must have *heard* from
    its peer: connect() only asks the I/O thread for a connection, and one asked for too late silently never
    comes. Follows `die_with_parent`, which it forbids, and `forgo_privileges`, which it needs.

    Args:
        template: the filter.
        witness: made before whatever hides /proc; it is closed.

    Raises:
        SandboxUnavailable: not x86-64, or the kernel refuses; the process must not run a contract then.
    """
    require_x86_64()
    install(template.program(os.getpid()))
    witness.verify()
    witness.close()


def install(program: bytes) -> None:
    """Put a filter on every thread of this process, or on none.

    Raises:
        SandboxUnavailable: the kernel refuses it.
    """
    handed_over = _Program(len(program) // INSTRUCTION.size, program)
    outcome = syscall(_SYS_SECCOMP, _SET_MODE_FILTER, _FLAG_TSYNC, ctypes.addressof(handed_over), None)
    if outcome < 0:
        reason = os.strerror(ctypes.get_errno())
        raise SandboxUnavailable(LAYER, f"the kernel refuses the filter: {reason}")
    if outcome > 0:
        raise SandboxUnavailable(LAYER, f"thread {outcome} has other filters and cannot take this one")
