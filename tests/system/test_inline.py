"""Hosts without shared memory: the same calls, errors and bounds over TCP and ipc, whatever such a host does."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from luacell.client import (
    AbiErrorCode,
    CallError,
    ContractLoadFailed,
    DeadlineExceeded,
    DuplicateContract,
    HostContractNotFound,
    LuaFunction,
    LuaHostBridge,
    TooLarge,
    Unavailable,
    VmRegistrationFailed,
    WorkerCrashed,
)
from luacell.protocol import headers, messages
from luacell.protocol.headers import Op, encode_records, head
from luacell.protocol.limits import (
    CALLS_IN_FLIGHT_MAX,
    INLINE_HOST_WINDOW,
    INLINE_PIECE,
    INLINE_WINDOW,
    KIB,
    MIB,
    PAYLOAD_MAX,
)
from luacell.protocol.messages import encode
from tests.support.children import child_process
from tests.support.contracts import DOUBLE, ECHO, HEALTHY, PROBE, Stopwatch, answers, deploy, failure, function
from tests.support.environment import untraced
from tests.support.peers import InlinePeer, Peer
from tests.support.processes import Process, Processes, broker_pid, resident_kib, workers_of
from tests.support.serving import Serving, run_broker
from tests.support.waiting import LIMIT_S, eventually, readable, settles

ROOT = Path(__file__).parents[2]
ECHOING = "host.echo@1"
SEEN_GONE_S = 4.0  # the promise on hosts whose death nobody reports
SIZES = [0, 1, 4096, 16 * KIB, 16 * KIB + 1, 256 * KIB - 1, 256 * KIB, 256 * KIB + 1, MIB + 3, PAYLOAD_MAX]

# By function: 0 answers, 1 never ends, 2 raises, 3 crashes, 4 fails with a code, 5 sleeps a little.
MOODS = function("""
  if fn_id == 1 then while true do end end
  if fn_id == 2 then error("no " .. tonumber(args[0]), 0) end
  if fn_id == 3 then ffi.cast("int *", 0)[0] = 1 end
  if fn_id == 4 then luacell.fail(1024, "by design") end
""")


class Place:
    """A service with both kinds of endpoints, and a local host that looks at it."""

    def __init__(self, serving: Serving, local: LuaHostBridge) -> None:
        self.serving = serving
        self.local = local
        self.tcp = str(local.health()["tcp"])
        self.ipc = f"ipc+inline://{serving.run_directory}"

    def address(self, endpoint: str) -> str:
        """What libzmq connects to."""
        return endpoint if endpoint == self.tcp else f"ipc://{self.serving.run_directory}/broker.sock"

    def id_of(self, name: str) -> int:
        return next(contract.id for contract in self.local.contracts() if str(contract) == name)

    def holdings(self) -> dict[str, int]:
        health = self.local.health()
        return {key: health[key] for key in ("hosts", "slots_in_flight", "queued", "memory_bytes")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    run_directory = tmp_path_factory.mktemp("inline") / "run"
    with Serving(run_directory, "--tcp", "tcp://127.0.0.1:0") as serving, LuaHostBridge.connect(run_directory) as local:
        local.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        deploy(local, ECHO, ECHOING, deadline="60s")
        deploy(local, MOODS, deadline="5s", run_limit="500ms")  # a crash may wait for the workers before it
        for name in (PROBE, ECHOING):  # the memory that this host keeps is there from the first test on
            assert local.call(name, 0) == b""
        yield Place(serving, local)


@pytest.fixture(autouse=True)
def unharmed(place: Place) -> Iterator[None]:
    """Whatever a test does, the broker and its other hosts go on, and all memory comes back."""
    place.local.revive(PROBE)  # the crashes of the tests before add up
    assert answers(place.local, HEALTHY)
    before, broker = place.holdings(), broker_pid(place.local)
    yield
    assert answers(place.local, HEALTHY)
    settles(place.holdings, before, "everything came back")
    assert broker_pid(place.local) == broker


@pytest.fixture(params=["tcp", "ipc"])
def endpoint(request: pytest.FixtureRequest, place: Place) -> str:
    return place.tcp if request.param == "tcp" else place.ipc


@pytest.fixture
def bridge(endpoint: str) -> Iterator[LuaHostBridge]:
    with LuaHostBridge.connect(endpoint) as bridge:
        yield bridge


@pytest.fixture
def peer(endpoint: str, place: Place) -> Iterator[InlinePeer]:
    with InlinePeer(place.address(endpoint)) as peer:
        yield peer


@contextmanager
def endless(place: Place) -> Iterator[int]:
    """A contract whose calls never end; the one that runs at the end of the block is ended with its worker."""
    name = "host.endless@1"
    deploy(place.local, function("while true do end"), name, deadline="10s")
    try:
        yield place.id_of(name)
    finally:
        pids = workers_of(place.local, name)
        place.local.unregister_host_contract(name)
        for pid in pids:
            with suppress(AssertionError, ProcessLookupError), closing(Process(pid)) as worker:
                worker.kill()


@pytest.fixture
def echo_id(place: Place) -> int:
    return place.id_of(ECHOING)


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


# -- calls ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", SIZES)
def test_bytes_of_any_size_come_back_exactly(bridge: LuaHostBridge, size: int) -> None:
    sent = noise(size)
    assert bridge.call(ECHOING, size, sent, size) == sent


@pytest.mark.parametrize("size", [1, 256 * KIB, MIB + 3])
def test_result_fills_the_buffer_of_its_caller(bridge: LuaHostBridge, size: int) -> None:
    sent, out = noise(size), bytearray(size)
    assert bridge.call(ECHOING, size, memoryview(sent), out=out) == b""
    assert out == sent
    assert bridge.call_host_contract(ECHOING, size, sent, out).ok


def test_arguments_and_results_may_be_of_different_sizes(bridge: LuaHostBridge) -> None:
    sent = noise(MIB)
    assert bridge.call(ECHOING, 3, sent, 3) == sent[:3]
    assert bridge.call(ECHOING, 3, b"abc", MIB) == b"abc" + bytes(MIB - 3)
    assert bridge.call(ECHOING, 0, sent) == b""
    assert bridge.call(ECHOING, 0, b"", MIB) == bytes(MIB)


@pytest.mark.parametrize(("args_size", "out_size"), [(PAYLOAD_MAX + 1, 0), (0, PAYLOAD_MAX + 1)])
def test_byte_too_many_is_too_large(
    bridge: LuaHostBridge, peer: InlinePeer, echo_id: int, args_size: int, out_size: int
) -> None:
    error = failure(bridge, ECHOING, args=bytes(args_size), out_size=out_size)
    assert isinstance(error, TooLarge)
    peer.call(echo_id, 1, bytes(min(args_size, INLINE_PIECE)), args_size=args_size, out_size=out_size)
    failed = peer.failure()
    assert (failed.call_id, failed.code, failed.slot) == (1, AbiErrorCode.TOO_LARGE, "unused")
    assert str(PAYLOAD_MAX + 1) in failed.message and str(PAYLOAD_MAX) in failed.limit


def test_each_of_many_threads_gets_its_own_answer(bridge: LuaHostBridge) -> None:
    sizes = [1, 100, 16 * KIB + 1, 256 * KIB + 1, MIB]

    def call(number: int) -> None:
        choose = random.Random(number)
        for _ in range(20):
            size = choose.choice(sizes)
            sent = choose.randbytes(size)
            assert bridge.call(ECHOING, size, sent, size) == sent

    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(call, number) for number in range(16)]:
            future.result()


def test_large_calls_hold_up_no_small_ones(place: Place, bridge: LuaHostBridge) -> None:
    deploy(place.local, ECHO, "host.bulk@1")
    sent = noise(32 * MIB)
    try:
        with ThreadPoolExecutor(2) as pool:
            large = [pool.submit(bridge.call, "host.bulk@1", len(sent), sent, len(sent)) for _ in range(2)]
            slowest_s = 0.0
            while not all(future.done() for future in large):
                with Stopwatch() as taken:
                    assert answers(place.local, HEALTHY)
                slowest_s = max(slowest_s, taken.seconds)
            assert all(future.result() == sent for future in large)
        assert slowest_s < SEEN_GONE_S, "each turn of the loop copies one piece"
    finally:
        place.local.unregister_host_contract("host.bulk@1")


# -- errors -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fn_id", "code"),
    [
        (1, AbiErrorCode.DEADLINE_EXCEEDED),
        (2, AbiErrorCode.HOST_CONTRACT_CALL_FAILED),
        (3, AbiErrorCode.WORKER_CRASHED),
        (4, 1024),
    ],
)
def test_failure_is_the_one_that_a_local_host_gets(place: Place, bridge: LuaHostBridge, fn_id: int, code: int) -> None:
    timeout = 0.4 if fn_id == 1 else None
    theirs, mine = (
        failure(each, PROBE, fn_id, args=b"7", out_size=1, timeout=timeout) for each in (place.local, bridge)
    )
    assert mine.code == code
    assert type(mine) is type(theirs)
    assert without_times(mine) == without_times(theirs)
    assert (mine.began, mine.signal, mine.limit) == (theirs.began, theirs.signal, theirs.limit)
    assert bridge.call(PROBE, 0) == b""


def without_times(error: CallError) -> str:
    """The text of an error, without what it measured and what is told only where it was seen in time."""
    text = re.sub(r"[0-9.]+(?:e-[0-9]+)? s\b", "… s", str(error))
    return re.sub(r", … s of CPU|, state \w \([\w ]+\)(?: in \w+)?", "", text)


def test_deadline_of_the_caller_holds(bridge: LuaHostBridge) -> None:
    bridge.call(PROBE, 0)
    with Stopwatch() as taken:
        error = failure(bridge, PROBE, 1, timeout=0.15)
    assert isinstance(error, DeadlineExceeded)
    assert "deadline 0.15 s" in str(error)
    assert error.began == "yes"
    assert 0.15 <= taken.seconds < 0.15 + 0.25 + 1.0


def test_unknown_contract_is_not_found(bridge: LuaHostBridge, place: Place) -> None:
    theirs, mine = (failure(each, "host.nobody@1", args=bytes(MIB)) for each in (place.local, bridge))
    assert isinstance(mine, HostContractNotFound)
    assert (str(mine), mine.began, mine.contract_id) == (str(theirs), "no", theirs.contract_id)  # type: ignore[attr-defined]


def test_contracts_are_registered_listed_and_removed(bridge: LuaHostBridge) -> None:
    name = "host.mine@1.2.0"
    bridge.register_host_contract(name, LuaFunction(DOUBLE))
    try:
        with pytest.raises(DuplicateContract):
            bridge.register_host_contract(name, LuaFunction(DOUBLE))
        assert "host.mine@1" in map(str, bridge.contracts())
        assert answers(bridge, "host.mine@1")
        bridge.register_host_contract(name, LuaFunction(ECHO), replace=True)
        assert bridge.call("host.mine@1", 4, b"echo", 4) == b"echo"
        with pytest.raises(VmRegistrationFailed, match="broken"):
            bridge.register_host_contract("host.broken@1", LuaFunction("broken("))
        assert bridge.lua().eval("1 + 1") == 2
    finally:
        bridge.unregister_host_contract("host.mine@1")
    assert isinstance(failure(bridge, "host.mine@1"), HostContractNotFound)


def test_contract_that_is_replaced_under_load_fails_no_call(place: Place, bridge: LuaHostBridge) -> None:
    place.local.register_host_contract("host.shifting@1", LuaFunction(ECHO))
    stop = threading.Event()

    def call() -> int:
        number = 0
        while not stop.is_set():
            sent = noise(MIB + number % 3)
            assert bridge.call("host.shifting@1", len(sent), sent, len(sent)) == sent
            number += 1
        return number

    try:
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(call) for _ in range(2)]
            try:
                for _ in range(5):
                    place.local.register_host_contract("host.shifting@1", LuaFunction(ECHO), replace=True)
            finally:
                stop.set()
            assert all(future.result() for future in calls)
    finally:
        place.local.unregister_host_contract("host.shifting@1")


def test_crash_fails_only_its_own_call(place: Place, bridge: LuaHostBridge) -> None:
    with ThreadPoolExecutor(4) as pool:
        crashing = [pool.submit(failure, bridge, PROBE, 3) for _ in range(4)]
        others = [pool.submit(answers, bridge, HEALTHY, number) for number in range(50)]
        assert all(isinstance(future.result(), WorkerCrashed) for future in crashing)
        assert all(future.result() for future in others)


def test_worker_that_is_killed_is_told_to_its_caller(place: Place, bridge: LuaHostBridge) -> None:
    deploy(place.local, function("while true do end"), "host.endless@1", deadline="30s")
    try:
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(failure, bridge, "host.endless@1", args=noise(MIB), out_size=MIB)

            def kill_until_told() -> bool:
                """Kill its worker, and the next one where the call had not been begun yet."""
                for pid in workers_of(place.local, "host.endless@1"):
                    with suppress(AssertionError, ProcessLookupError), closing(Process(pid)) as worker:
                        worker.kill()
                return call.done()

            eventually(lambda: place.local.health()["slots_in_flight"] == 1, "the call is there")
            eventually(kill_until_told, "the call is answered")
            error = call.result()
        assert isinstance(error, WorkerCrashed)
        assert error.signal == signal.SIGKILL
    finally:
        place.local.unregister_host_contract("host.endless@1")


def test_interrupted_call_is_cancelled(endpoint: str, place: Place) -> None:
    """Ctrl-C in the middle of a call raises where it was made, and the next call works."""
    code = (
        "import sys\n"
        "from luacell.client import LuaHostBridge\n"
        "bridge = LuaHostBridge.connect(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    bridge.call('host.endless@1', 0, bytes(1 << 20), 1 << 20)\n"
        "except KeyboardInterrupt:\n"
        "    print(int.from_bytes(bridge.call('host.healthy@1', 0, b'\\x15\\0\\0\\0', 4), 'little'), flush=True)\n"
        "bridge.close()\n"
    )
    command = [sys.executable, "-c", code, endpoint]
    with endless(place), child_process(command, stdout=subprocess.PIPE, env=untraced()) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"ready\n"
        eventually(lambda: place.local.health()["slots_in_flight"] == 1, "the call is running")
        host.send_signal(signal.SIGINT)
        assert host.stdout.readline() == b"42\n"
        assert host.wait(LIMIT_S) == 0


def test_contract_that_no_longer_loads_says_so(place: Place, bridge: LuaHostBridge, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    source = (
        f"local seen = io.open({str(flag)!r}) if seen then error('no longer') end return function(fn) "
        "if fn == 1 then require('ffi').cast('int *', 0)[0] = 1 end end"
    )
    deploy(place.local, source, "host.fading@1", read=[str(tmp_path)])
    try:
        flag.touch()
        assert isinstance(failure(bridge, "host.fading@1", 1), WorkerCrashed)
        error = failure(bridge, "host.fading@1")
        assert isinstance(error, ContractLoadFailed)
        assert "no longer" in str(error)
    finally:
        place.local.unregister_host_contract("host.fading@1")


# -- joining ----------------------------------------------------------------------------------------------
def test_endpoint_from_the_environment_works(endpoint: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUACELL_ENDPOINT", endpoint)
    with LuaHostBridge.connect() as bridge:
        assert answers(bridge, HEALTHY)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("tcp://192.0.2.1:5555", "needs keys"),
        ("tcp://127.0.0.1", "tcp://HOST:PORT"),
        ("tcp://127.0.0.1:0", r"outside 1\.\.65535"),
        ("tcp://example.org:1", "neither an IP address nor localhost"),
        ("ipc+inline://run", "no absolute path"),
        ("udp://127.0.0.1:5555", r"tcp://…"),
    ],
)
def test_malformed_endpoint_is_a_value_error(given: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        LuaHostBridge.connect(given)


def test_endpoint_where_nobody_serves_is_unavailable_at_once(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for given in (f"tcp://127.0.0.1:{port}", f"ipc+inline://{tmp_path}"):
            with Stopwatch() as taken, pytest.raises(Unavailable, match="no broker at") as caught:
                LuaHostBridge.connect(given)
            assert caught.value.began == "no"
            assert taken.seconds < 3.0


def test_endpoint_that_never_answers_is_unavailable_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luacell.client.link.CONNECT_LIMIT_S", 0.5)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with pytest.raises(Unavailable, match="does not answer"):
            LuaHostBridge.connect(f"tcp://127.0.0.1:{mute.getsockname()[1]}")


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("tcp://0.0.0.0:5555", "needs keys, which are not available yet"),
        ("tcp://10.0.0.7:5555", "10.0.0.7 is not on loopback"),
        ("ipc:///tmp/x", "tcp://HOST:PORT"),
    ],
)
def test_broker_refuses_to_listen_elsewhere_by_name(tmp_path: Path, given: str, wrong: str) -> None:
    ended = run_broker(tmp_path / "run", "--tcp", given)
    assert ended.returncode == 2
    assert given in ended.stderr and wrong in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("verb", ["serve", "broker"])
def test_command_line_refuses_to_listen_elsewhere(tmp_path: Path, verb: str) -> None:
    code = "from luacell.cli.main import app; app()"
    command = [sys.executable, "-c", code, verb, "--run-dir", str(tmp_path / "run"), "--tcp", "tcp://[::]:5555"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ended.returncode == 2
    assert "tcp://[::]:5555" in ended.stderr and "needs keys" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_broker_whose_port_is_taken_refuses_to_start(tmp_path: Path, place: Place) -> None:
    ended = run_broker(tmp_path / "run", "--tcp", place.tcp)
    assert ended.returncode == 78
    assert place.tcp in ended.stderr and "in use" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_ipv6_loopback_works(tmp_path: Path) -> None:
    with Serving(tmp_path / "run", "--tcp", "tcp://[::1]:*"), LuaHostBridge.connect(tmp_path / "run") as local:
        local.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        with LuaHostBridge.connect(local.health()["tcp"]) as bridge:
            assert answers(bridge, HEALTHY)


@pytest.mark.parametrize("routing_id", [b"", b"\1" * 15, b"\1" * 17])
def test_routing_id_of_another_length_is_refused(place: Place, endpoint: str, routing_id: bytes) -> None:
    with InlinePeer(place.address(endpoint), greet=False, routing_id=routing_id) as peer:
        peer.tell(messages.Hello(role="inline"))
        assert "unknown peer" in peer.failure().message


@pytest.mark.parametrize("role", ["host", "worker-host", "king"])
def test_stranger_of_another_role_is_refused(place: Place, endpoint: str, role: str) -> None:
    with InlinePeer(place.address(endpoint), greet=False) as peer:
        peer.tell(messages.Hello(role=role))
        failed = peer.failure()
        assert (failed.call_id, failed.code) == (0, AbiErrorCode.BAD_REQUEST)
        peer.tell(messages.Hello(role="inline"))
        peer.receive()
        assert peer.is_served()


def test_greeting_that_is_repeated_is_answered_again(peer: InlinePeer) -> None:
    peer.tell(messages.Hello(role="inline"))
    assert headers.parse_preamble(peer.receive())[0] is Op.WELCOME
    assert peer.is_served()


def test_malformed_messages_of_others_cost_no_call(place: Place, endpoint: str, bridge: LuaHostBridge) -> None:
    """Messages of several frames, of known and unknown peers, come between nobody's."""
    address = place.address(endpoint)
    stop = threading.Event()

    def call() -> int:
        number = 0
        while not stop.is_set():
            assert answers(bridge, HEALTHY, number)
            assert answers(place.local, HEALTHY, number)
            number += 1
        return number

    health = encode(messages.Health(request_id=1))
    with ThreadPoolExecutor(1) as pool:
        calls = pool.submit(call)
        try:
            with (
                InlinePeer(address) as known,
                InlinePeer(address, greet=False) as unknown,
                Peer(place.serving.run_directory) as local,
            ):
                for _ in range(25):
                    for tail in [(b"",), (os.urandom(16),), (known.routing_id, health), (health,) * 50]:
                        for each in (known, unknown, local):
                            each.send(health, *tail)
                    with LuaHostBridge.connect(endpoint) as another:
                        assert answers(another, HEALTHY)
                known.drain()
                assert known.is_served()
        finally:
            stop.set()
        assert calls.result()


# -- raw peers --------------------------------------------------------------------------------------------
def start(peer: InlinePeer, contract_id: int, size: int, **fields: int) -> bytes:
    """Send the first piece of arguments and receive credit for the rest; return all of them."""
    args = noise(size)
    peer.call(contract_id, 1, args[:INLINE_PIECE], args_size=size, **fields)
    assert peer.credit() == (1, INLINE_PIECE, 0)
    return args


def test_call_made_by_hand_as_the_document_says(peer: InlinePeer, echo_id: int) -> None:
    size = 3 * INLINE_PIECE + 5
    args = start(peer, echo_id, size, fn_id=size, out_size=size)
    for offset in range(INLINE_PIECE, size, INLINE_PIECE):
        peer.piece(1, offset, args[offset : offset + INLINE_PIECE])
    for end in (2 * INLINE_PIECE, 3 * INLINE_PIECE):
        assert peer.credit() == (1, end, 0)
    result, received = peer.result()
    assert result == (1, 0, size, 0, 0)
    while len(received) < size:
        peer.more(1, len(received))
        piece, data = peer.next_piece()
        assert piece == (1, len(received), len(data))
        received += data
    peer.more(1, size)
    assert received == args


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        pytest.param(2 * INLINE_PIECE, INLINE_PIECE, id="a hole"),
        pytest.param(1, INLINE_PIECE, id="an overlap"),
        pytest.param(INLINE_PIECE, INLINE_PIECE - 1, id="too short"),
        pytest.param(INLINE_PIECE, INLINE_PIECE + 1, id="too long"),
        pytest.param(INLINE_PIECE, MIB, id="more than announced"),
        pytest.param((1 << 32) - 1, INLINE_PIECE, id="at the end of numbers"),
        pytest.param(INLINE_PIECE, 0, id="empty"),
    ],
)
def test_piece_out_of_place_fails_its_call(peer: InlinePeer, echo_id: int, offset: int, size: int) -> None:
    start(peer, echo_id, 3 * INLINE_PIECE)
    peer.piece(1, offset, bytes(size))
    if offset + size <= INLINE_PIECE or not size:  # nothing new: it is taken for a repetition
        peer.cancel(1)
        assert peer.failure().code == AbiErrorCode.CANCELLED
        return
    failed = peer.failure()
    assert (failed.call_id, failed.code, failed.began) == (1, AbiErrorCode.BAD_REQUEST, "no")
    assert f"a piece of {size} bytes at {offset}, not {INLINE_PIECE} bytes at {INLINE_PIECE}" in failed.message
    peer.piece(1, INLINE_PIECE, bytes(INLINE_PIECE))
    assert "not in flight" in peer.failure().message
    assert peer.is_served()


def test_piece_that_is_sent_twice_is_taken_once(peer: InlinePeer, echo_id: int) -> None:
    size = 2 * INLINE_PIECE + 1
    args = start(peer, echo_id, size, fn_id=1, out_size=1)
    for offset in (0, INLINE_PIECE, INLINE_PIECE, 0, 2 * INLINE_PIECE):
        peer.piece(1, offset, args[offset : offset + INLINE_PIECE])
    assert peer.credit().offset == 2 * INLINE_PIECE
    result, received = peer.result()
    assert (result.code, received) == (0, args[:1])


def test_piece_behind_the_last_is_a_bad_request_and_the_call_goes_on(place: Place, peer: InlinePeer) -> None:
    contract_id = place.id_of(PROBE)
    peer.call(contract_id, 1, b"1", fn_id=1)
    eventually(lambda: place.local.health()["slots_in_flight"] == 1, "the call is running")
    peer.piece(1, 1, b"x")
    failed = peer.failure()
    assert (failed.call_id, failed.code) == (0, AbiErrorCode.BAD_REQUEST)
    peer.cancel(1)
    failed = peer.failure()
    assert (failed.call_id, failed.code) == (1, AbiErrorCode.CANCELLED)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"call_id": 0}, AbiErrorCode.BAD_REQUEST),
        ({"flags": 4}, AbiErrorCode.BAD_REQUEST),
        ({"flags": 0}, AbiErrorCode.BAD_REQUEST),
        ({"api_sum": 1}, AbiErrorCode.BAD_REQUEST),
        ({"budget_us": 60_000_001}, AbiErrorCode.BAD_REQUEST),
        ({"out_size": (1 << 32) - 1}, AbiErrorCode.TOO_LARGE),
        ({"contract_id": 4711}, AbiErrorCode.HOST_CONTRACT_NOT_FOUND),
    ],
)
def test_call_with_a_wrong_field_is_refused(
    peer: InlinePeer, echo_id: int, fields: dict[str, int], code: AbiErrorCode
) -> None:
    peer.call(**({"contract_id": echo_id, "call_id": 5, "first": b"1"} | fields))  # type: ignore[arg-type]
    failed = peer.failure()
    assert (failed.call_id, failed.code) == (fields.get("call_id", 5), code)
    assert (failed.slot, failed.began) == ("unused", "no")
    peer.call(echo_id, 6, b"1", fn_id=1, out_size=1)
    assert peer.result()[1] == b"1"


def test_call_id_in_flight_is_refused(peer: InlinePeer, echo_id: int) -> None:
    start(peer, echo_id, 2 * INLINE_PIECE)
    peer.call(echo_id, 1, b"1")
    failed = peer.failure()
    assert (failed.code, failed.slot) == (AbiErrorCode.BAD_REQUEST, "unused")
    peer.piece(1, INLINE_PIECE, bytes(INLINE_PIECE))
    assert peer.result()[0].code == 0


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(head(Op.CALL_INLINE) + bytes(39), id="half a call"),
        pytest.param(head(Op.CALL_INLINE) + bytes(41), id="a byte too many"),
        pytest.param(head(Op.CALL_INLINE, 2) + bytes(80), id="two calls"),
        pytest.param(head(Op.PIECE) + headers.PIECE.pack(1, 0, 8), id="a piece without bytes"),
        pytest.param(head(Op.PIECE) + headers.PIECE.pack(1, 0, (1 << 32) - 1) + bytes(9), id="a piece cut off"),
        pytest.param(head(Op.MORE) + bytes(15), id="half a MORE"),
        pytest.param(encode_records(Op.CALL, [(1,) * 10]), id="a call by handle"),
        pytest.param(encode(messages.Mapped(arena=1, index=0)), id="MAPPED"),
        pytest.param(
            encode(messages.Lease(request_id=1, contract=bytes(8), args_size=1, out_size=1, count=1)), id="LEASE"
        ),
        pytest.param(head(Op.RESULT_INLINE) + bytes(24), id="a result"),
        pytest.param(head(Op.DONE) + bytes(24), id="a worker's answer"),
        pytest.param(b"LC", id="half a preamble"),
        pytest.param(os.urandom(100), id="random bytes"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_malformed_message_is_a_bad_request(peer: InlinePeer, message: bytes) -> None:
    peer.send(message)
    failed = peer.failure()
    assert (failed.call_id, failed.code) == (0, AbiErrorCode.BAD_REQUEST)
    assert peer.is_served()


def test_local_host_may_not_send_its_bytes_inline(place: Place, echo_id: int) -> None:
    with Peer(place.serving.run_directory) as peer:
        peer.send(headers.encode_inline(Op.CALL_INLINE, (1, echo_id, 0, 0, 1, 1, 0, 0), b"x"))
        assert peer.refused_with() is AbiErrorCode.BAD_REQUEST


def test_arguments_that_do_not_arrive_in_time_are_past_their_deadline(peer: InlinePeer, echo_id: int) -> None:
    start(peer, echo_id, 3 * INLINE_PIECE, budget_us=200_000)
    failed = peer.failure()
    assert (failed.call_id, failed.code, failed.began) == (1, AbiErrorCode.DEADLINE_EXCEEDED, "no")
    assert "deadline 0.2 s" in failed.limit
    assert f"{INLINE_PIECE} of {3 * INLINE_PIECE} bytes" in failed.message


def test_time_that_the_arguments_took_counts(place: Place, peer: InlinePeer) -> None:
    """The deadline counts from the first piece, so a worker has only what is left of it."""
    contract_id = place.id_of(PROBE)
    args = bytes(2 * INLINE_PIECE)
    with Stopwatch() as taken:
        peer.call(contract_id, 1, args[:INLINE_PIECE], args_size=len(args), fn_id=1, budget_us=600_000)
        peer.credit()
        assert peer.is_silent(200)
        peer.piece(1, INLINE_PIECE, args[INLINE_PIECE:])
        failed = peer.failure()
    assert failed.code == AbiErrorCode.DEADLINE_EXCEEDED
    assert "deadline 0.6 s" in failed.limit
    assert taken.seconds < 0.6 + 0.25 + 1.0


def test_cancelled_call_ends_wherever_it_is(place: Place, peer: InlinePeer, echo_id: int) -> None:
    start(peer, echo_id, 2 * INLINE_PIECE)
    peer.cancel(1)
    failed = peer.failure()
    assert (failed.call_id, failed.code, failed.began) == (1, AbiErrorCode.CANCELLED, "no")
    peer.call(place.id_of(PROBE), 2, b"1", fn_id=1)
    eventually(lambda: place.local.health()["slots_in_flight"] == 1, "the call is running")
    peer.cancel(2)
    failed = peer.failure()
    assert (failed.call_id, failed.code) == (2, AbiErrorCode.CANCELLED)
    peer.call(echo_id, 3, b"1", fn_id=1, out_size=4 * MIB)
    peer.result()
    peer.cancel(3)
    while headers.parse_preamble(message := peer.receive())[0] is Op.PIECE:
        pass
    assert message == encode_records(Op.RELEASED, [(3,)])
    peer.cancel(4)
    assert peer.released() == 4


@pytest.mark.parametrize("offset", [1, INLINE_PIECE + 1, 9 * INLINE_PIECE, (1 << 32) - 1])
def test_credit_for_what_was_not_sent_is_a_bad_request(peer: InlinePeer, echo_id: int, offset: int) -> None:
    peer.call(echo_id, 1, b"1", fn_id=1, out_size=16 * INLINE_PIECE)
    _, received = peer.result()
    for _ in range(INLINE_WINDOW - 1):
        received += peer.next_piece()[1]
    peer.more(1, offset)
    failed = peer.failure()
    assert (failed.call_id, failed.code) == (0, AbiErrorCode.BAD_REQUEST)
    peer.more(1, len(received))
    peer.next_piece()


# -- bounds -----------------------------------------------------------------------------------------------
def test_results_wait_for_their_receiver(peer: InlinePeer, echo_id: int) -> None:
    """No more than a window of pieces is under way, for one call and for all calls of a host."""
    calls = 2 * INLINE_HOST_WINDOW // INLINE_WINDOW
    for call_id in range(1, calls + 1):
        peer.call(echo_id, call_id, b"1", fn_id=1, out_size=16 * INLINE_PIECE)
    received: dict[int, int] = {}
    for _ in range(INLINE_HOST_WINDOW):
        message = peer.receive()
        op, count = headers.parse_preamble(message)
        record, data = headers.parse_inline(op, count, message)
        received[record[0]] = received.get(record[0], 0) + len(data)
    assert peer.is_silent(300), "nothing more without acknowledgement"
    assert all(size <= INLINE_WINDOW * INLINE_PIECE for size in received.values())
    for call_id, size in received.items():
        peer.more(call_id, size)
    peer.receive()


def test_results_that_nobody_takes_and_memory_that_nobody_uses_are_given_up(place: Place, echo_id: int) -> None:
    """Both after ten seconds, and so at once: one host takes no results and is sent away, the other one stays."""
    before = place.holdings()
    with LuaHostBridge.connect(place.tcp) as idle, InlinePeer(place.tcp) as peer:
        idle.call(ECHOING, 0, bytes(16 * MIB), 16 * MIB)
        assert place.holdings()["memory_bytes"] > before["memory_bytes"] + 32 * MIB
        peer.call(echo_id, 1, b"1", fn_id=1, out_size=16 * MIB)
        peer.result()
        eventually(lambda: place.holdings()["hosts"] == before["hosts"] + 1, "the host is dropped")
        settles(lambda: place.holdings()["memory_bytes"], before["memory_bytes"], "its memory and the other's are free")
        while headers.parse_preamble(message := peer.receive())[0] is Op.PIECE:
            pass
        failed = messages.decode(messages.Failure, message)
        assert (failed.call_id, failed.code) == (0, AbiErrorCode.UNAVAILABLE)
        peer.more(1, INLINE_PIECE)
        assert "unknown peer" in peer.failure().message
        assert idle.call(ECHOING, 1, b"1", 1) == b"1"


def test_flood_without_credit_grows_no_memory(place: Place, peer: InlinePeer, echo_id: int) -> None:
    broker = broker_pid(place.local)
    start(peer, echo_id, 2 * INLINE_PIECE)
    before_kib = resident_kib(broker)
    for _ in range(400):
        peer.piece(9, 0, bytes(INLINE_PIECE))
        assert peer.failure().call_id == 9
    assert resident_kib(broker) < before_kib + 64 * 1024
    peer.cancel(1)
    assert peer.failure().code == AbiErrorCode.CANCELLED


def test_piece_before_there_is_credit_fails_its_call(peer: InlinePeer, echo_id: int) -> None:
    """A call that waits for its slot holds its first piece and no other."""
    peer.call(echo_id, 1, bytes(INLINE_PIECE), args_size=PAYLOAD_MAX)
    peer.piece(1, INLINE_PIECE, bytes(INLINE_PIECE))
    op, _ = headers.parse_preamble(message := peer.receive())
    if op is Op.FAILURE:  # else the slot was there before the piece
        failed = messages.decode(messages.Failure, message)
        assert (failed.call_id, failed.code) == (1, AbiErrorCode.BAD_REQUEST)
        assert "none before MORE" in failed.message


def test_memory_of_a_host_is_bounded(peer: InlinePeer, echo_id: int) -> None:
    for call_id in range(1, 9):
        peer.call(echo_id, call_id, bytes(INLINE_PIECE), args_size=PAYLOAD_MAX, out_size=PAYLOAD_MAX)
    seen = [peer.receive() for _ in range(8)]
    (refused,) = [
        messages.decode(messages.Failure, each) for each in seen if headers.parse_preamble(each)[0] is Op.FAILURE
    ]
    assert sum(headers.parse_preamble(each)[0] is Op.MORE for each in seen) == 7
    assert refused.code == AbiErrorCode.BUSY
    assert "memory per host" in refused.limit


def test_calls_in_flight_of_a_host_are_bounded(place: Place, peer: InlinePeer) -> None:
    with endless(place) as contract_id:
        for call_id in range(1, CALLS_IN_FLIGHT_MAX + 2):
            peer.call(contract_id, call_id, b"1")
        failed = peer.failure()
        assert (failed.call_id, failed.code) == (CALLS_IN_FLIGHT_MAX + 1, AbiErrorCode.BUSY)
        assert str(CALLS_IN_FLIGHT_MAX) in failed.limit
        assert answers(place.local, HEALTHY)
        peer.close()


# -- ends -------------------------------------------------------------------------------------------------
@contextmanager
def vanishing(place: Place, endpoint: str, contract: str, mode: str) -> Iterator[tuple[Process, list[bytes]]]:
    """A host that is about to be killed, and what it has written."""
    at = endpoint if mode == "forked" else place.address(endpoint)
    command = [sys.executable, "-m", "tests.support.vanishing", at, str(place.id_of(contract)), mode]
    with child_process(command, stdout=subprocess.PIPE, cwd=ROOT) as host:
        assert host.stdout is not None
        assert readable(host.stdout.fileno())
        words = host.stdout.readline().split()
        assert words[0] == b"ready"
        with closing(Process(host.pid)) as process:
            try:
                yield process, words
            finally:
                process.kill()


def test_hosts_that_are_killed_are_seen_and_their_memory_comes_back(place: Place, endpoint: str) -> None:
    """In the middle of their arguments, of their results, of nothing, and of a call that runs."""
    modes = {"arguments": ECHOING, "results": ECHOING, "idle": HEALTHY, "running": PROBE}
    before = place.local.health()["hosts"]
    with ExitStack() as stack:
        hosts = [stack.enter_context(vanishing(place, endpoint, modes[mode], mode))[0] for mode in modes]
        assert place.local.health()["hosts"] == before + len(hosts)
        for host in hosts:
            host.kill()
        with Stopwatch() as taken:
            eventually(lambda: place.local.health()["hosts"] == before, "the hosts are gone")
        assert taken.seconds < SEEN_GONE_S


def test_child_of_a_host_does_not_hide_its_death(place: Place, endpoint: str) -> None:
    before = place.local.health()["hosts"]
    with vanishing(place, endpoint, HEALTHY, "forked") as (host, words), closing(Process(int(words[1]))) as child:
        try:
            host.kill()
            with Stopwatch() as taken:
                eventually(lambda: place.local.health()["hosts"] == before, "the host is gone")
            assert taken.seconds < SEEN_GONE_S
            assert child.is_alive
        finally:
            child.kill()


def test_host_that_says_goodbye_is_gone_at_once(place: Place, endpoint: str) -> None:
    before = place.local.health()["hosts"]
    with InlinePeer(place.address(endpoint)) as peer:
        peer.tell(messages.Bye())
        settles(lambda: place.local.health()["hosts"], before, "the host is gone")
        peer.tell(messages.Health(request_id=1))
        assert "unknown peer" in peer.failure().message


def test_session_begun_again_with_the_same_id_knows_nothing_of_the_old_one(
    place: Place, peer: InlinePeer, echo_id: int
) -> None:
    """The old session's call is still running, with the id that the new one chooses as well."""
    peer.call(place.id_of(PROBE), 1, b"1", fn_id=1)
    eventually(lambda: place.local.health()["slots_in_flight"] == 1, "the call is running")
    peer.tell(messages.Bye())
    peer.tell(messages.Hello(role="inline"))
    assert headers.parse_preamble(peer.receive())[0] is Op.WELCOME
    peer.call(echo_id, 1, b"new", fn_id=3, out_size=3)
    assert peer.result()[1] == b"new"
    settles(lambda: place.local.health()["slots_in_flight"], 0, "the old call ends")
    assert peer.is_silent(50)


def test_closing_a_bridge_ends_its_calls(place: Place, endpoint: str) -> None:
    bridge = LuaHostBridge.connect(endpoint)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(failure, bridge, PROBE, 1)
        eventually(lambda: place.local.health()["slots_in_flight"] == 1, "the call is running")
        bridge.close()
        assert isinstance(call.result(), Unavailable)


def test_end_of_the_broker_is_seen_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Serving(path, "--tcp", "tcp://127.0.0.1:0"), LuaHostBridge.connect(path) as local:
        deploy(local, function("while true do end"), deadline="30s")
        with (
            LuaHostBridge.connect(local.health()["tcp"]) as tcp,
            LuaHostBridge.connect(f"ipc+inline://{path}") as ipc,
            Processes.of(local) as processes,
            ThreadPoolExecutor(2) as pool,
        ):
            calls = [pool.submit(failure, each, PROBE) for each in (tcp, ipc)]
            eventually(lambda: local.health()["slots_in_flight"] == 2, "both calls are there")
            processes.broker.kill()
            with Stopwatch() as taken:
                assert all(isinstance(call.result(), Unavailable) for call in calls)
            assert taken.seconds < SEEN_GONE_S
            assert "cannot be reached" in str(failure(tcp, PROBE, timeout=0.2)), "the new one has another port"
            eventually(
                lambda: isinstance(failure(ipc, PROBE, timeout=0.2), DeadlineExceeded), "it finds the new broker"
            )


def test_stopped_host_over_tcp_is_gone_in_time(place: Place) -> None:
    before = place.local.health()["hosts"]
    with vanishing(place, place.tcp, HEALTHY, "idle") as (host, _), host.stopped():
        eventually(lambda: place.local.health()["hosts"] == before, "the host is gone")
