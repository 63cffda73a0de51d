"""Workers that write for ever are killed at their callers' deadlines; to a slot that is free nobody writes any more.

A host made by hand watches the memory itself: the contract counts in its slot's `out` millions of times a second, so
that a writer who lived on would show between any two looks.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from luacell.client import AbiErrorCode, LuaHostBridge
from luacell.protocol import headers, messages
from luacell.protocol.headers import HAS_ARGS, HAS_OUT, Op
from luacell.protocol.memory.segments import Mapping
from luacell.protocol.messages import decode
from luacell.protocol.slots import PAYLOAD_OFFSET
from tests.soak.report import Report
from tests.support.contracts import HEALTHY, deploy, function
from tests.support.peers import Grant, Peer
from tests.support.serving import Serving

WORKERS = 4
BUDGET_US = 200_000  # twice what a call must have run before its worker is killed for it
RUN_LIMIT = "1s"  # for what began too late for that
SIZE = 8
SOURCE = function("""
  if fn_id == 1 then
    local count = ffi.cast("volatile uint64_t *", out)
    while true do count[0] = count[0] + 1 end
  end
  ffi.copy(out, args, 8)
""")


class Watched:
    """A host whose slots are looked at from outside."""

    def __init__(self, peer: Peer, contract_id: int) -> None:
        self._peer = peer
        self._contract_id = contract_id
        self._grant: Grant = peer.lease(contract_id, count=WORKERS)
        segment = self._grant.segment
        self._out = Mapping(self._grant.out_fd, segment.count * segment.out_stride, writable=False)
        self._last_id = 0
        self._generation = 0
        self.writers = self.late = self.wrong = 0

    def close(self) -> None:
        self._out.close()

    def round(self) -> None:
        """Let a writer loose in each slot, wait until all are free, use them again, and look."""
        calls = self._calls(1, BUDGET_US, bytes(SIZE))
        free: set[int] = set()
        while len(free) < WORKERS:
            free |= {calls[each] for each in self._freed() if each in calls}
        at_first = [self.seen(position) for position in range(WORKERS)]
        self.writers += sum(each != bytes(SIZE) for each in at_first)
        self.late += sum(self.seen(position) != at_first[position] for position in range(WORKERS))
        values = {position: (self._last_id << 8 | position).to_bytes(SIZE, "little") for position in range(WORKERS)}
        answers = 0
        self._calls(0, 0, *values.values())
        while answers < WORKERS:
            answers += self._results()
        for _ in range(100):
            self.wrong += sum(self.seen(position) != value for position, value in values.items())

    def seen(self, position: int) -> bytes:
        """Return what the memory of a slot's `out` holds now."""
        start = position * self._grant.segment.out_stride + PAYLOAD_OFFSET
        return bytes(self._out.view[start : start + SIZE])

    def _calls(self, fn_id: int, budget_us: int, *args: bytes) -> dict[int, int]:
        """Call once in each slot; return call ids and positions."""
        self._generation += 1
        calls = {}
        for position in range(WORKERS):
            start = position * self._grant.segment.args_stride + PAYLOAD_OFFSET
            self._grant.args.view[start : start + SIZE] = args[position % len(args)]
            self._grant.stamp(self._generation, position)
            self._last_id += 1
            calls[self._last_id] = position
            self._peer.call(
                call_id=self._last_id,
                contract_id=self._contract_id,
                arena=self._grant.arena,
                slot=self._grant.slot | position,
                generation=self._generation,
                fn_id=fn_id,
                budget_us=budget_us,
                flags=HAS_ARGS | HAS_OUT,
                args_size=SIZE,
                out_size=SIZE,
            )
        return calls

    def _results(self) -> int:
        """Hear of results; return how many."""
        message = self._peer.receive()
        op, count = headers.parse_preamble(message)
        assert op is Op.RESULT, op
        return len(list(headers.parse_records(op, count, message)))

    def _freed(self) -> list[int]:
        """Hear of the end of calls; return those whose slots are free."""
        message = self._peer.receive()
        op, count = headers.parse_preamble(message)
        if op is Op.RELEASED:
            return [call_id for (call_id,) in headers.parse_records(op, count, message)]
        failed = decode(messages.Failure, message)
        assert failed.code == AbiErrorCode.DEADLINE_EXCEEDED, failed
        return [] if failed.slot == "kept" else [failed.call_id]


def run(seed: int, rounds: int = 75) -> Report:
    """Let four writers loose so many times."""
    with tempfile.TemporaryDirectory(prefix="late-") as directory:
        run_directory = Path(directory) / "run"
        run_directory.mkdir(mode=0o700)
        with (
            Serving(run_directory, "--spares", str(WORKERS)),
            LuaHostBridge.connect(run_directory) as bridge,
            Peer(run_directory) as peer,
        ):
            deploy(bridge, SOURCE, HEALTHY, stateless=True, workers=WORKERS, run_limit=RUN_LIMIT)
            watched = Watched(peer, next(each.id for each in bridge.contracts()))
            try:
                for _ in range(rounds):
                    watched.round()
            finally:
                watched.close()
    calls = rounds * WORKERS
    violations = [f"{watched.late} slots were written to when they were free"] if watched.late else []
    violations += [f"{watched.wrong} looks at reused slots saw something else"] if watched.wrong else []
    violations += [f"only {watched.writers} of {calls} wrote at all"] if watched.writers < calls // 2 else []
    figures = {"writers": f"{watched.writers} of {calls} calls", "late": str(watched.late), "wrong": str(watched.wrong)}
    return Report("late writes into slots that are used again", figures, violations)
