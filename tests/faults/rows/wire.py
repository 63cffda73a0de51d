"""Part Z: ZeroMQ and the wire."""

from __future__ import annotations

from typing import Final

from tests.faults.rows.row import Row

ROWS: Final = (
    Row(
        "Z16b",
        "80 % of the broker's descriptors taken by silent connections",
        "accepting pauses until they are dropped; hosts are served on",
        "a gate that takes the socket's name away",
    ),
    Row(
        "Z17",
        "one message of 1,000,000 frames, empty or posing as messages",
        "the host is dropped; others' p99 under 50 ms",
        "the rest of a message is dropped, its connection cut",
    ),
    Row("Z18", "malformed and mutated frames, from every side", "BAD_REQUEST, or the peer is dropped", "the codec"),
    Row("Z20", "bombs of msgpack", "BAD_REQUEST, or the peer is dropped", "every length has a bound"),
    Row("Z24", "a second broker on the same endpoint", "it refuses to start", "a lock in the run directory"),
    Row("Z25", "stale sockets; a run directory that is too long or too open", "none; named", "checked before binding"),
    Row(
        "Z26", "the broker is down at connect, at send, while waiting", "UNAVAILABLE by the deadline", "pidfd, linger 0"
    ),
    Row("Z27", "a bridge that is used after a fork", "BridgeForked; the parent goes on", "os.register_at_fork"),
    Row("Z28", "a bridge that is used by many threads", "each gets its own answer", "call ids"),
)
