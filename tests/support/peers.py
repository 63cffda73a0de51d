"""Peers that speak the protocol by hand, so that they can break it: hosts, and strangers on both sockets."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

from luacell.client import AbiErrorCode
from luacell.protocol import headers, messages
from luacell.protocol.headers import HAS_ARGS, HAS_OUT, Op, head
from luacell.protocol.memory.channel import ChannelClosed, connect_channel, receive_message, send_message
from luacell.protocol.memory.segments import Mapping
from luacell.protocol.messages import Message, decode, encode, id_bytes
from luacell.protocol.paths import BROKER_SOCKET, DESCRIPTOR_SOCKET
from luacell.protocol.slots import write_generation
from tests.support.waiting import LIMIT_S

HOST = encode(messages.Hello(role="host"))
PROBE = encode(messages.Probe())


class Grant:
    """A pair of segments as a peer got it: mapped, and with the descriptors still open."""

    def __init__(self, segment: messages.Segment, args_fd: int, out_fd: int) -> None:
        self.segment = segment
        self.arena = segment.arena
        self.args_fd = args_fd
        self.out_fd = out_fd
        self.slot = segment.index << 16
        self.args = Mapping(args_fd, segment.count * segment.args_stride, writable=True)

    def stamp(self, generation: int, position: int = 0) -> None:
        """Write a slot's generation, as its host does before a call."""
        write_generation(self.args.view, position * self.segment.args_stride, generation)

    def close(self) -> None:
        self.args.close()
        os.close(self.args_fd)
        os.close(self.out_fd)


class Peer:
    """A local host made by hand: it has introduced itself on both channels unless told otherwise."""

    def __init__(self, run_directory: str | Path, *, greet: bool = True, receive_high_water_mark: int = 0) -> None:
        self._directory = Path(run_directory)
        self._receive_high_water_mark = receive_high_water_mark
        self._grants: list[Grant] = []
        self._last_id = 0
        self.channel = channel(run_directory)
        send_message(self.channel, HOST)
        message, _ = receive_message(self.channel)
        self.routing_id = decode(messages.Welcome, message).routing_id
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.dealer = self.connect(self.routing_id)
        if greet:
            self.send(HOST)
            assert self.operation() is Op.WELCOME

    def connect(self, routing_id: bytes) -> zmq.Socket[bytes]:
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, routing_id)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVHWM, self._receive_high_water_mark)
        dealer.setsockopt(zmq.RCVTIMEO, int(LIMIT_S * 1000))
        dealer.setsockopt(zmq.SNDTIMEO, int(LIMIT_S * 1000))
        dealer.connect(f"ipc://{self._directory / BROKER_SOCKET}")
        return dealer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.channel.close()
        for grant in self._grants:
            grant.close()
        self._context.destroy(linger=0)

    # -- what it says --------------------------------------------------------------------------------------
    def send(self, *frames: bytes) -> None:
        self.dealer.send_multipart(frames)

    def tell(self, message: Message) -> None:
        self.send(encode(message))

    def call(self, **fields: int) -> None:
        """Send one CALL; fields that are not given are 0."""
        self.send(headers.encode_records(Op.CALL, [call_record(**fields)]))

    def new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    # -- what it hears -------------------------------------------------------------------------------------
    def receive(self) -> bytes:
        return self.dealer.recv()

    def operation(self) -> Op:
        return headers.parse_preamble(self.receive())[0]

    def failure(self) -> messages.Failure:
        """Receive a FAILURE."""
        return decode(messages.Failure, self.receive())

    def refused_with(self) -> AbiErrorCode:
        return AbiErrorCode(self.failure().code)

    def result(self) -> headers.Result:
        message = self.receive()
        op, count = headers.parse_preamble(message)
        assert op is Op.RESULT, op
        (record,) = headers.parse_records(op, count, message)
        return headers.Result._make(record)

    def released(self) -> list[int]:
        """Receive a RELEASED; return its call ids."""
        message = self.receive()
        op, count = headers.parse_preamble(message)
        assert op is Op.RELEASED, op
        return [call_id for (call_id,) in headers.parse_records(op, count, message)]

    def answer(self) -> tuple[int, int]:
        """Receive the answer to a call, whichever it is; return call id and code."""
        message = self.receive()
        op, count = headers.parse_preamble(message)
        if op is Op.RESULT:
            (record,) = headers.parse_records(op, count, message)
            return record[0], record[1]
        failed = decode(messages.Failure, message)
        return failed.call_id, failed.code

    def reply(self) -> messages.Reply:
        return decode(messages.Reply, self.receive())

    def is_served(self) -> bool:
        """Ask for the service's health and tell whether the answer comes."""
        request = self.new_id()
        self.tell(messages.Health(request_id=request))
        return self.reply().request_id == request

    def lease(self, contract_id: int, size: int = 64, count: int = 4, *, mapped: bool = True) -> Grant:
        """Get a pair of segments."""
        request = messages.Lease(
            request_id=self.new_id(),
            contract=id_bytes(contract_id),
            args_size=size,
            out_size=size,
            count=count,
        )
        self.tell(request)
        message, descriptors = receive_message(self.channel)
        grant = Grant(decode(messages.Segment, message), *descriptors)
        self._grants.append(grant)
        if mapped:
            self.tell(messages.Mapped(arena=grant.arena, index=grant.segment.index))
        return grant


def call_record(**fields: int) -> headers.Call:
    return headers.Call(**(dict.fromkeys(headers.Call._fields, 0) | fields))


def channel(run_directory: str | Path) -> socket.socket:
    """Connect to the descriptor socket and say nothing."""
    return connect_channel(Path(run_directory) / DESCRIPTOR_SOCKET, LIMIT_S)


def is_closed_by_peer(connection: socket.socket) -> bool:
    """Tell whether the other side closes a descriptor channel, whatever it says before."""
    try:
        while True:
            receive_message(connection)
    except ChannelClosed:
        return True
    except TimeoutError:
        return False


class RawStream:
    """A byte stream to the ROUTER's socket, below ZeroMQ."""

    def __init__(self, run_directory: str | Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(LIMIT_S)
        self._socket.connect(os.fspath(Path(run_directory) / BROKER_SOCKET))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def introduce(self) -> None:
        """Go through the handshake of ZMTP 3.0 as a DEALER without an identity."""
        self.present(b"DEALER")
        self.expect(64 + 2)

    def present(self, kind: bytes) -> None:
        """Say the greeting and the READY of a socket of a kind, without waiting for the other side's."""
        properties = _property("Socket-Type", kind) + _property("Identity", b"")
        body = b"\x05READY" + properties
        self.send(b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
        self.send(b"\x04" + bytes([len(body)]) + body)

    def expect(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            chunk = self._socket.recv(size - len(received))
            assert chunk, "closed during the handshake"
            received += chunk
        return received

    def is_closed(self) -> bool:
        """Tell whether the broker closes the connection, whatever it says before."""
        give_up_s = time.monotonic() + LIMIT_S
        try:
            while time.monotonic() < give_up_s:
                if not self._socket.recv(65536):
                    return True
        except ConnectionError:
            return True
        except TimeoutError:
            pass
        return False


def _property(name: str, value: bytes) -> bytes:
    return bytes([len(name)]) + name.encode() + len(value).to_bytes(4, "big") + value


def send_raw(connection: socket.socket, data: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send a message of any kind over a descriptor channel."""
    socket.send_fds(connection, [data], list(descriptors))


class InlinePeer:
    """A host without shared memory, made by hand: it has introduced itself unless told otherwise.

    Args:
        address: of the ROUTER, as libzmq takes it.
    """

    def __init__(
        self, address: str, *, greet: bool = True, routing_id: bytes | None = None, receive_high_water_mark: int = 0
    ) -> None:
        self.routing_id = b"\x02" + os.urandom(15) if routing_id is None else routing_id
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.dealer = self._context.socket(zmq.DEALER)
        if self.routing_id:
            self.dealer.setsockopt(zmq.ROUTING_ID, self.routing_id)
        self.dealer.setsockopt(zmq.LINGER, 0)
        self.dealer.setsockopt(zmq.SNDHWM, 0)
        self.dealer.setsockopt(zmq.RCVHWM, receive_high_water_mark)
        self.dealer.setsockopt(zmq.RCVTIMEO, int(LIMIT_S * 1000))
        self.dealer.connect(address)
        if greet:
            self.tell(messages.Hello(role="inline"))
            decode(messages.Welcome, self.receive())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take leave; without that the broker would find out a second later."""
        if not self.dealer.closed:
            with suppress(zmq.Again):
                self.dealer.send(encode(messages.Bye()), zmq.NOBLOCK)
        self._context.destroy(linger=100)

    # -- what it says --------------------------------------------------------------------------------------
    def send(self, *frames: bytes) -> None:
        self.dealer.send_multipart(frames)

    def tell(self, message: Message) -> None:
        self.send(encode(message))

    def call(self, contract_id: int, call_id: int, first: bytes = b"", **fields: int) -> None:
        """Send CALL_INLINE with a first piece; fields that are not given are as it says."""
        given = {"contract_id": contract_id, "call_id": call_id, "args_size": len(first), "out_size": 0} | fields
        given.setdefault("flags", (HAS_ARGS if given["args_size"] else 0) | (HAS_OUT if given["out_size"] else 0))
        record = headers.CallInline(**(dict.fromkeys(headers.CallInline._fields, 0) | given))
        self.send(head(Op.CALL_INLINE) + headers.CALL_INLINE.pack(*record) + first)

    def piece(self, call_id: int, offset: int, data: bytes) -> None:
        self.send(headers.encode_inline(Op.PIECE, (call_id, offset, len(data)), data))

    def more(self, call_id: int, offset: int) -> None:
        self.send(headers.encode_records(Op.MORE, [(call_id, offset, 0)]))

    def cancel(self, call_id: int) -> None:
        self.send(headers.encode_records(Op.CANCEL, [(call_id,)]))

    # -- what it hears -------------------------------------------------------------------------------------
    def receive(self) -> bytes:
        """Receive the next message that is no PROBE."""
        while True:
            message = self.dealer.recv()
            if message != PROBE:
                return message

    def failure(self) -> messages.Failure:
        return decode(messages.Failure, self.receive())

    def credit(self) -> headers.More:
        """Receive a MORE."""
        (record,) = _records(self.receive(), Op.MORE)
        return headers.More._make(record)

    def released(self) -> int:
        ((call_id,),) = _records(self.receive(), Op.RELEASED)
        return call_id

    def result(self) -> tuple[headers.Result, bytes]:
        """Receive a RESULT_INLINE and the first piece."""
        record, piece = _with_piece(self.receive(), Op.RESULT_INLINE)
        return headers.Result._make(record), piece

    def next_piece(self) -> tuple[headers.Piece, bytes]:
        record, piece = _with_piece(self.receive(), Op.PIECE)
        return headers.Piece._make(record), piece

    def drain(self) -> None:
        """Receive until everything that was sent so far has been answered."""
        self.tell(messages.Health(request_id=76))
        while True:
            message = self.receive()
            if headers.parse_preamble(message)[0] is Op.REPLY and decode(messages.Reply, message).request_id == 76:
                return

    def is_silent(self, limit_ms: int) -> bool:
        """Tell whether nothing but PROBE comes for a while."""
        until_s = time.monotonic() + limit_ms / 1000
        while (left_ms := int((until_s - time.monotonic()) * 1000)) > 0:
            if self.dealer.poll(left_ms) and self.dealer.recv() != PROBE:
                return False
        return True

    def is_served(self) -> bool:
        """Ask for the service's health and tell whether the answer comes."""
        self.tell(messages.Health(request_id=77))
        return decode(messages.Reply, self.receive()).request_id == 77


def _records(message: bytes, wanted: Op) -> list[tuple[int, ...]]:
    op, count = headers.parse_preamble(message)
    assert op is wanted, op
    return list(headers.parse_records(op, count, message))


def _with_piece(message: bytes, wanted: Op) -> tuple[tuple[int, ...], bytes]:
    op, count = headers.parse_preamble(message)
    assert op is wanted, op
    record, piece = headers.parse_inline(op, count, message)
    return record, bytes(piece)
