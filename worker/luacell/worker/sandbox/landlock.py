"""Takes the file system from a process, but for what a ruleset names: landlock, by its three system calls.

A ruleset is a descriptor; the worker host makes it, and the worker puts itself under it while it has but one
thread, for landlock confines the thread that asks and those that it starts later. It also keeps signals, abstract
sockets and TCP ports away, where the kernel knows how. What it cannot see (looking at names, owners, modes; `chdir`) is
the filter's.

Source: Linux Documentation/userspace-api/landlock.rst, landlock(7), linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from typing import Final

from luacell.worker.sandbox.attributes import SandboxUnavailable, syscall

LAYER: Final = "landlock"
_SYS_CREATE_RULESET: Final = 444
_SYS_ADD_RULE: Final = 445
_SYS_RESTRICT_SELF: Final = 446
_CREATE_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1
_LOG_SAME_EXEC_OFF: Final = 1  # a contract that tries again and again shall not fill the machine's audit log

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE: Final = 1 << 14
_IOCTL_DEV: Final = 1 << 15
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_READ: Final = _READ_FILE | _READ_DIR
_DEVICES: Final = _MAKE_CHAR | _MAKE_BLOCK
# Rights to files, by the first version of the interface that knows them.
_FILE_RIGHTS: Final = ((1, (1 << 13) - 1), (2, 1 << 13), (3, _TRUNCATE), (5, _IOCTL_DEV))
_OF_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV  # what a rule on a plain file may have
_TCP: Final = 3  # bind, connect
_TCP_SINCE: Final = 4
_SCOPES: Final = 3  # abstract sockets, signals
_SCOPES_SINCE: Final = 6
_QUIET_SINCE: Final = 7

# What LuaJIT, C modules of the system and what they are linked against need.
SYSTEM_PATHS: Final = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
)
SINK_PATHS: Final = ("/dev/null",)
# What the resolver and TLS read besides.
NETWORK_PATHS: Final = (
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/protocols",
    "/etc/ssl",
    "/etc/ca-certificates",
    "/etc/pki",
)


class _Attributes(ctypes.Structure):
    """struct landlock_ruleset_attr; older kernels take the first 8 or 16 bytes."""

    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


class GrantUnavailable(Exception):
    """A path that a contract was granted cannot be given to it; the text names it."""


def abi_version() -> int:
    """Return the version of the interface that the kernel offers.

    Raises:
        SandboxUnavailable: it offers none.
    """
    version = int(syscall(_SYS_CREATE_RULESET, None, None, _CREATE_VERSION, None))
    if version < 1:
        reason = os.strerror(ctypes.get_errno())
        raise SandboxUnavailable(LAYER, f"this kernel has it not, or not enabled ({reason})")
    return version


def what_it_lacks(version: int) -> str:
    """Tell what a version of the interface does not restrict yet, or ""."""
    lacks = [
        name
        for since, name in (
            (3, "truncation by path"),
            (_TCP_SINCE, "TCP"),
            (_SCOPES_SINCE, "signals and abstract sockets"),
        )
        if version < since
    ]
    return f"without {', '.join(lacks)}" if lacks else ""


class Ruleset:
    """A set of rules that a process can be put under; a descriptor that is its owner's to close.

    Nothing may be read, written or made but what `allow` names.

    Args:
        network: leave TCP alone.

    Raises:
        SandboxUnavailable: the kernel has no landlock.
        OSError: it has, and no ruleset can be made now: no descriptors, or no memory.
    """

    def __init__(self, *, network: bool = False) -> None:
        self._version = abi_version()
        self._rights = sum(rights for since, rights in _FILE_RIGHTS if since <= self._version)
        attributes = _Attributes(
            files=self._rights,
            network=0 if network or self._version < _TCP_SINCE else _TCP,
            scoped=_SCOPES if self._version >= _SCOPES_SINCE else 0,
        )
        size = 24 if self._version >= _SCOPES_SINCE else 16 if self._version >= _TCP_SINCE else 8
        self.descriptor = int(syscall(_SYS_CREATE_RULESET, ctypes.addressof(attributes), size, 0, None))
        if self.descriptor < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"no landlock ruleset: {os.strerror(number)}")

    def allow_reading(self, paths: Iterable[str]) -> None:
        """Let files be read, and directories with all that is in them; paths that do not exist are left out."""
        for path in paths:
            try:
                self._allow(path, _READ)
            except FileNotFoundError:
                continue

    def allow_sinks(self, paths: Iterable[str]) -> None:
        """Let files be written that swallow everything."""
        for path in paths:
            try:
                self._allow(path, _READ | _WRITE_FILE | _TRUNCATE)
            except FileNotFoundError:
                continue

    def grant(self, path: str, *, write: bool) -> None:
        """Let a contract have a path; with `write`, files in it may also be written, made and removed.

        Raises:
            GrantUnavailable: there is none, or it cannot be opened.
        """
        writing = self._rights & ~(_EXECUTE | _DEVICES | _IOCTL_DEV)
        try:
            self._allow(path, writing if write else _READ)
        except OSError as error:
            kind = "write" if write else "read"
            raise GrantUnavailable(f"{kind} = {path!r} cannot be granted: {error.strerror}") from None

    def _allow(self, path: str, rights: int) -> None:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(opened).st_mode):
                rights &= _OF_FILES
            rule = _PathBeneath(rights & self._rights, opened)
            if syscall(_SYS_ADD_RULE, self.descriptor, _RULE_PATH_BENEATH, ctypes.addressof(rule), 0) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), path)
        finally:
            os.close(opened)

    def restrict(self) -> None:
        """Put this thread, and those that it will start, under the rules for good; needs `forgo_privileges`.

        Raises:
            SandboxUnavailable: the kernel refuses.
        """
        flags = _LOG_SAME_EXEC_OFF if self._version >= _QUIET_SINCE else 0
        if syscall(_SYS_RESTRICT_SELF, self.descriptor, flags, None, None) != 0:
            raise SandboxUnavailable(LAYER, f"the kernel refuses the ruleset: {os.strerror(ctypes.get_errno())}")

    def close(self) -> None:
        """Close the descriptor; processes under the rules stay there."""
        os.close(self.descriptor)
