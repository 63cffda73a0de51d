"""Sealed memfds and their mappings.

A segment is one memfd of fixed size: sealed against shrinking and growing, so that nobody who holds it can
make another's access a SIGBUS, with its pages allocated up front, so that lack of memory is an error here and
not a signal later. It does not know what is stored in it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sys
from typing import Final

F_ADD_SEALS: Final = 1033
F_GET_SEALS: Final = 1034
SEAL_SEAL: Final = 0x01
SEAL_SHRINK: Final = 0x02
SEAL_GROW: Final = 0x04
SEAL_FUTURE_WRITE: Final = 0x10

SIZE_SEALS: Final = SEAL_SHRINK | SEAL_GROW
OUT_SEALS: Final = SIZE_SEALS | SEAL_SEAL
ARGS_SEALS: Final = SIZE_SEALS | SEAL_SEAL | SEAL_FUTURE_WRITE

_MAP_POPULATE: Final = 0x8000
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(3 * [ctypes.c_int]), ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def create_segment(name: str, size: int, seals: int) -> int:
    """Create a memfd with all its pages.

    Args:
        name: shown in /proc, for people.
        size: bytes, a multiple of the page size.
        seals: SEAL_* bits to add at once; SIZE_SEALS at least.

    Returns:
        A close-on-exec descriptor, owned by the caller.

    Raises:
        OSError: no memory, no descriptor, or no memfd on this system.
    """
    assert size > 0 and size % mmap.PAGESIZE == 0, size
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "luacell needs Linux: sealed memfds")
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, size)
        add_seals(fd, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def add_seals(fd: int, seals: int) -> None:
    """Add seals to a memfd.

    Raises:
        OSError: EPERM when it is sealed against more seals, EBUSY when a writable mapping stands against one.
    """
    fcntl.fcntl(fd, F_ADD_SEALS, seals)


def seals_of(fd: int) -> int:
    """Return the SEAL_* bits of a memfd.

    Raises:
        OSError: EINVAL when `fd` is no memfd.
    """
    return fcntl.fcntl(fd, F_GET_SEALS)


class Mapping:
    """A shared mapping of a whole segment; keeps no descriptor.

    Attributes:
        address: of the first byte, in this process.
        size: bytes.
        view: a memoryview of bytes over it; dies with the mapping, so it is never handed to a user.
    """

    __slots__ = ("address", "size", "view")

    def __init__(self, fd: int, size: int, *, writable: bool, populate: bool = True) -> None:
        """Map `size` bytes of `fd`, which stays with the caller.

        Raises:
            OSError: the kernel refused; EPERM for a writable mapping of a segment sealed against it.
        """
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        flags = mmap.MAP_SHARED | (_MAP_POPULATE if populate else 0)
        address = _libc.mmap(None, size, protection, flags, fd, 0)
        if address is None or address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot map {size} bytes: {os.strerror(code)}")
        self.address: int = address
        self.size = size
        view = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
        self.view = view if writable else view.toreadonly()

    def close(self) -> None:
        """Unmap; the view must not be used afterwards. Idempotent."""
        address, self.address = self.address, 0
        if address:
            self.view = memoryview(b"")
            _libc.munmap(address, self.size)
