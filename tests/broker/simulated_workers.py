"""Worker hosts and workers as the simulation has them: each step of `execute.lua` is an event, and may be the last.

A worker marks `begun`, looks at its deadline and at `withdrawn`, runs the call, writes the result, marks `done`, and
only then sends DONE, for several calls at once where it likes. What it has sent when it dies may arrive, also late, or
be lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from luacell.broker.causes import SIGALRM, SIGKILL, Cause
from luacell.protocol.headers import NOT_BEGUN, PROCESS_FULL, RECYCLE, RETIRE, Done
from luacell.protocol.limits import NS_PER_MS, NS_PER_S, NS_PER_US
from tests.broker.simulated_hosts import CONTRACTS, random_budget_us
from tests.broker.simulated_memory import Slot
from tests.broker.simulated_time import Act, Wire

if TYPE_CHECKING:
    from tests.broker.simulation import Simulation

TIMER_SLACK_NS = NS_PER_S
CONTRACT_FAILED, OUT_OF_MEMORY = 102, 258
CAUSES = (Cause(signal=11), Cause(signal=6), Cause(signal=SIGKILL), Cause(exit_code=0), Cause(exit_code=7))

# Where a worker can be when it dies; a test sees to it that each of them is hit.
STEPS = (
    "starting",
    "blank",
    "loading",
    "idle",
    "execute under way",
    "arrived",
    "begun",
    "running",
    "result written",
    "done written",
    "answered",
)
CARRY_STEPS = ("saving", "restoring")  # likewise, in worlds with many reloads
NEST_STEPS = ("calling", "waiting", "resumed")  # likewise, in worlds whose contracts call each other


@dataclass(slots=True, eq=False)
class Execute:
    """One call on its way to a worker."""

    sequence: int
    deadline_ns: int
    limit_ns: int
    generation: int
    out_size: int
    slot: Slot
    number: int
    is_taken_up: bool = False  # the worker has touched its slot
    is_judged: bool = False  # it was looked at, and is run or refused


class SimulatedWorker:
    """A worker process.

    Attributes:
        is_spent: it must not be used again.
        has_said_so: and the broker has heard it.
        is_unheard: its contract has spoilt the connection: nothing that it sends arrives any more.
        keeps_state: it is a singleton that saves and restores.
        state: how many calls it and those before it have run.
        held: numbers of calls whose slots it may touch: EXECUTE was sent to it, DONE was not sent by it.
        sequences: of all hand-overs to it.
        executes: the last hand-over of each call to it, by number.
    """

    def __init__(self, world: Simulation, host: SimulatedWorkerHost, worker_id: int) -> None:
        self.world = world
        self.id = worker_id
        self.is_alive = True
        self.has_channel = True
        self.is_spent = False
        self.has_said_so = False
        self.is_unheard = False
        self.keeps_state = False
        self.state = 0
        self.step = "starting"
        self.held: set[int] = set()
        self.sequences: set[int] = set()
        self.executes: dict[int, Execute] = {}
        self.inbox = Wire(world.schedule)
        self.outbox = Wire(world.schedule)
        self._host = host
        self._waiting: deque[Act] = deque()
        self._is_occupied = False
        self._running: Execute | None = None
        self._gathered: list[tuple[Done, int]] = []  # answers that are not sent, and whose they are
        self._began_ns = 0  # the call that it runs
        self._waited_ns = 0  # of that time, for calls that its contract has made
        self._waits_ns = 0  # since when it does; 0: it does not
        self._last_inner = 0
        self._after_waiting: Act = self._perish

    def _send(self, act: Act) -> None:
        """Send the broker what makes it act."""
        if not self.is_unheard:
            self.outbox.send(act)

    # -- life ---------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Come up, or hang, or die on the way."""
        if self.world.schedule.chance(self.world.swarm.hang):
            return
        self._then("starting", self._quickly(8), self._ready)

    def die(self, cause: Cause) -> None:
        """End: nothing of this process happens any more, but for what is under way."""
        if not self.is_alive:
            return
        step = "execute under way" if self.step == "idle" and self.held else self.step
        self.world.auditor.worker_ended(self.id, step, cause)
        self.is_alive = False
        self.held.clear()
        self.outbox.cut(self.world.schedule.rng.randrange(4))
        self.close_channel()
        self.world.schedule.after(self._quickly(1), lambda: self.world.server.on_pidfd(self.id))
        self._host.reap(self, cause)

    def close_channel(self) -> None:
        """Close the socketpair; a process that dies does so just before."""
        if self.has_channel:
            self.has_channel = False
            self.world.schedule.after(self._quickly(1), lambda: self.world.server.on_channel_closed(self.id))

    def receive(self, act: Act) -> None:
        """A message is here; it waits until the one before it is done with."""
        self._waiting.append(act)
        self._take()

    def _ready(self) -> None:
        self.step = "blank"
        self._send(lambda: self.world.server.on_ready(self.id))

    def _take(self) -> None:
        if self.is_alive and not self._is_occupied and self._waiting and not self.is_spent:
            self._is_occupied = True
            self._waiting.popleft()()

    def _rest(self, step: str) -> None:
        self.step = step
        self._is_occupied = False
        self._take()

    def _then(self, step: str, delay_ns: int, act: Act) -> None:
        """Go on after a while, unless this step is the last one."""
        self.step = step
        next_ = self._perish if self.world.schedule.chance(self.world.swarm.death) else act

        def go_on() -> None:
            if self.is_alive:
                next_()

        self.world.schedule.after(delay_ns, go_on)

    def _perish(self) -> None:
        self.die(self.world.schedule.rng.choice(CAUSES))

    def _quickly(self, most_ms: int) -> int:
        return self.world.schedule.between(10 * NS_PER_US, most_ms * NS_PER_MS)

    # -- loading ------------------------------------------------------------------------------------------------
    def load(self, source: bytes, is_single: bool) -> None:
        """Load a contract; what comes of it is in its source."""
        self.keeps_state = is_single and self.world.schedule.chance(0.8)
        schedule, server = self.world.schedule, self.world.server
        if source == b"hang" or schedule.chance(self.world.swarm.hang):
            self.step = "loading"
        elif source == b"crash":
            self._then("loading", self._quickly(1), self._perish)
        elif source == b"close":
            self._then("loading", self._quickly(1), self.close_channel)
        elif source == b"ready":
            self._then("loading", self._quickly(1), lambda: self._send(lambda: server.on_ready(self.id)))
        else:
            problem = source.decode() if source in (b"type", b"load") else ""
            if source == b"flaky" and schedule.chance(0.4):
                problem = "load"
            self._then("loading", self._quickly(2), lambda: self._loaded(problem))

    def _loaded(self, problem: str) -> None:
        self._send(lambda: self.world.server.on_loaded(self.id, problem, self.keeps_state))
        self._rest("idle")

    # -- state --------------------------------------------------------------------------------------------------
    def save(self) -> None:
        """Hand on what there is, or fail to."""
        self._carry("saving", lambda problem: self._saved(problem))

    def _saved(self, problem: str) -> None:
        state = b"" if problem else b"%d" % self.state
        self._send(lambda: self.world.server.on_saved(self.id, state, problem))
        self.is_spent = True
        self._rest("idle")

    def restore(self, state: bytes) -> None:
        """Take up what another has handed on, or fail to."""
        self._carry("restoring", lambda problem: self._restored(state, problem))

    def _restored(self, state: bytes, problem: str) -> None:
        self.state = int(state)
        self.is_spent = bool(problem)
        self._send(lambda: self.world.server.on_restored(self.id, problem))
        self._rest("idle")

    def _carry(self, step: str, end: Callable[[str], None]) -> None:
        schedule, swarm = self.world.schedule, self.world.swarm
        self.step = step
        if schedule.chance(swarm.hang):
            return
        problem = "no" if schedule.chance(swarm.failing) else ""
        self._then(step, self._quickly(5), lambda: end(problem))

    # -- calls: what execute.lua does -----------------------------------------------------------------------------
    def execute(self, call: Execute) -> None:
        """Take a call up."""
        schedule = self.world.schedule
        is_stuck = schedule.chance(self.world.swarm.stuck)
        delay_ns = schedule.between(20 * NS_PER_MS, 900 * NS_PER_MS) if is_stuck else self._quickly(1) // 8
        self._then("arrived", delay_ns, lambda: self._mark_begun(call))

    def may_touch(self, number: int) -> bool:
        """Whether this worker may yet touch the slot of a call that it holds."""
        call = self.executes.get(number)
        if number not in self.held or call is None:
            return False
        return call.is_taken_up or call.slot.withdrawn < call.sequence

    def _mark_begun(self, call: Execute) -> None:
        if call.slot.withdrawn >= call.sequence:
            self._pass_by(call)
            return
        call.is_taken_up = True
        self.world.auditor.slot_read(self.id, call.slot, call.generation)
        call.slot.begun = call.sequence
        self.world.auditor.marked_begun(call.slot.args, True)
        self._then("begun", self._quickly(1) // 16, lambda: self._judge(call))

    def _judge(self, call: Execute) -> None:
        call.is_judged = True
        slot = call.slot
        if self.world.schedule.now_ns >= call.deadline_ns or slot.withdrawn >= call.sequence:
            slot.begun = 0
            self.world.auditor.marked_begun(slot.args, False)
            self._write(call, 0, NOT_BEGUN)
            return
        self.state += 1
        self.world.auditor.began(slot.args, self.id, call.deadline_ns)
        self._running = call
        self._began_ns, self._waited_ns, self._waits_ns = self.world.schedule.now_ns, 0, 0
        self.world.schedule.after(call.limit_ns + TIMER_SLACK_NS, lambda: self._alarm(call))
        self._run(call)

    def _alarm(self, call: Execute) -> None:
        if self._running is not call or not self.is_alive:
            return
        limit_ns = self._began_ns + self._waited_ns + call.limit_ns
        fires_ns = (call.deadline_ns if self._waits_ns else limit_ns) + TIMER_SLACK_NS
        if fires_ns > self.world.schedule.now_ns:
            self.world.schedule.at(fires_ns, lambda: self._alarm(call))
        else:
            self.die(Cause(signal=SIGALRM))

    def _run(self, call: Execute) -> None:
        """Be a contract: fine, slow, endless, broken or hostile."""
        schedule, swarm = self.world.schedule, self.world.swarm
        run_ns = self._quickly(3)
        code = flags = 0
        if schedule.chance(swarm.slow):
            run_ns = schedule.between(10 * NS_PER_MS, 400 * NS_PER_MS)
        if schedule.chance(swarm.hostile):
            self._misbehave(call)
        if schedule.chance(swarm.failing):
            full = PROCESS_FULL * (call.sequence & 1)
            code, flags = schedule.rng.choice(((CONTRACT_FAILED, 0), (OUT_OF_MEMORY, RETIRE | full)))
        if swarm.wearing and schedule.chance(swarm.wearing):
            flags = schedule.rng.choice((flags | RECYCLE, flags | RECYCLE, RETIRE))
        if schedule.chance(swarm.endless):
            self.step = "running"
        elif swarm.nesting and schedule.chance(swarm.nesting):
            self._then("calling", self._quickly(1), lambda: self._call_another(call, code, flags))
        else:
            self._then("running", run_ns, lambda: self._write(call, code, flags))

    def _call_another(self, call: Execute, code: int, flags: int) -> None:
        """Call a contract and wait for what comes of it."""
        schedule, server = self.world.schedule, self.world.server
        self._send_gathered()
        self._last_inner += 1
        inner_id, budget_us = self._last_inner, random_budget_us(self.world)
        contract_id = schedule.rng.choice(CONTRACTS)
        self._waits_ns = schedule.now_ns
        self._after_waiting = lambda: self._resume(call, code, flags)
        self._send(lambda: server.on_nested(self.id, inner_id, contract_id, budget_us))
        self.step = "waiting"
        if schedule.chance(self.world.swarm.death):
            schedule.after(self._quickly(20), self._perish)

    def inner_ended(self, inner_id: int) -> None:
        """The answer to a call of the contract is here."""
        if self.is_alive and self._waits_ns and inner_id == self._last_inner:
            self._waited_ns += self.world.schedule.now_ns - self._waits_ns
            self._waits_ns = 0
            self._then("resumed", self._quickly(3), self._after_waiting)

    def _resume(self, call: Execute, code: int, flags: int) -> None:
        if self.world.schedule.chance(self.world.swarm.nesting / 2):
            self._call_another(call, code, flags)
        else:
            self._write(call, code, flags)

    def _misbehave(self, call: Execute) -> None:
        """Do what a contract can do through FFI."""
        server, rng = self.world.server, self.world.schedule.rng
        deed = rng.randrange(7)
        if deed == 0:  # an answer for a call that it does not hold
            forged = Done(max(1, call.sequence + rng.randrange(-5, 5)), 0, call.out_size, 0, 0)
            if forged.sequence not in self.sequences:
                self._send(lambda: server.on_done(self.id, forged))
        elif deed == 1:
            self._send(lambda: server.on_ready(self.id))
        elif deed == 2:
            self._send(lambda: server.on_loaded(self.id, rng.choice(("", "load"))))
        elif deed == 3:
            self.close_channel()
        elif deed == 4:  # the mark of an answer before there is one
            self.world.auditor.lied(call.slot.args)
            call.slot.code = call.slot.flags = 0
            call.slot.out_size = 1 << 31
            call.slot.done = call.sequence
        elif deed == 5:  # the beginning of a long message, which swallows what follows
            self.is_unheard = True
            self.world.counts["connections spoilt"] += 1
        else:
            self._perish()

    def _write(self, call: Execute, code: int, flags: int) -> None:
        slot = call.slot
        slot.code, slot.flags = code, flags
        slot.out_size = 0 if code or flags & NOT_BEGUN else call.out_size
        slot.error_size = 1 if code else 0
        slot.out = slot.args
        self._then("result written", self._quickly(1) // 16, lambda: self._mark_done(call))

    def _mark_done(self, call: Execute) -> None:
        slot = call.slot
        slot.done = call.sequence
        if not slot.flags & NOT_BEGUN:
            self.world.auditor.finished(slot.args, slot.code)
        self._then("done written", self._quickly(1) // 16, lambda: self._answer(call))

    def _answer(self, call: Execute) -> None:
        slot, schedule = call.slot, self.world.schedule
        done = Done(call.sequence, slot.code, slot.out_size, slot.error_size, slot.flags)
        self._running = None
        self.is_spent = bool(slot.flags & RETIRE)
        self._gathered.append((done, slot.args))
        if schedule.chance(self.world.swarm.hostile / 8):  # twice
            self._gathered.append((done, slot.args))
        may_gather = self._waiting and not self.is_spent
        if not may_gather or schedule.chance(0.4):
            self._send_gathered()
        if schedule.chance(self.world.swarm.death):
            self.step = "answered"
            self._perish()
        else:
            self._rest("idle")

    def _pass_by(self, call: Execute) -> None:
        """Leave a call alone that was taken back; say so at once."""
        self._gathered.append((Done(call.sequence, 0, 0, 0, NOT_BEGUN), call.number))
        self.world.counts["calls passed by"] += 1
        self._send_gathered()
        self._rest("idle")

    def _send_gathered(self) -> None:
        gathered, self._gathered = self._gathered, []
        for done, number in gathered:
            if not self.is_unheard:
                self.held.discard(number)
            self._send(lambda done=done: self.world.server.on_done(self.id, done))  # type: ignore[misc]
        if len(gathered) > 1:
            self.world.counts["gathered answers"] += len(gathered)


class SimulatedWorkerHost:
    """The process that forks, kills and reaps workers; they do not outlive it."""

    def __init__(self, world: Simulation) -> None:
        self.world = world
        self.is_alive = True
        self.orders = Wire(world.schedule)
        self.reports = Wire(world.schedule)
        self._workers: dict[int, SimulatedWorker] = {}

    def start(self, worker_id: int) -> None:
        """Fork, if that works."""
        if not self.is_alive:
            return
        if self.world.schedule.chance(self.world.swarm.hang):
            problem = Cause(problem="a worker could not be started: Cannot allocate memory")
            self.reports.send(lambda: self.world.server.on_exited(worker_id, problem))
            return
        worker = self._workers[worker_id] = SimulatedWorker(self.world, self, worker_id)
        self.world.workers[worker_id] = worker
        self.reports.send(lambda: self.world.server.on_started(worker))
        worker.start()

    def kill(self, worker_id: int) -> None:
        """Send SIGKILL, now or when the machine comes around to it."""
        schedule = self.world.schedule
        worker = self._workers.get(worker_id)
        if not self.is_alive or worker is None:
            return
        low_ns, high_ns = (0, 2 * NS_PER_MS)
        if schedule.chance(self.world.swarm.slow_kill):
            low_ns, high_ns = (50 * NS_PER_MS, 3 * NS_PER_S)
        schedule.after(schedule.between(low_ns, high_ns), lambda: worker.die(Cause(signal=SIGKILL)))

    def inspect(self, worker_id: int, sequence: int) -> None:
        """Look at a process, if it lives; now and then that takes too long."""
        schedule = self.world.schedule
        worker = self._workers.get(worker_id)
        if self.is_alive and worker is not None and worker.is_alive and not schedule.chance(0.1):
            self.reports.send(lambda: self.world.server.on_inspected(worker_id, sequence))

    def reap(self, worker: SimulatedWorker, cause: Cause) -> None:
        """A child is dead: report how."""
        self._workers.pop(worker.id, None)
        if self.is_alive:
            delay_ns = self.world.schedule.between(0, NS_PER_MS)
            self.world.schedule.after(delay_ns, lambda: self._report(worker.id, cause))

    def _report(self, worker_id: int, cause: Cause) -> None:
        if self.is_alive:
            self.reports.send(lambda: self.world.server.on_exited(worker_id, cause))

    def die(self) -> None:
        """End, and all workers with it."""
        if not self.is_alive:
            return
        self.is_alive = False
        self.reports.send(lambda: self.world.server.on_worker_host_gone(self))
        schedule = self.world.schedule
        for worker in list(self._workers.values()):
            schedule.after(schedule.between(0, 2 * NS_PER_MS), partial(worker.die, Cause(signal=SIGKILL)))
