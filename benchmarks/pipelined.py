"""A host that keeps many calls in flight from one thread, in the broker's own protocol: as fast as a host can be.

It writes arguments into its slots and reads results out of them, as any host does. It gets its memory and its names
by hand, as `docs/protocol.md` describes a client.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from luacell.protocol import headers, messages
from luacell.protocol.headers import HAS_ARGS, HAS_OUT, SLOT_FREE, Op
from luacell.protocol.identity import HostContractId
from luacell.protocol.memory.channel import connect_channel, receive_message, send_message
from luacell.protocol.memory.segments import Mapping
from luacell.protocol.messages import decode, encode, id_bytes
from luacell.protocol.paths import BROKER_SOCKET, DESCRIPTOR_SOCKET
from luacell.protocol.slots import PAYLOAD_OFFSET, SLOT_SHIFT, write_generation

BUDGET_US = 5_000_000
LIMIT_S = 20.0


def join(context: zmq.Context[zmq.Socket[bytes]], run_directory: Path) -> tuple[socket.socket, zmq.Socket[bytes]]:
    """Introduce a host to the broker; return its descriptor channel and its connection."""
    channel = connect_channel(run_directory / DESCRIPTOR_SOCKET, LIMIT_S)
    hello = encode(messages.Hello(role="host"))
    send_message(channel, hello)
    routing_id = decode(messages.Welcome, receive_message(channel)[0]).routing_id
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.ROUTING_ID, routing_id)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.RCVTIMEO, int(LIMIT_S * 1000))
    dealer.connect(f"ipc://{run_directory / BROKER_SOCKET}")
    dealer.send(hello)
    decode(messages.Welcome, dealer.recv())
    return channel, dealer


class PipelinedHost:
    """One host, one contract, `slots` calls in flight at most; the function id is the size of the payload."""

    def __init__(self, run_directory: Path, contract: str, payload: bytes, slots: int) -> None:
        name, _, major = contract.partition("@")
        self._contract_id = int(HostContractId(name, int(major)))
        self._payload = payload
        self._last_id = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._channel, self._dealer = join(self._context, run_directory)
        self._lease(slots)

    def _lease(self, slots: int) -> None:
        size = len(self._payload)
        lease = messages.Lease(
            request_id=1, contract=id_bytes(self._contract_id), args_size=size, out_size=size, count=slots
        )
        self._dealer.send(encode(lease))
        message, descriptors = receive_message(self._channel)
        segment = decode(messages.Segment, message)
        self._args = Mapping(descriptors[0], segment.count * segment.args_stride, writable=True)
        self._out = Mapping(descriptors[1], segment.count * segment.out_stride, writable=False)
        for descriptor in descriptors:
            os.close(descriptor)
        self._segment = segment
        self._generations = [1] * segment.count
        self._dealer.send(encode(messages.Mapped(arena=segment.arena, index=segment.index)))

    def _record(self, position: int) -> tuple[int, ...]:
        """Prepare the call of a slot."""
        segment, payload = self._segment, self._payload
        size, start = len(payload), position * segment.args_stride
        self._last_id += 1
        generation = self._generations[position]
        write_generation(self._args.view, start, generation)
        self._args.view[start + PAYLOAD_OFFSET : start + PAYLOAD_OFFSET + size] = payload
        call_id = self._last_id << 16 | position
        slot = segment.index << SLOT_SHIFT | position
        flags = HAS_ARGS | HAS_OUT
        return call_id, self._contract_id, size, BUDGET_US, segment.arena, slot, generation, flags, size, size

    def _receive(self) -> tuple[int, list[int]]:
        """Read the results in one message; return how many, and the slots that are free."""
        message = self._dealer.recv()
        op, count = headers.parse_preamble(message)
        records = headers.parse_records(op, count, message)
        if op is Op.RELEASED:
            return 0, [self._free(call_id) for (call_id,) in records]
        assert op is Op.RESULT, op.name
        free = []
        for call_id, code, _, _, flags in records:
            start = (call_id & 0xFFFF) * self._segment.out_stride + PAYLOAD_OFFSET
            if code or self._out.view[start : start + len(self._payload)] != self._payload:
                raise AssertionError(f"call {call_id} was answered with code {code}")
            if flags & SLOT_FREE:
                free.append(self._free(call_id))
        return count, free

    def _free(self, call_id: int) -> int:
        position = call_id & 0xFFFF
        self._generations[position] += 1
        return position

    def run(self, calls: int, in_flight: int, *, together: bool) -> float:
        """Make calls; return how many were answered per second.

        Args:
            calls: in all.
            in_flight: at any time.
            together: whether calls that can leave at once share a message.
        """
        send = self._dealer.send
        start_s = time.perf_counter()
        left, open_count = calls, 0
        free = list(range(in_flight))
        while left or open_count:
            records = [self._record(position) for position in free[:left]]
            left -= len(records)
            open_count += len(records)
            if together and records:
                send(headers.encode_records(Op.CALL, records))
            else:
                for record in records:
                    send(headers.encode_records(Op.CALL, [record]))
            count, freed = self._receive()
            free = free[len(records) :] + freed
            open_count -= count
        return calls / (time.perf_counter() - start_s)

    def close(self) -> None:
        self._channel.close()
        self._args.close()
        self._out.close()
        self._context.destroy(linger=0)


@contextmanager
def pipelined_host(run_directory: Path, contract: str, payload: bytes, slots: int) -> Iterator[PipelinedHost]:
    host = PipelinedHost(run_directory, contract, payload, slots)
    try:
        yield host
    finally:
        host.close()
