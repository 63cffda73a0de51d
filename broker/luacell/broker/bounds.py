"""How many hosts, workers and segments a broker may have, so that it never runs out of descriptors.

libzmq aborts the process when its listener meets EMFILE (4.3.5, `ipc_listener.cpp:297`), so a part of the descriptors
is kept in reserve, and the rest is divided beforehand: what is refused is refused by name. The reserve is what
connections take in the time in which the gate hears of them.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from luacell.protocol.limits import SESSIONS_MAX, WORKERS_MAX

PER_HOST: Final = 3  # its connection, its descriptor channel, its pidfd
PER_WORKER: Final = 3  # its connection, its socketpair, its pidfd
PER_PAIR: Final = 2  # args and out, kept for workers that come later
PAIRS_MAX: Final = 1 << 16
OWN: Final = 64  # sockets, epolls, the registry's files; what channels without a name need is in the reserve
RESERVE_MIN: Final = 768  # where there are enough; a connection takes libzmq some 20 us: the gate may be 10 ms late


class Bounds(NamedTuple):
    """What there may be at one time."""

    hosts: int = SESSIONS_MAX
    workers: int = WORKERS_MAX
    pairs: int = PAIRS_MAX


def bounds_for(descriptors: int) -> Bounds:
    """Divide the descriptors that this process may open.

    Args:
        descriptors: RLIMIT_NOFILE.
    """
    usable = max(0, usable_descriptors(descriptors) - OWN)
    return Bounds(
        hosts=min(SESSIONS_MAX, max(1, usable // 5 // PER_HOST)),
        workers=min(WORKERS_MAX, max(2, usable * 2 // 5 // PER_WORKER)),
        pairs=min(PAIRS_MAX, max(2, usable * 2 // 5 // PER_PAIR)),
    )


def usable_descriptors(descriptors: int) -> int:
    """Return how many descriptors may be in use while new connections are accepted.

    Args:
        descriptors: RLIMIT_NOFILE.
    """
    return descriptors - max(descriptors // 5, min(RESERVE_MIN, descriptors * 5 // 8 - OWN))
