"""Calls handed ahead to workers that crash, at random points, with a full window.

A host made by hand keeps many calls in flight and hears every message itself, so that a second answer would be seen.
What happened is witnessed twice: by the words that a worker writes into the slot around each call (their change since
the call was sent), and by the contract itself, which counts in a ledger: memory behind the slots in use, in the same
segment, which outlives the workers.

    out segment   slot 0 … 63: calls in flight   |   slot 64 … 127: the ledger, four bytes for each call number
                                                       begun u8 · finished u8 · unused u16

A call counts itself as begun with its first instruction and as finished with its last. Where a worker is killed from
outside, the signal may fall between a word and its count; where it dies of a call, they must be equal.
"""

from __future__ import annotations

import random
import signal
import statistics
import struct
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, NamedTuple

import zmq

from luacell.client import AbiErrorCode, HostContractId, LuaHostBridge
from luacell.protocol import headers, messages
from luacell.protocol.headers import HAS_ARGS, HAS_OUT, SLOT_FREE, Op
from luacell.protocol.memory.segments import Mapping
from luacell.protocol.messages import decode
from luacell.protocol.slots import DONE_OFFSET, PAYLOAD_OFFSET, WORD
from tests.soak.killer import Killer
from tests.soak.report import Report
from tests.support.contracts import PROBE, deploy
from tests.support.peers import Peer
from tests.support.serving import Serving
from tests.support.waiting import LIMIT_S

SLOTS: Final = 128
IN_FLIGHT: Final = 64
WORKERS: Final = 2  # of 32 calls each, when their windows are full
SIZE: Final = 16  # bytes of arguments and results
ENTRY_SIZE: Final = 4  # of the ledger
BUDGET_US: Final = 30_000_000
CRASH_EVERY: Final = 60  # calls, on average
CRASH_EVERY_KILLED: Final = 600  # the same while workers are killed from outside
KILL_PAUSES_S: Final = (0.0, 0.03)
TURNS: Final = 200  # between two looks at how many have died
SPINS_MAX: Final = 4000  # some microseconds
LETTERS: Final = struct.Struct("<IIIi")  # number, way to crash or 0, spins, where the ledger's entry is from `out`

CRASHES: Final = ("at the begin", "in the middle", "at the end", "abort", "exit", "behind its last write")

COUNTED = """
local ffi = require("ffi")
ffi.cdef[[ void abort(void); void _exit(int); ]]
local function crash() ffi.cast("volatile int *", 0)[0] = 1 end
return function(fn_id, args, out)
  local letters = ffi.cast("uint32_t *", args)
  local way, spins = letters[1], letters[2]
  local ledger = ffi.cast("volatile uint8_t *", out + ffi.cast("int32_t *", args)[3])
  ledger[0] = ledger[0] + 1
  if way == 1 then crash() end
  local sum = 0
  for number = 1, spins do
    sum = sum + number
    if way == 2 and number * 2 >= spins then crash() end
  end
  if way == 2 or way == 3 then crash() end
  if way == 4 then ffi.C.abort() end
  if way == 5 then ffi.C._exit(7) end
  local results = ffi.cast("uint32_t *", out)
  results[0] = letters[0]
  results[1] = sum % 4294967296
  if way == 6 then crash() end
  ledger[1] = ledger[1] + 1
end
"""


class Told(NamedTuple):
    """An answer: code 0 with what was written, or a failure."""

    code: int
    began: str = "yes"
    signal: int | None = None
    number: int = -1
    sum: int = -1


class Sent(NamedTuple):
    """A call in flight: what it carries, and the words of its slot when it was sent."""

    number: int
    way: int
    spins: int
    begun: int
    done: int


class CountingHost:
    """Keeps calls in flight and checks each answer against both witnesses.

    Args:
        run_directory: of the service.
        rng: chooses which calls crash, and how.
    """

    def __init__(self, run_directory: Path, rng: random.Random) -> None:
        name, _, major = PROBE.partition("@")
        self._contract_id = int(HostContractId(name, int(major)))
        self._rng = rng
        self._peer = Peer(run_directory)
        self._grant = self._peer.lease(self._contract_id, SIZE, SLOTS)
        self._stride = self._grant.segment.out_stride
        self._out = Mapping(self._grant.out_fd, SLOTS * self._stride, writable=True)
        self._ledger = IN_FLIGHT * self._stride
        self.numbers_max = (SLOTS - IN_FLIGHT) * self._stride // ENTRY_SIZE
        self._generations = [0] * SLOTS
        self._last_id = 0
        self._sent: dict[int, Sent] = {}  # by call id, until answered
        self._ended: set[int] = set()  # call ids, until the ledger is cleared
        self._resting: set[int] = set()  # call ids whose slot is kept
        self._free = list(range(IN_FLIGHT))
        self._next = 0  # number
        self.calls = 0
        self.held: list[int] = []  # by the workers, at looks into the service's health
        self.outcomes: Counter[str] = Counter()
        self.instants = 0  # a signal from outside fell between a word of the slot and the contract's count
        self.must_revive = False  # the contract rests, for it has crashed so often
        self.violations: list[str] = []

    def turn(self, crash_share: float) -> None:
        """Send what there is room for, and take what has come."""
        records = []
        while self._free and self._next < self.numbers_max:
            records.append(self._record(self._free.pop(), crash_share))
        if records:
            self._peer.send(headers.encode_records(Op.CALL, records))
        self._receive()

    @property
    def is_full(self) -> bool:
        """Whether the ledger has no room for more calls."""
        return self._next >= self.numbers_max

    def drain(self) -> None:
        """Take all answers, look for second ones and for counts that came too late, and clear the ledger."""
        give_up_s = time.monotonic() + 2 * LIMIT_S
        self._next, ceiling = self.numbers_max, self._next
        while (self._sent or self._resting) and time.monotonic() < give_up_s:
            self._receive()
        for sent in self._sent.values():
            self.violations.append(f"call {sent.number} was not answered")
        for number in range(ceiling):
            begun, finished = self._counts(number)
            if begun > 1 or finished > 1:
                self.violations.append(f"call {number} was begun {begun} times and finished {finished} times")
        self._out.view[self._ledger : self._ledger + ceiling * ENTRY_SIZE] = bytes(ceiling * ENTRY_SIZE)
        self._sent.clear()
        self._ended.clear()
        self._next = 0

    # -- sending ---------------------------------------------------------------------------------------------
    def _record(self, position: int, crash_share: float) -> tuple[int, ...]:
        rng, segment = self._rng, self._grant.segment
        way = rng.randint(1, len(CRASHES)) if rng.random() < crash_share else 0
        spins = rng.randint(0, SPINS_MAX)
        number = self._next
        self._next += 1
        self.calls += 1
        generation = self._generations[position] = self._generations[position] + 1
        self._grant.stamp(generation, position)
        start = position * segment.args_stride + PAYLOAD_OFFSET
        entry = self._ledger + number * ENTRY_SIZE - (position * self._stride + PAYLOAD_OFFSET)
        LETTERS.pack_into(self._grant.args.view, start, number, way, spins, entry)
        self._last_id += 1
        call_id = self._last_id << 16 | position
        self._sent[call_id] = Sent(number, way, spins, *self._words(position))
        slot = self._grant.slot | position
        flags = HAS_ARGS | HAS_OUT
        return call_id, self._contract_id, 0, BUDGET_US, segment.arena, slot, generation, flags, SIZE, SIZE

    def _words(self, position: int) -> tuple[int, int]:
        """Return `begun` and `done` of a slot."""
        start = position * self._stride
        view = self._out.view
        return WORD.unpack_from(view, start)[0], WORD.unpack_from(view, start + DONE_OFFSET)[0]

    def _counts(self, number: int) -> tuple[int, int]:
        """Return how often the contract has begun and finished a call."""
        start = self._ledger + number * ENTRY_SIZE
        return self._out.view[start], self._out.view[start + 1]

    # -- receiving -------------------------------------------------------------------------------------------
    def _receive(self) -> None:
        if not self._peer.dealer.poll(int(LIMIT_S * 1000)):
            self.violations.append(f"no message within {LIMIT_S:g} s with {len(self._sent)} calls in flight")
            self._sent.clear()
            self._resting.clear()
            return
        with suppress(zmq.Again):
            while True:
                self._take(self._peer.dealer.recv(zmq.NOBLOCK))

    def _take(self, message: bytes) -> None:
        op, count = headers.parse_preamble(message)
        if op is Op.FAILURE:
            failure = decode(messages.Failure, message)
            told = Told(failure.code, failure.began, failure.signal)
            self._on_answer(failure.call_id, told, is_free=failure.slot != "kept")
            return
        for record in headers.parse_records(op, count, message):
            if op is Op.RELEASED:
                self._on_released(record[0])
            else:
                assert op is Op.RESULT, op.name
                call_id, code, _, _, flags = record
                start = (call_id & 0xFFFF) * self._stride + PAYLOAD_OFFSET
                told = Told(code, "yes", None, *struct.unpack_from("<II", self._out.view, start))
                self._on_answer(call_id, told, is_free=bool(flags & SLOT_FREE))

    def _on_released(self, call_id: int) -> None:
        if call_id not in self._resting:
            self.violations.append(f"the slot of call id {call_id:#x} was released, but was not kept")
            return
        self._resting.remove(call_id)
        self._free.append(call_id & 0xFFFF)

    def _on_answer(self, call_id: int, told: Told, *, is_free: bool) -> None:
        sent = self._sent.pop(call_id, None)
        if sent is None:
            what = "a second answer" if call_id in self._ended else "an answer without a call"
            self.violations.append(f"{what} came for call id {call_id:#x}: {told}")
            return
        self._ended.add(call_id)
        position = call_id & 0xFFFF
        begun, done = self._words(position)
        self._compare(sent, told, has_begun=begun != sent.begun, is_done=done != sent.done)
        if is_free:
            self._free.append(position)
        else:
            self._resting.add(call_id)

    def _compare(self, sent: Sent, told: Told, *, has_begun: bool, is_done: bool) -> None:
        """Hold an answer against the slot's words and the contract's counts."""
        begun, finished = self._counts(sent.number)
        title = f"call {sent.number} ({'crashes ' + CRASHES[sent.way - 1] if sent.way else 'healthy'})"
        what = f"{title}: {told}, words begun {has_begun} done {is_done}, counts {begun} {finished}"
        is_value = told.code == AbiErrorCode.OK
        is_outside = told.signal == signal.SIGKILL
        if begun > 1 or finished > 1:
            self.violations.append(f"begun or finished twice: {what}")
        if is_value:
            self.outcomes["value"] += 1
            if told.number != sent.number or told.sum != sent.spins * (sent.spins + 1) // 2 or sent.way:
                self.violations.append(f"not its own answer: {what}")
            if not (has_begun and is_done and (begun, finished) == (1, 1)):
                self.violations.append(f"answered without having run: {what}")
            return
        self.outcomes[f"{AbiErrorCode(told.code).name} began {told.began}"] += 1
        if told.code == AbiErrorCode.QUARANTINED:
            self.must_revive = True
        elif told.code != AbiErrorCode.WORKER_CRASHED:
            self.violations.append(f"not an answer of this run: {what}")
        if is_done:
            self.violations.append(f"a finished answer was lost: {what}")
        if (told.began == "yes") != has_begun:
            self.violations.append(f"not as it began: {what}")
        if begun and told.began != "yes":
            self.violations.append(f"had begun: {what}")
        if finished or (has_begun and not begun):
            self.instants += 1
            if not is_outside:
                self.violations.append(f"words and counts differ: {what}")

    def close(self) -> None:
        self._out.close()
        self._peer.close()


def run(seed: int, crashes: int = 1000) -> Report:
    """Go on until so many workers have died: the first half of their calls, the others mostly by kill -9."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="crashes-") as directory, ExitStack() as stack:
        run_directory = Path(directory) / "run"
        run_directory.mkdir(mode=0o700)
        stack.enter_context(Serving(run_directory))
        bridge = stack.enter_context(LuaHostBridge.connect(run_directory))
        deploy(bridge, COUNTED, PROBE, stateless=True, workers=WORKERS, deadline="30s", run_limit="30s")
        host = CountingHost(run_directory, rng)
        stack.callback(host.close)
        started_s = time.monotonic()
        _crash_until(bridge, host, crashes // 2, CRASH_EVERY)
        with Killer(run_directory, PROBE, rng, KILL_PAUSES_S) as killer:
            _crash_until(bridge, host, crashes, CRASH_EVERY_KILLED)
        deaths = bridge.health()["deaths"]
        figures = {
            "crashes": f"{sum(deaths.values())} ({', '.join(f'{number} {cause}' for cause, number in deaths.items())})",
            "kills from outside": str(killer.kills),
            "calls": f"{host.calls} ({host.calls / (time.monotonic() - started_s):.0f}/s, {IN_FLIGHT} in flight)",
            "held by the workers on average": f"{statistics.mean(host.held):.0f}",
            "outcomes": ", ".join(f"{number} {outcome}" for outcome, number in host.outcomes.most_common()),
            "killed in the instant between word and count": str(host.instants),
        }
        return Report("crashes with calls handed ahead", figures, host.violations)


def _crash_until(bridge: LuaHostBridge, host: CountingHost, crashes: int, crash_every: int) -> None:
    while sum((health := bridge.health())["deaths"].values()) < crashes:
        host.held.append(health["slots_in_flight"] - health["queued"])
        for _ in range(TURNS):
            if host.is_full:
                break
            if host.must_revive:
                bridge.revive(PROBE)
                host.must_revive = False
            host.turn(1 / crash_every)
        if host.is_full:
            host.drain()
    host.drain()
