"""How much memory a worker may take with its contract, beyond what it has when it is given that.

The VM's own counter sees the Lua heap alone; what a contract takes by FFI or in C modules only the kernel can bound. It
counts two things: data (private memory that can be written: heaps, the Lua heap too, anonymous mappings) and address
space (all that is mapped, segments of hosts too).

Pure: it reads no file and sets no limit (`attributes.limit_memory`).

Source: getrlimit(2), proc_pid_statm(5); may_expand_vm and is_data_mapping in Linux mm/vma.c.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Self

from luacell.protocol.limits import MIB, RSS_HARD_FACTOR, RSS_MARGIN, TOTAL_MEMORY_MAX

_UNLIMITED_SIZE: Final = 1 << 63  # bytes; more than there can be


class Use(NamedTuple):
    """What a process has of memory, in bytes.

    Attributes:
        data: private memory that can be written, whether it was touched or not; with the stack, 132 KiB.
        address_space: all that is mapped.
        own: resident, and not shared; 0 where that is not known.
    """

    data: int
    address_space: int
    own: int


class Limits(NamedTuple):
    """What it may have at most, in bytes; as for `Use`."""

    data: int
    address_space: int

    def less(self, size: int) -> Self:
        """Return the same for a process that has given back as many bytes of data."""
        return self._replace(data=self.data - size)


UNLIMITED: Final = Limits(_UNLIMITED_SIZE, _UNLIMITED_SIZE)  # before a contract is given
# Where /proc does not tell. A worker that waits for its contract has far less.
SUPPOSED: Final = Use(64 * MIB, 512 * MIB, 0)


def use(statm: bytes, page_size: int) -> Use:
    """Return what a process has.

    Args:
        statm: content of its /proc/PID/statm; empty where that is not to be had.
        page_size: bytes.
    """
    if not statm:
        return SUPPOSED
    mapped, resident, shared, _, _, data, *_ = (int(field) * page_size for field in statm.split())
    return Use(data, mapped, resident - shared)


def limits(before: Use, memory: int, max_rss: int) -> Limits:
    """Return how much a worker may have with its contract.

    As data it may take what it would be retired at between two calls, RSS_HARD_FACTOR times `max_rss`: a call that
    takes more is stopped at the same point, and recycling comes long before. So many times `memory` at least, since a
    heap in pieces takes more than is in it. With RSS_MIN it is 128 MiB or more.

    Address space has the same on top of what all hosts together may have in segments: none of these fails to be mapped.

    Args:
        before: what it has when the contract is given.
        memory: bytes that its Lua heap may use.
        max_rss: bytes of its own at which it is recycled; 0 is `memory` and RSS_MARGIN.
    """
    size = headroom(memory, max_rss)
    return Limits(before.data + size, before.address_space + size + TOTAL_MEMORY_MAX)


def headroom(memory: int, max_rss: int) -> int:
    """Return how much of that is for the contract's data; see `limits`."""
    return RSS_HARD_FACTOR * max(max_rss or memory + RSS_MARGIN, memory)


def is_full(now: Use, most: Limits, heap_left: int) -> bool:
    """Whether it was the process that had no more memory when Lua could have none, and not the Lua heap.

    Lua asked for no more than was left to its heap, or its own counter would have refused it; and for more than was
    left to the process. The headroom is twice `memory`, so a heap that is full does not fill the process.

    Args:
        now: what the process has.
        most: what it may have.
        heap_left: bytes that the Lua heap may still take.
    """
    return most.data - now.data < heap_left


def excess(loaded: Use, max_rss: int) -> str:
    """Return why a contract that has loaded must not be served, or "".

    At `max_rss` its worker would be recycled at once, and so would be each that follows it.

    Args:
        loaded: what its worker has now.
        max_rss: bytes of its own at which a worker is recycled; 0 for never.
    """
    if not 0 < max_rss <= loaded.own:
        return ""
    have, bound = (f"{size / MIB:.0f} MiB" for size in (loaded.own, max_rss))
    return (
        f"its worker has {have} of memory as soon as it has loaded, and would be recycled for ever at max_rss {bound}: "
        "raise max_rss, or load less"
    )
