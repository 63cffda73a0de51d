"""A peer that breaks the protocol is told so or shut out; the broker and its other hosts never notice."""

from __future__ import annotations

import fcntl
import os
import random
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import zmq

from luacell.client import AbiErrorCode, BridgeNotInitialized, LuaFunction, LuaHostBridge, Unavailable
from luacell.protocol import codec, headers, messages
from luacell.protocol.headers import HAS_ARGS, HAS_OUT, PREAMBLE, Op, encode_records, head
from luacell.protocol.limits import DEADLINE_MAX_US, MESSAGE_MAX, PAYLOAD_MAX
from luacell.protocol.memory.channel import send_message
from luacell.protocol.memory.segments import F_ADD_SEALS, SEAL_SEAL
from luacell.protocol.messages import encode
from luacell.protocol.paths import (
    BROKER_SOCKET,
    BROKER_SOCKET_ASIDE,
    DESCRIPTOR_SOCKET,
    LOCK_FILE,
    STATE_DIRECTORY,
)
from tests.support.contracts import DOUBLE, HEALTHY, PROBE, answers, deploy, function
from tests.support.peers import HOST, Peer, RawStream, call_record, channel, is_closed_by_peer, send_raw
from tests.support.processes import Process, Processes, broker_pid, has_its_spares, run_directory
from tests.support.serving import Serving, run_broker
from tests.support.waiting import eventually, settles

BAD_REQUEST = AbiErrorCode.BAD_REQUEST
STALE = AbiErrorCode.STALE_HANDLE
UNAUTHORIZED = AbiErrorCode.UNAUTHORIZED
BOTH = HAS_ARGS | HAS_OUT
U32 = (1 << 32) - 1
U64 = (1 << 64) - 1

GARBAGE = random.Random(1).randbytes(2000)


@pytest.fixture
def healthy(bridge: LuaHostBridge) -> Iterator[LuaHostBridge]:
    """A bridge that uses the same broker, before and after."""
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
    assert answers(bridge, HEALTHY)
    before = broker_pid(bridge)
    yield bridge
    assert answers(bridge, HEALTHY)
    assert broker_pid(bridge) == before


@pytest.fixture
def directory(healthy: LuaHostBridge) -> str:
    return run_directory(broker_pid(healthy))


@pytest.fixture
def peer(directory: str) -> Iterator[Peer]:
    with Peer(directory) as peer:
        yield peer


@pytest.fixture
def contract_id(healthy: LuaHostBridge) -> int:
    return next(contract.id for contract in healthy.contracts() if str(contract) == HEALTHY)


# -- over the ROUTER --------------------------------------------------------------------------------------
def hello_with(**fields: object) -> bytes:
    return head(Op.HELLO) + codec.pack({"role": "host", "version": 1} | fields)


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param((GARBAGE,), id="random bytes"),
        pytest.param((b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",), id="HTTP"),
        pytest.param((b"",), id="an empty frame"),
        pytest.param((b"LC\x01",), id="half a preamble"),
        pytest.param((PREAMBLE.pack(b"LC", 0, Op.HELLO, 1, 0),), id="version 0"),
        pytest.param((PREAMBLE.pack(b"LC", 2, Op.HELLO, 1, 0) + HOST[8:],), id="a later version"),
        pytest.param((PREAMBLE.pack(b"LC", 1, 200, 1, 0),), id="an unknown operation"),
        pytest.param((PREAMBLE.pack(b"LC", 1, Op.CALL, 0, 0),), id="no records"),
        pytest.param((PREAMBLE.pack(b"LC", 1, Op.CALL, 65535, 0),), id="too many records"),
        pytest.param((PREAMBLE.pack(b"LC", 1, Op.CALL, 1, 7),), id="reserved bytes in use"),
        pytest.param((b"LC", b"LC"), id="two frames"),
        pytest.param((b"LC",) * 3, id="three frames"),
        pytest.param((b"",) * 1000, id="a thousand frames"),
        pytest.param((head(Op.CALL) + bytes(47),), id="a truncated call"),
        pytest.param((head(Op.CALL) + bytes(49),), id="a call that is too long"),
        pytest.param((head(Op.CALL, 2) + bytes(48),), id="one call for two"),
        pytest.param((head(Op.CANCEL) + bytes(3),), id="a truncated cancel"),
        pytest.param((head(Op.DONE) + bytes(24),), id="a worker's answer"),
        pytest.param((encode(messages.Ready(pid=1)),), id="a worker's readiness"),
        pytest.param((encode(messages.Exited(worker=1)),), id="a worker host's report"),
        pytest.param((encode(messages.Kill(worker=1)),), id="an order to the worker host"),
        pytest.param((head(Op.HEALTH) + b"\xc1",), id="no msgpack"),
        pytest.param((head(Op.HEALTH) + b"\xdf\xff\xff\xff\xff",), id="a map of 2^32 entries"),
        pytest.param((head(Op.HEALTH) + b"\x91" * 100_000,), id="lists nested 100,000 deep"),
        pytest.param((head(Op.HEALTH) + b"\x93\x01\x02\x03",), id="a list for a map"),
        pytest.param((hello_with(extra=1),), id="a field too many"),
        pytest.param((hello_with(version="1"),), id="a field of another type"),
        pytest.param((hello_with(version=U64),), id="a number out of range"),
        pytest.param((hello_with(role="worker-host"),), id="the role of a worker host"),
        pytest.param((hello_with(role="king"),), id="an unknown role"),
    ],
)
def test_z18_malformed_message_is_a_bad_request(peer: Peer, frames: tuple[bytes, ...]) -> None:
    peer.send(*frames)
    failed = peer.failure()
    assert (failed.call_id, failed.code) == (0, BAD_REQUEST)
    assert failed.message
    assert peer.is_served()


def test_z18_frames_behind_the_first_come_between_nobody(healthy: LuaHostBridge, peer: Peer) -> None:
    health = encode(messages.Health(request_id=1))
    tails = [(b"",), (bytes(16),), (peer.routing_id,), (peer.routing_id, health), (peer.routing_id,) * 3, (HOST,) * 100]
    failures: list[int] = []

    def call() -> None:
        failures.extend(number for number in range(1000) if not answers(healthy, HEALTHY, number))

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(call) for _ in range(2)]
        while not all(future.done() for future in calls):
            for tail in tails:
                peer.send(health, *tail)
                while peer.dealer.poll(0):
                    peer.receive()
        for future in calls:
            future.result()
    assert failures == []


def test_z19_version_out_of_range_is_answered_with_the_range(peer: Peer) -> None:
    peer.send(PREAMBLE.pack(b"LC", 9, Op.HEALTH, 1, 0))
    assert "version 9 is outside 1..1" in peer.failure().message


def test_z19_operation_before_hello_is_refused(directory: str) -> None:
    with Peer(directory, greet=False) as peer:
        peer.tell(messages.Health(request_id=1))
        failed = peer.failure()
        assert (failed.code, failed.message) == (BAD_REQUEST, "operation HEALTH before HELLO")


def test_hello_twice_is_welcomed_twice(peer: Peer, contract_id: int) -> None:
    grant = peer.lease(contract_id)
    peer.send(HOST)
    assert peer.operation() is Op.WELCOME
    grant.stamp(1)
    peer.call(call_id=1, contract_id=contract_id, arena=grant.arena, slot=grant.slot, generation=1, **SIZES)
    assert peer.result().code == 0


def test_stranger_to_the_descriptor_socket_is_refused_on_the_router(directory: str) -> None:
    with Peer(directory) as known:
        stranger = known.connect(b"an identity of 1")
        stranger.send(HOST)
        failed = messages.decode(messages.Failure, stranger.recv())
        assert failed.code == BAD_REQUEST
        assert "descriptor socket" in failed.message
        stranger.close()


def test_z16_oversized_message_closes_its_connection_only(peer: Peer) -> None:
    monitor = peer.dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    peer.send(head(Op.HEALTH) + bytes(MESSAGE_MAX))
    try:
        assert monitor.poll(10_000), "the connection was not closed"
    finally:
        peer.dealer.disable_monitor()
        monitor.close(linger=0)


@contextmanager
def counted(bridge: LuaHostBridge) -> Iterator[None]:
    """Expect one connection that is no peer's, and that `health` counts it as such."""
    eventually(lambda: has_its_spares(bridge), "no worker is about to connect")
    before = bridge.health()["connections"]["strangers"]
    yield
    strangers = eventually(
        lambda: found if (found := bridge.health()["connections"]["strangers"]) > before else None, "it is counted"
    )
    assert strangers == before + 1


@pytest.mark.parametrize(
    ("data", "is_recognised"),
    [
        # libzmq takes both for a peer of its first protocol version, and waits for more.
        pytest.param(GARBAGE, False, id="random bytes"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", False, id="HTTP"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), True, id="TLS"),
        pytest.param(b"\xff" + bytes(8) + b"\x7f\x03\x00PLAIN" + bytes(47), True, id="another mechanism"),
    ],
)
def test_z15_stream_that_is_no_zmtp_harms_nobody_and_is_counted(
    healthy: LuaHostBridge, directory: str, data: bytes, is_recognised: bool
) -> None:
    with counted(healthy), RawStream(directory) as stream:
        stream.send(data)
        assert answers(healthy, HEALTHY)
        assert not is_recognised or stream.is_closed()


@pytest.mark.parametrize("kind", [b"PUB", b"SUB", b"PAIR", b"no kind at all"])
def test_z15_socket_of_a_kind_that_does_not_fit_is_closed_and_counted(
    healthy: LuaHostBridge, directory: str, kind: bytes
) -> None:
    with counted(healthy), RawStream(directory) as stream:
        stream.present(kind)
        assert stream.is_closed()


def test_z15_half_a_greeting_is_closed_in_time_and_counted(healthy: LuaHostBridge, directory: str) -> None:
    with counted(healthy), RawStream(directory) as stream:
        stream.send(b"\xff" + bytes(8))
        assert stream.is_closed()


def test_hosts_and_workers_that_come_and_go_are_no_strangers(healthy: LuaHostBridge, directory: str) -> None:
    def strangers() -> int:
        found: int = healthy.health()["connections"]["strangers"]
        return found

    eventually(lambda: has_its_spares(healthy), "no worker is about to connect")
    before, handshakes = strangers(), healthy.health()["connections"]["handshakes"]
    with LuaHostBridge.connect(directory) as another:
        deploy(another, DOUBLE)
        assert answers(another, PROBE)
    settles(strangers, before, "all of them have shaken hands")
    assert healthy.health()["connections"]["handshakes"] > handshakes


@pytest.mark.parametrize("size", [MESSAGE_MAX + 1, 1 << 40, U64 >> 1])
def test_z16_announcement_of_a_giant_frame_closes_the_connection(directory: str, size: int) -> None:
    with RawStream(directory) as stream:
        stream.introduce()
        stream.send(b"\x02" + size.to_bytes(8, "big"))
        assert stream.is_closed()


# -- calls ------------------------------------------------------------------------------------------------
SIZES = {"flags": BOTH, "args_size": 4, "out_size": 4}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        pytest.param({"arena": 10_000}, STALE, id="an arena that never was"),
        pytest.param({"arena": 0}, STALE, id="arena 0"),
        pytest.param({"arena": U32}, STALE, id="the largest arena"),
        pytest.param({"slot": 4}, STALE, id="a position behind the last"),
        pytest.param({"slot": 0xFFFF}, STALE, id="the largest position"),
        pytest.param({"slot": 1 << 16}, STALE, id="a pair that never was"),
        pytest.param({"slot": U32}, STALE, id="the largest slot"),
        pytest.param({"generation": 0}, STALE, id="a generation before"),
        pytest.param({"generation": 1 + (1 << 31)}, STALE, id="a generation too far ahead"),
        pytest.param({"generation": U32}, STALE, id="the largest generation"),
        pytest.param({"args_size": 4096 - 128 + 1}, BAD_REQUEST, id="args beyond the slot"),
        pytest.param({"out_size": 8192 - 128 + 1}, BAD_REQUEST, id="out beyond the slot"),
        pytest.param({"args_size": U32, "out_size": U32}, BAD_REQUEST, id="sizes that overflow"),
        pytest.param({"args_size": PAYLOAD_MAX + 1}, BAD_REQUEST, id="args over the limit"),
        pytest.param({"flags": 4 | BOTH}, BAD_REQUEST, id="an unknown flag"),
        pytest.param({"flags": U32}, BAD_REQUEST, id="all flags"),
        pytest.param({"flags": HAS_OUT}, BAD_REQUEST, id="args without their flag"),
        pytest.param({"flags": HAS_ARGS}, BAD_REQUEST, id="out without its flag"),
        pytest.param({"budget_us": DEADLINE_MAX_US + 1}, BAD_REQUEST, id="a budget over the limit"),
        pytest.param({"call_id": 0}, BAD_REQUEST, id="call id 0"),
        pytest.param({"contract_id": 9999}, AbiErrorCode.HOST_CONTRACT_NOT_FOUND, id="an unknown contract"),
        pytest.param(dict.fromkeys(headers.Call._fields, U32), AbiErrorCode.HOST_CONTRACT_NOT_FOUND, id="all bits"),
    ],
)
def test_z19_call_with_a_wrong_field_is_refused(
    peer: Peer, contract_id: int, fields: dict[str, int], code: AbiErrorCode
) -> None:
    grant = peer.lease(contract_id)
    good = {
        "call_id": 7,
        "contract_id": contract_id,
        "arena": grant.arena,
        "slot": grant.slot,
        "generation": 1,
        **SIZES,
    }
    peer.call(**(good | fields))
    failed = peer.failure()
    assert (failed.code, failed.call_id) == (code, fields.get("call_id", 7))
    assert failed.slot == "unused"
    assert failed.began == "no"
    grant.stamp(1)
    peer.call(**(good | {"call_id": 8}))
    assert peer.result().code == 0, "the slot was not used up by the refusal"


@pytest.fixture
def other(directory: str) -> Iterator[Peer]:
    with Peer(directory) as other:
        yield other


def test_arena_of_another_host_is_unauthorized(peer: Peer, other: Peer, contract_id: int) -> None:
    theirs = other.lease(contract_id)
    mine = peer.lease(contract_id)
    peer.call(call_id=1, contract_id=contract_id, arena=theirs.arena, slot=theirs.slot, generation=1, **SIZES)
    assert peer.refused_with() is UNAUTHORIZED
    peer.tell(messages.GiveBack(arena=theirs.arena, index=0))
    assert peer.refused_with() is BAD_REQUEST
    for each, grant in ((other, theirs), (peer, mine)):
        grant.stamp(1)
        each.call(call_id=2, contract_id=contract_id, arena=grant.arena, slot=grant.slot, generation=1, **SIZES)
        assert each.result().code == 0


def test_arena_of_another_contract_is_unauthorized(peer: Peer, healthy: LuaHostBridge, contract_id: int) -> None:
    healthy.register_host_contract(4242, LuaFunction(DOUBLE))
    grant = peer.lease(contract_id)
    peer.call(call_id=1, contract_id=4242, arena=grant.arena, slot=grant.slot, generation=1, **SIZES)
    assert peer.refused_with() is UNAUTHORIZED


def test_z19_slot_and_call_id_in_flight_are_refused(peer: Peer, healthy: LuaHostBridge) -> None:
    name = deploy(healthy, function("while true do end"), PROBE, deadline="400ms")
    contract_id = next(contract.id for contract in healthy.contracts() if str(contract) == name)
    grant = peer.lease(contract_id)
    grant.stamp(1)
    call = {"contract_id": contract_id, "arena": grant.arena, "generation": 1, **SIZES}
    peer.call(call_id=1, slot=0, **call)
    peer.call(call_id=2, slot=0, **call)
    peer.call(call_id=1, slot=1, **call)
    second, third = peer.failure(), peer.failure()
    assert (second.call_id, second.code) == (2, BAD_REQUEST)
    assert (third.call_id, third.code) == (1, BAD_REQUEST)
    assert peer.answer() == (1, AbiErrorCode.DEADLINE_EXCEEDED)


def test_calls_in_one_message_are_judged_one_by_one(peer: Peer, contract_id: int) -> None:
    grant = peer.lease(contract_id)
    grant.stamp(1, position=0)
    grant.stamp(1, position=2)
    good = {"contract_id": contract_id, "arena": grant.arena, "generation": 1, **SIZES}
    records = [
        call_record(call_id=1 + slot, slot=slot, **(good | {"flags": 8 if slot == 1 else BOTH})) for slot in range(3)
    ]
    peer.send(encode_records(Op.CALL, list(records)))
    found = dict(peer.answer() for _ in records)
    assert found == {1: 0, 2: BAD_REQUEST, 3: 0}


def test_cancel_of_an_unknown_call_is_told_that_nobody_touches_its_slot(peer: Peer) -> None:
    peer.send(encode_records(Op.CANCEL, [(12345,), (U64,)]))
    assert [*peer.released(), *peer.released()] == [12345, U64]
    assert peer.is_served()


# -- memory -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("index", [1, 65535])
def test_mapped_for_what_was_not_granted_is_refused(peer: Peer, contract_id: int, index: int) -> None:
    grant = peer.lease(contract_id)
    for arena in (grant.arena, grant.arena + 1000, 0, U32):
        peer.tell(messages.Mapped(arena=arena, index=index))
        assert peer.refused_with() is BAD_REQUEST
    assert peer.is_served()


def test_mapped_twice_is_refused(peer: Peer, contract_id: int) -> None:
    grant = peer.lease(contract_id)
    peer.tell(messages.Mapped(arena=grant.arena, index=0))
    assert peer.refused_with() is BAD_REQUEST


def test_call_into_memory_that_is_not_mapped_or_was_given_back_is_stale(peer: Peer, contract_id: int) -> None:
    grant = peer.lease(contract_id, mapped=False)
    call = {"contract_id": contract_id, "arena": grant.arena, "generation": 1, **SIZES}
    peer.call(call_id=1, **call)
    assert peer.refused_with() is STALE
    peer.tell(messages.GiveBack(arena=grant.arena, index=0))
    peer.call(call_id=2, **call)
    assert peer.refused_with() is STALE
    peer.tell(messages.GiveBack(arena=grant.arena, index=0))
    assert peer.refused_with() is BAD_REQUEST


@pytest.mark.parametrize(
    ("field", "value"),
    [("args_size", PAYLOAD_MAX + 1), ("out_size", U32), ("count", 0), ("count", 129), ("contract", b"7")],
)
def test_lease_out_of_bounds_is_refused(peer: Peer, contract_id: int, field: str, value: object) -> None:
    fields = {"request_id": 1, "contract": bytes(8), "args_size": 0, "out_size": 0, "count": 1}
    peer.send(head(Op.LEASE) + codec.pack(fields | {field: value}))
    assert peer.refused_with() is BAD_REQUEST


def test_memory_beyond_the_host_s_budget_is_busy(peer: Peer, contract_id: int) -> None:
    ask = {
        "contract": messages.id_bytes(contract_id),
        "args_size": PAYLOAD_MAX,
        "out_size": PAYLOAD_MAX,
        "count": 128,
    }
    peer.tell(messages.Lease(request_id=1, **ask))  # type: ignore[arg-type]
    reply = peer.reply()
    assert (reply.kind, reply.code) == ("Busy", AbiErrorCode.BUSY)
    assert "memory per host" in reply.reason


def test_segments_cannot_be_resized_by_their_host(peer: Peer, contract_id: int) -> None:
    grant = peer.lease(contract_id)
    for descriptor in (grant.args_fd, grant.out_fd):
        size = os.fstat(descriptor).st_size
        for length in (0, size - 4096, size + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, length)


def test_host_that_seals_its_arguments_itself_is_shut_out(peer: Peer, contract_id: int) -> None:
    grant = peer.lease(contract_id, mapped=False)
    fcntl.fcntl(grant.args_fd, F_ADD_SEALS, SEAL_SEAL)
    peer.tell(messages.Mapped(arena=grant.arena, index=0))
    peer.call(call_id=1, contract_id=contract_id, arena=grant.arena, generation=1, **SIZES)
    eventually(lambda: is_refused_or_closed(peer), "the host is refused")


def is_refused_or_closed(peer: Peer) -> bool:
    if peer.dealer.poll(0):
        return peer.refused_with() in (BAD_REQUEST, STALE)
    peer.channel.setblocking(False)
    try:
        return peer.channel.recv(1) == b""
    except BlockingIOError:
        return False


def test_z11_host_that_does_not_read_is_dropped(directory: str) -> None:
    with Peer(directory, receive_high_water_mark=1) as peer:
        flood = encode_records(Op.CALL, [call_record(call_id=1 + number) for number in range(1000)])
        for _ in range(64):
            peer.send(flood)
        assert is_closed_by_peer(peer.channel)


# -- over the descriptor socket ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(GARBAGE, id="random bytes"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP"),
        pytest.param(b"L", id="one byte"),
        pytest.param(bytes(5000), id="an oversized message"),
        pytest.param(PREAMBLE.pack(b"LC", 2, Op.HELLO, 1, 0) + HOST[8:], id="a later version"),
        pytest.param(hello_with(role="king"), id="an unknown role"),
        pytest.param(hello_with(extra=1), id="a field too many"),
        pytest.param(encode(messages.Health(request_id=1)), id="another operation"),
        pytest.param(encode(messages.Started(worker=1, pid=1)), id="a worker host's report"),
    ],
)
@pytest.mark.parametrize("descriptors", [0, 1, 2, 3, 50])
def test_garbage_on_the_descriptor_socket_closes_it(directory: str, data: bytes, descriptors: int) -> None:
    with channel(directory) as connection, open(os.devnull, "rb") as null:
        send_raw(connection, data, [null.fileno()] * descriptors)
        assert is_closed_by_peer(connection)


def test_empty_message_with_descriptors_leaves_none_behind(directory: str) -> None:
    with channel(directory) as connection, open(os.devnull, "rb") as null:
        for _ in range(100):
            send_raw(connection, b"", [null.fileno()] * 2)


def test_second_worker_host_is_refused_and_the_first_goes_on(healthy: LuaHostBridge, directory: str) -> None:
    with channel(directory) as connection:
        send_message(connection, encode(messages.Hello(role="worker-host")))
        assert is_closed_by_peer(connection)
    name = deploy(healthy, DOUBLE, PROBE)
    assert answers(healthy, name)


def test_host_may_not_speak_for_the_worker_host(directory: str) -> None:
    with Peer(directory) as peer, open(os.devnull, "rb") as null:
        send_raw(peer.channel, encode(messages.Started(worker=1, pid=1)), [null.fileno()] * 2)
        assert is_closed_by_peer(peer.channel)


def test_z13_silent_connections_keep_nobody_out_for_long(healthy: LuaHostBridge, directory: str) -> None:
    silent: list[socket.socket] = []
    try:
        for _ in range(300):
            silent.append(channel(directory))
        for number in range(100):
            assert answers(healthy, HEALTHY, number)
        eventually(lambda: can_connect(directory), "a new host is let in beside the silent ones")
    finally:
        for connection in silent:
            connection.close()


def can_connect(directory: str) -> bool:
    try:
        with LuaHostBridge.connect(directory) as another:
            return answers(another, HEALTHY)
    except Unavailable:
        return False


def test_hosts_that_are_gone_before_their_welcome_leave_no_trace(healthy: LuaHostBridge, directory: str) -> None:
    with closing(Process(broker_pid(healthy))) as broker:
        for _ in range(3):
            with broker.stopped():
                for _ in range(100):
                    with channel(directory) as connection:
                        send_message(connection, HOST)
            assert can_connect(directory), "those before it in the queue were accepted"
    assert healthy.health()["hosts"] == 1


# -- run directories --------------------------------------------------------------------------------------
@pytest.mark.parametrize("endpoint", ["/nonexistent/luacell", "ipc:///nonexistent/luacell/broker.sock"])
def test_unknown_endpoint_is_unavailable_and_named(endpoint: str) -> None:
    with pytest.raises(Unavailable, match=r"/nonexistent/luacell/fd\.sock") as caught:
        LuaHostBridge.connect(endpoint)
    assert caught.value.began == "no"


def test_endpoint_of_another_transport_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="udp://"):
        LuaHostBridge.connect("udp://127.0.0.1:5555")


def test_endpoint_that_is_a_dead_socket_is_unavailable(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(os.fspath(tmp_path / DESCRIPTOR_SOCKET))
    with pytest.raises(Unavailable, match="refused"):
        LuaHostBridge.connect(tmp_path)


def test_endpoint_that_never_answers_is_unavailable_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luacell.client.link.CONNECT_LIMIT_S", 0.5)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mute:
        mute.bind(os.fspath(tmp_path / DESCRIPTOR_SOCKET))
        mute.listen()
        with pytest.raises(Unavailable, match="does not answer"):
            LuaHostBridge.connect(tmp_path)


def open_to_all(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def symbolic_link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to("elsewhere")


def file_in_its_place(path: Path) -> None:
    path.touch()


def file_in_place_of_the_socket(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / BROKER_SOCKET).touch()


def link_in_place_of_the_socket(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / BROKER_SOCKET).symlink_to("/etc/passwd")


def link_in_place_of_the_descriptor_socket(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / DESCRIPTOR_SOCKET).symlink_to("/etc/passwd")


def directory_in_place_of_the_socket_aside(path: Path) -> None:
    (path / BROKER_SOCKET_ASIDE).mkdir(parents=True)
    path.chmod(0o700)


def link_in_place_of_the_registry(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / STATE_DIRECTORY).symlink_to("/etc")


def link_in_place_of_the_lock(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / LOCK_FILE).symlink_to("/etc/passwd")


def directory_of_another_user(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    path.mkdir(mode=0o700)
    os.chown(path, 65534, 65534)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (open_to_all, "mode 0777"),
        (symbolic_link, "symbolic links are refused"),
        (file_in_its_place, "cannot make the run directory"),
        (file_in_place_of_the_socket, "in the way"),
        (link_in_place_of_the_socket, f"{BROKER_SOCKET} is in the way"),
        (link_in_place_of_the_descriptor_socket, f"{DESCRIPTOR_SOCKET} is in the way"),
        (directory_in_place_of_the_socket_aside, f"{BROKER_SOCKET_ASIDE} is in the way"),
        (link_in_place_of_the_registry, "symbolic links are refused"),
        (link_in_place_of_the_lock, "cannot open"),
        (directory_of_another_user, "belongs to uid 65534"),
    ],
)
def test_m15_run_directory_that_is_not_safe_is_refused_by_name(
    tmp_path: Path, prepare: Callable[[Path], None], reason: str
) -> None:
    path = tmp_path / "run"
    prepare(path)
    ended = run_broker(path)
    assert ended.returncode == 78
    assert str(path) in ended.stderr
    assert reason in ended.stderr
    assert "Traceback" not in ended.stderr


def test_path_that_is_too_long_for_a_socket_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 100)
    ended = run_broker(path)
    assert ended.returncode == 78
    assert "107" in ended.stderr
    assert str(path) in ended.stderr
    assert not path.exists()


def test_second_broker_on_a_run_directory_refuses_and_the_first_goes_on(healthy: LuaHostBridge, directory: str) -> None:
    ended = run_broker(directory)
    assert ended.returncode == 78
    assert f"another broker serves {directory}" in ended.stderr
    assert can_connect(directory)


def test_sockets_of_a_killed_broker_do_not_block_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Serving(path), LuaHostBridge.connect(path) as bridge, Processes.of(bridge) as processes:
        processes.parent.kill()
        assert not processes.survivors(2.0)
    assert (path / LOCK_FILE).exists()
    with Serving(path), LuaHostBridge.connect(path) as bridge:
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        assert answers(bridge, HEALTHY)


def test_sockets_left_behind_do_not_block_a_start(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    for name, kind in ((BROKER_SOCKET, socket.SOCK_STREAM), (DESCRIPTOR_SOCKET, socket.SOCK_SEQPACKET)):
        with socket.socket(socket.AF_UNIX, kind) as stale:
            stale.bind(os.fspath(path / name))
    with Serving(path):
        LuaHostBridge.connect(path).close()


def test_embedded_bridge_in_a_directory_that_is_too_deep_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(BridgeNotInitialized, match="107"):
        LuaHostBridge()
    assert list(deep.iterdir()) == []
