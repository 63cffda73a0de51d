"""A whole luacell in one process and one thread: the real dispatcher among simulated hosts and workers, from a seed.

    python -m tests.broker.simulation --seed 7 --steps 100000

Each seed chooses how the world is (`Swarm`): some have no deaths at all, others little else. Every event is a step;
after each that the broker sees, the auditor checks its rules. When the steps are over, hosts fall silent and faults
cease; then all debts must be paid, and when hosts have left, nothing may remain.

    simulated_time     clock, wires          simulated_hosts     callers
    simulated_memory   slots                 simulated_workers   worker hosts and workers
    simulated_server   the broker's shell    auditor             what must hold
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from random import Random
from types import ModuleType

from luacell.broker import answers, catalogue, model, quarantine, starts, windows, workforce
from luacell.broker.causes import SIGKILL, Cause
from luacell.protocol.limits import NS_PER_MS, NS_PER_S, NS_PER_US
from tests.broker import auditor
from tests.broker.auditor import Auditor, Violation
from tests.broker.simulated_hosts import CONTRACTS, SimulatedHost, random_record
from tests.broker.simulated_server import SimulatedServer
from tests.broker.simulated_time import Act, Schedule
from tests.broker.simulated_workers import SimulatedWorker, SimulatedWorkerHost

DRAIN_STEPS_MAX = 200_000  # a world without new calls comes to rest long before
SMALL_BOUNDS: tuple[tuple[ModuleType, str, int], ...] = (
    (model, "CALLS_IN_FLIGHT_MAX", auditor.CALLS_IN_FLIGHT_MAX),
    (quarantine, "CRASHES_MAX", auditor.CRASHES_MAX),
    (quarantine, "REST_FIRST_NS", 50 * NS_PER_MS),
    (quarantine, "REST_MAX_NS", 400 * NS_PER_MS),
    (answers, "CALLS_IN_FLIGHT_MAX", auditor.CALLS_IN_FLIGHT_MAX),
    (model, "WINDOW_FIRST", 3),
    (windows, "WINDOW_MAX", auditor.WINDOW_MAX),
    (windows, "REFILL_AT", 2),
    (windows, "PACE_CALLS_MIN", 3),
    (workforce, "WORKERS_MAX", auditor.WORKERS_MAX),
    (workforce, "STARTS_AT_ONCE_MAX", auditor.STARTS_AT_ONCE_MAX),
    (workforce, "START_LIMIT_NS", auditor.START_LIMIT_NS),
    (workforce, "LOAD_LIMIT_NS", auditor.LOAD_LIMIT_NS),
    (starts, "BURST", auditor.STARTS_BURST),
    (catalogue, "REGISTRATION_LIMIT_NS", auditor.REGISTRATION_LIMIT_NS),
    (catalogue, "UNCALLED_NS", 300 * NS_PER_MS),
    (catalogue, "CONTRACTS_MAX", len(CONTRACTS) - 1),
)


@contextmanager
def small_bounds() -> Iterator[None]:
    """Put the bounds of simulated worlds in force."""
    before = [(module, name, getattr(module, name)) for module, name, _ in SMALL_BOUNDS]
    for module, name, value in SMALL_BOUNDS:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@dataclass(slots=True)
class Swarm:
    """How a world is: probabilities per deed, and times in nanoseconds between events (0: never)."""

    death: float = 0.0  # of a worker at each of its steps
    stuck: float = 0.0  # a worker that takes its time before it begins
    slow: float = 0.0
    endless: float = 0.0
    failing: float = 0.0
    hostile: float = 0.0
    hang: float = 0.0  # starts and loads that fail or never end
    slow_kill: float = 0.0
    cancelling: float = 0.0
    malice: float = 0.0
    registering: float = 0.0
    giving_back: float = 0.0
    wearing: float = 0.0  # answers that say RECYCLE
    reloading: float = 0.0  # contracts that load, and take another's place
    nesting: float = 0.0  # contracts that call others
    call_gap_ns: int = 2 * NS_PER_MS
    kill_gap_ns: int = 0
    host_leave_gap_ns: int = 0
    worker_host_gap_ns: int = 0
    burst: int = 0
    hosts: int = 2
    spares: int = 1

    @classmethod
    def chosen(cls, rng: Random) -> Swarm:
        """Choose a world."""
        often, seldom = (0, 0, 0.01, 0.1), (0, 0.001, 0.01, 0.03)
        return cls(
            death=rng.choice((0, 0.001, 0.01, 0.1)),  # at the last one, calls often lose two workers before they begin
            stuck=rng.choice(often),
            slow=rng.choice(often),
            endless=rng.choice(seldom),
            failing=rng.choice(often),
            hostile=rng.choice(often),
            hang=rng.choice((0, 0, 0.01, 0.05)),
            slow_kill=rng.choice(often),
            cancelling=rng.choice(often),
            malice=rng.choice(often),
            registering=rng.choice((0.001, 0.01, 0.05)),
            giving_back=rng.choice(often),
            call_gap_ns=rng.choice((200 * NS_PER_US, 2 * NS_PER_MS, 20 * NS_PER_MS)),
            kill_gap_ns=rng.choice((0, 50 * NS_PER_MS, NS_PER_S)),
            host_leave_gap_ns=rng.choice((0, 300 * NS_PER_MS, 3 * NS_PER_S)),
            worker_host_gap_ns=rng.choice((0, 500 * NS_PER_MS, 5 * NS_PER_S)),
            burst=rng.choice((0, 0, 12)),
            hosts=rng.randrange(1, 5),
            spares=rng.randrange(0, 4),
            wearing=rng.choice((0, 0, 0.01, 0.1)),
        )

    def without_faults(self) -> Swarm:
        """Return this world at peace; what is under way may still end badly."""
        return Swarm(hosts=self.hosts, spares=self.spares)


class Simulation:
    """One world.

    Attributes:
        workers: all that ever lived, by number.
        counts: replies by kind, and deeds of the world.
    """

    def __init__(self, seed: int, swarm: Swarm | None = None) -> None:
        self.schedule = Schedule(seed)
        self.swarm = Swarm.chosen(self.schedule.rng) if swarm is None else swarm
        self.counts: Counter[str] = Counter()
        self.workers: dict[int, SimulatedWorker] = {}
        self.auditor = Auditor(self)
        self.server = SimulatedServer(self, self.swarm.spares)
        self.hosts: list[SimulatedHost] = []
        self.steps = 0
        self._worker_host = SimulatedWorkerHost(self)
        self._last_host = 0
        self._is_over = False

    def run(self, steps: int) -> None:
        """Live for some steps, come to rest, and end.

        Raises:
            Violation: a rule was broken.
        """
        self._begin()
        for _ in range(steps):
            self._step()
        self._is_over = True
        self.swarm = self.swarm.without_faults()
        self._drain()
        self.auditor.check_rest()
        for host in self.hosts:
            host.unregister_all()
        self._drain()
        for host in self.hosts:
            host.leave()
        self._drain()
        self.auditor.check_end(self.server.dispatcher, self.swarm.spares)

    def _begin(self) -> None:
        self._greet()
        for _ in range(self.swarm.hosts):
            self._add_host()
        for number, contract_id in enumerate(CONTRACTS[:-1]):
            host = self.hosts[number % len(self.hosts)]
            host.register(random_record(self, contract_id, host.id, b"fine"), replace=False)
        for host in self.hosts:
            self._live(host)
        self._every(self.swarm.kill_gap_ns, self._kill_a_worker)
        self._every(self.swarm.host_leave_gap_ns, self._replace_a_host)
        self._every(self.swarm.worker_host_gap_ns, self._replace_the_worker_host)

    def _step(self) -> bool:
        self.steps += 1
        return self.schedule.step()

    def _drain(self) -> None:
        for _ in range(DRAIN_STEPS_MAX):
            if not self._step():
                return
        raise Violation("the world does not come to rest")

    # -- what happens by itself ---------------------------------------------------------------------------------
    def _add_host(self) -> None:
        self._last_host += 1
        self.hosts.append(SimulatedHost(self, self._last_host.to_bytes(16, "little")))

    def _live(self, host: SimulatedHost) -> None:
        """Let a host act, again and again."""
        if self._is_over or not host.is_alive:
            return
        host.act()
        gap_ns = int(self.schedule.rng.expovariate(1 / self.swarm.call_gap_ns))
        self.schedule.after(gap_ns, lambda: self._live(host))

    def _every(self, gap_ns: int, act: Act) -> None:
        """Do something about every so often, while the world lives."""
        if gap_ns:

            def again() -> None:
                if not self._is_over:
                    act()
                    self._every(gap_ns, act)

            self.schedule.after(self.schedule.between(gap_ns // 2, 2 * gap_ns), again)

    def _kill_a_worker(self) -> None:
        alive = [worker for worker in self.workers.values() if worker.is_alive]
        if alive:
            self.schedule.rng.choice(alive).die(Cause(signal=SIGKILL))

    def _replace_a_host(self) -> None:
        host = self.hosts.pop(0)
        host.leave()
        self.counts["hosts that left"] += 1
        self._add_host()
        self._live(self.hosts[-1])

    def _replace_the_worker_host(self) -> None:
        self.counts["worker hosts lost"] += 1
        self._worker_host.die()
        self._worker_host = SimulatedWorkerHost(self)
        self.schedule.after(self.schedule.between(0, 300 * NS_PER_MS), self._greet)

    def _greet(self) -> None:
        """Introduce the worker host; the broker takes no second one."""
        host = self._worker_host
        if self.server.worker_host is None:
            self.server.on_worker_host_joined(host)
        elif host.is_alive and self.server.worker_host is not host:
            self.schedule.after(5 * NS_PER_MS, self._greet)


def simulate(seed: int, steps: int, swarm: Swarm | None = None) -> Simulation:
    """Run one world with small bounds; how it is follows from its seed, unless that is given.

    Raises:
        Violation: a rule was broken; its text has the seed and the last events.
    """
    with small_bounds():
        world = Simulation(seed, swarm)
        swarm = world.swarm
        try:
            world.run(steps)
        except Exception as error:
            raise Violation(_report(world, seed, swarm, error)) from error
    return world


def _report(world: Simulation, seed: int, swarm: Swarm, error: Exception) -> str:
    lines = [f"seed {seed}, step {world.steps}: {type(error).__name__}: {error}"]
    lines += [f"  {now_ns / NS_PER_MS:12.3f} ms  {' '.join(map(str, event))}" for now_ns, *event in world.auditor.last]
    lines.append("  " + ", ".join(f"{field.name}={getattr(swarm, field.name)}" for field in fields(swarm)))
    lines.append(f"again: python -m tests.broker.simulation --seed {seed} --steps {world.steps}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.broker.simulation", description="Simulate a luacell.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--steps", type=int, default=100_000, help="per seed")
    options = parser.parse_args()
    total: dict[str, Counter[str]] = {"answers": Counter(), "deaths": Counter(), "others": Counter()}
    for seed in range(options.seed, options.seed + options.seeds):
        try:
            world = simulate(seed, options.steps)
        except Violation as violation:
            print(violation, file=sys.stderr)
            return 1
        total["answers"] += world.auditor.answers
        total["deaths"] += world.auditor.deaths
        total["others"] += world.counts
    for name, counter in total.items():
        print(name)
        for key, count in sorted(counter.items()):
            print(f"  {count:8} {key}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
