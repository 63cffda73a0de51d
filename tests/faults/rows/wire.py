"""Part Z: ZeroMQ and the wire."""

from __future__ import annotations

from typing import Final

from tests.faults.rows.row import Row

ROWS: Final = (
    Row(
        "Z10",
        "kill -9 of a host with 1,000 calls queued",
        "its queue is dropped, its slots and memory are back; others are served",
        "its pidfd",
    ),
    Row("Z11", "a host that never reads", "its session ends", "high-water mark, sends that do not block"),
    Row(
        "Z12",
        "one host floods a contract at ten times what it takes",
        "BUSY for that host, at once; others' calls to that contract and to others are answered",
        "bounded queues, fair over hosts",
    ),
    Row(
        "Z13",
        "1,500 silent connections; 300 to the descriptor socket; 10,000 connections (`make test-soak`)",
        "dropped; memory as before; new hosts are let in",
        "a limit for handshakes, and for channels without a name",
    ),
    Row(
        "Z15",
        "random bytes, HTTP, TLS, half a greeting, another mechanism, socket types that do not fit",
        "closed, at the latest by the handshake's limit, but for what looks like ZMTP 1.0; counted in `health`",
        "libzmq, and a monitor of its handshakes",
    ),
    Row(
        "Z16",
        "frames of more than 4.25 MiB, announced or sent, up to 2^63 bytes",
        "the connection is closed",
        "MAXMSGSIZE",
    ),
    Row(
        "Z16b",
        "silent connections that would take all descriptors of the broker",
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
    Row(
        "Z19",
        "wrong fields, versions and orders; slots and call ids that are in use",
        "BAD_REQUEST, StaleHandle; the range of versions",
        "the codec, the broker's books",
    ),
    Row("Z20", "bombs of msgpack", "BAD_REQUEST, or the peer is dropped", "every length has a bound"),
    Row("Z21", "a routing id that another host has", "no answer reaches the wrong host", "no handover; ids are random"),
    Row("Z24", "a second broker on the same endpoint", "it refuses to start", "a lock in the run directory"),
    Row("Z25", "stale sockets; a run directory that is too long or too open", "none; named", "checked before binding"),
    Row(
        "Z26", "the broker is down at connect, at send, while waiting", "UNAVAILABLE by the deadline", "pidfd, linger 0"
    ),
    Row("Z27", "a bridge that is used after a fork", "BridgeForked; the parent goes on", "os.register_at_fork"),
    Row("Z28", "a bridge that is used by many threads", "each gets its own answer", "call ids"),
)
