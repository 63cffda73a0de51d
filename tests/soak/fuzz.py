"""Malformed messages to a broker from every side: as a host on both sockets, as a worker, as a worker host.

They start from the golden frames and from a kept corpus (`tests/faults/corpus/NAME.hex`), and are mutated by chance or
by hypothesis. Whatever comes, the broker lives, a healthy host is served, and memory stays flat.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import zmq

from luacell.client import BridgeError, CallError, LuaFunction, LuaHostBridge
from luacell.protocol import messages
from luacell.protocol.limits import DESCRIPTOR_MESSAGE_MAX, KIB
from luacell.protocol.memory.channel import ChannelClosed, receive_message, send_message
from luacell.protocol.messages import encode
from tests.soak.report import Report
from tests.support.contracts import DOUBLE, HEALTHY, answers, function
from tests.support.peers import Peer, channel, send_raw
from tests.support.processes import Processes, descriptors_of, resident_kib
from tests.support.serving import PYTHON, Serving
from tests.support.waiting import LIMIT_S, eventually, readable

CORPUS = Path(__file__).parents[1] / "faults" / "corpus"
GOLDEN = Path(__file__).parents[1] / "protocol" / "golden_frames.json"
HOSTILE = "host.hostile@1"
ROUNDS = 20_000  # messages of a long run
LOOK_EVERY = 50  # messages between two looks at the healthy host
GROWTH_KIB_MAX = 4 * KIB  # of the broker between a quarter of the run and its end
FRAME_MAX = 16 * KIB

# Writes what it is given as a frame of ZMTP to every stream that the worker has, and sometimes to its socketpair, whose
# end the broker would take that for.
SPEAK = """
ffi.cdef[[int getsockopt(int, int, int, void *, unsigned *); long send(int, const void *, size_t, int);]]
local kind, size = ffi.new("int[1]"), ffi.new("unsigned[1]")
for fd = 3, 63 do
  size[0] = 4
  if ffi.C.getsockopt(fd, 1, 3, kind, size) == 0 then
    if kind[0] == 1 then
      local head = ffi.new("uint8_t[9]", 2)
      for place = 0, 3 do head[8 - place] = bit.band(bit.rshift(fn_id, 8 * place), 255) end
      ffi.C.send(fd, head, 9, 0x40)
      ffi.C.send(fd, args, fn_id, 0x40)
    elseif fn_id % 8 == 0 then
      ffi.C.send(fd, args, fn_id, 0x40)
    end
  end
end
"""


def frames() -> list[bytes]:
    """Return what mutations start from: a message of each operation, and the corpus."""
    golden = json.loads(GOLDEN.read_text())
    found = [bytes.fromhex(each["hex"]) for examples in golden.values() for each in examples if "hex" in each]
    found += [bytes.fromhex(path.read_text()) for path in sorted(CORPUS.glob("*.hex"))]
    return [frame for frame in found if len(frame) <= FRAME_MAX]


def mutated(frame: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return a frame with one to four faults."""
    data = bytearray(frame)
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[place % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xC1, 0xDF, 0xFF))
            case 2:
                del data[place:]
            case 3:
                data[place:place] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                del data[place : place + rng.randrange(1, 9)]
            case 5:
                data[place:] = other[place:]
            case _:
                data[8:8] = rng.randbytes(4)
    return bytes(data[:FRAME_MAX])


class Target:
    """A service that is spoken to, and a healthy host of it.

    Args:
        directory: an empty one.
    """

    def __init__(self, directory: Path) -> None:
        self.outcomes: Counter[str] = Counter()
        self._stack = ExitStack()
        self._run_directory = directory / "run"
        self._run_directory.mkdir(mode=0o700)
        self._stack.enter_context(Serving(self._run_directory, log_level="critical"))
        self._bridge = self._stack.enter_context(LuaHostBridge.connect(self._run_directory))
        self._bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        self._processes = self._stack.enter_context(Processes.of(self._bridge))
        self._peer: Peer | None = None

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop_peer()
        self._stack.close()

    def check(self) -> None:
        """Find the healthy host served by the broker that was there at first."""
        assert answers(self._bridge, HEALTHY)
        assert self._processes.broker.is_alive
        assert self._processes.worker_host.is_alive

    @property
    def memory_kib(self) -> int:
        return resident_kib(self._processes.broker.pid)

    @property
    def descriptors(self) -> int:
        return descriptors_of(self._processes.broker.pid).total()

    # -- the sides -----------------------------------------------------------------------------------------------
    def as_host(self, frame: bytes) -> None:
        """Send a frame to the ROUTER as a host that is known there."""
        if self._peer is None:
            self._peer = Peer(self._run_directory)
            self._peer.dealer.setsockopt(zmq.SNDTIMEO, 100)
        try:
            self._peer.send(frame)
            while self._peer.dealer.poll(0):
                self._peer.receive()
            self.outcomes["host"] += 1
        except zmq.Again:
            self._drop_peer()
        if self._peer is not None and readable(self._peer.channel.fileno(), 0):
            self._drop_peer()  # it was sent away, or granted a segment

    def as_several_frames(self, frame: bytes) -> None:
        """Send a frame in two halves, and in front of an empty one."""
        if self._peer is not None:
            with suppress(zmq.Again):
                self._peer.send(frame[: len(frame) // 2], frame[len(frame) // 2 :], b"")

    def as_stranger(self, frame: bytes) -> None:
        """Send a frame to the descriptor socket, first of all."""
        with channel(self._run_directory) as connection, open(os.devnull, "rb") as null:
            with suppress(OSError):
                send_raw(connection, frame[:DESCRIPTOR_MESSAGE_MAX] or b"\0", [null.fileno()] * (len(frame) % 4))
            self.outcomes["descriptor socket"] += 1

    def as_worker(self, frame: bytes) -> None:
        """Have a contract send a frame in the name of its worker."""
        try:
            self._bridge.register_host_contract(HOSTILE, LuaFunction(function(SPEAK)), replace=True)
            self._bridge.call(HOSTILE, len(frame), frame or b"\0", 0, timeout=0.05)
            self.outcomes["worker: value"] += 1
        except (CallError, BridgeError) as error:
            self.outcomes[f"worker: {type(error).__name__}"] += 1

    def _drop_peer(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None


class LoneBroker:
    """A broker whose worker host is made up.

    Args:
        directory: an empty one.
    """

    def __init__(self, directory: Path) -> None:
        self._run_directory = directory / "lone"
        ready, report = os.pipe()
        command = [*PYTHON, "-m", "luacell.broker", "--run-dir", str(self._run_directory), "--log-level", "critical"]
        self.process = subprocess.Popen([*command, "--ready-fd", str(report)], pass_fds=[report])
        os.close(report)
        assert readable(ready) and os.read(ready, 1) == b"1"
        os.close(ready)

    def as_worker_host(self, frame: bytes) -> None:
        """Say a frame as the worker host, after the greeting, with up to three descriptors."""
        connection = eventually(self._greeted, "a worker host is let in")
        with connection, open(os.devnull, "rb") as null, suppress(ChannelClosed, OSError):
            for _ in range(2):
                send_raw(connection, frame[:DESCRIPTOR_MESSAGE_MAX] or b"\0", [null.fileno()] * (len(frame) % 4))

    def _greeted(self) -> socket.socket | None:
        connection = channel(self._run_directory)
        try:
            send_message(connection, encode(messages.Hello(role="worker-host")))
            receive_message(connection)
        except (ChannelClosed, OSError):  # the one before is not gone yet
            connection.close()
            return None
        return connection

    def __enter__(self) -> LoneBroker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(LIMIT_S)


def run(seed: int, rounds: int = ROUNDS) -> Report:
    """Send mutated frames from all sides."""
    rng, known = random.Random(seed), frames()
    violations: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, ExitStack() as stack:
        target = stack.enter_context(Target(Path(name)))
        lone = stack.enter_context(LoneBroker(Path(name)))
        sides: Sequence[Callable[[bytes], None]] = (
            *(20 * [target.as_host]),
            *(4 * [target.as_several_frames]),
            *(4 * [target.as_stranger]),
            *(4 * [lone.as_worker_host]),
            target.as_worker,
        )
        before_kib = before_descriptors = 0
        started_s = time.monotonic()
        for number in range(rounds):
            frame = mutated(rng.choice(known), rng.choice(known), rng)
            side = rng.choice(sides)
            try:
                side(frame)
                if number % LOOK_EVERY == 0:
                    target.check()
                    assert lone.process.poll() is None
            except Exception as error:
                violations.append(f"{type(error).__name__} after {side.__name__} of {frame.hex()}: {error}")
                break
            if number == rounds // 4:
                before_kib, before_descriptors = target.memory_kib, target.descriptors
        target._drop_peer()
        grown_kib = target.memory_kib - before_kib
        if grown_kib > GROWTH_KIB_MAX:
            violations.append(f"the broker has grown by {grown_kib} KiB")
        figures = {
            "messages": f"{rounds} ({rounds / (time.monotonic() - started_s):.0f}/s) from {len(known)} frames",
            "outcomes": ", ".join(f"{count} {name}" for name, count in target.outcomes.most_common()),
            "broker": f"{target.memory_kib} KiB {grown_kib:+d}, {target.descriptors} descriptors "
            f"{target.descriptors - before_descriptors:+d}",
        }
    return Report("wire fuzz", figures, violations)
