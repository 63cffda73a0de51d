"""The workforce: how many blank workers are kept, which contract gets the next one, and who must go.

It orders starts, loads and kills as effects and hears of their outcome; it holds no process. Calls are the
dispatcher's business.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Final

from luacell.broker.causes import HOST_GONE, HOST_LEAVES, Cause
from luacell.broker.model import (
    BLANK,
    BUSY,
    DOOMED,
    IDLE,
    LEAVING,
    LOADING,
    STARTING,
    WAITING,
    Contract,
    Effect,
    KillWorker,
    LoadWorker,
    StartWorker,
    Subject,
    Worker,
)
from luacell.broker.starts import COST_NS, StartBudget
from luacell.broker.timers import TimerWheel
from luacell.protocol.confinement import DEFAULT, Confinement, Layer, stricter
from luacell.protocol.limits import LOAD_LIMIT_NS, NS_PER_MS, NS_PER_S, START_LIMIT_NS, WORKERS_MAX

BACKOFF_FIRST_NS: Final = 10 * NS_PER_MS
BACKOFF_MAX_NS: Final = 5 * NS_PER_S
UNWANTED: Final = "nobody is served by such a worker"
STARTS_AT_ONCE_MAX: Final = 8  # forks of ~7 ms each that may be under way together
SPARES_PAUSE_NS: Final = 10 * NS_PER_MS  # from a worker's load to the start of a spare, which would compete with it


def backoff_ns(failures: int) -> int:
    """Return how long to wait after so many failures in a row: 10 ms, 20 ms, … 5 s."""
    return min(BACKOFF_FIRST_NS << min(failures - 1, 16), BACKOFF_MAX_NS)


class Workforce:
    """All workers of one broker.

    Args:
        wheel: for limits on starting and loading.
        new_routing_id: makes 16 unguessable bytes.
        spares: blank workers to keep, for each level of the sandbox that is in use.
        workers_max: how many there may be, dying ones included; None for WORKERS_MAX.
    """

    def __init__(
        self,
        wheel: TimerWheel[Subject],
        new_routing_id: Callable[[], bytes],
        spares: int,
        workers_max: int | None = None,
    ) -> None:
        self._wheel = wheel
        self._new_routing_id = new_routing_id
        self.workers_max = WORKERS_MAX if workers_max is None else workers_max
        self.spares_wanted = spares
        self._last_id = 0
        self._start_failures = 0
        self._retry_ns = 0
        self._spares_due_ns = 0  # spares that are missing are ordered from then on
        self._paced_until_ns = 0  # starts that are missing are ordered then, one at least
        self.starts = StartBudget()
        self.by_id: dict[int, Worker] = {}
        self.by_routing_id: dict[bytes, Worker] = {}
        self.blank: deque[Worker] = deque()
        self.waiting: OrderedDict[Contract, None] = OrderedDict()
        self.deaths: Counter[str] = Counter()
        self.has_host = False
        self.floor = DEFAULT  # what the worker host makes of `default`, as far as its workers have told
        self._users: dict[Contract, str] = {}  # contracts without grants that have asked for a worker: their level
        self.posture: dict[str, tuple[Layer, ...]] = {}  # by level: of the last worker of it that became ready

    @property
    def starting_count(self) -> int:
        """Workers that were ordered and are not ready."""
        return sum(worker.state is STARTING for worker in self.by_id.values())

    @property
    def is_full(self) -> bool:
        """Whether a contract that has no worker would get none."""
        return len(self.by_id) >= self.workers_max and not self.blank

    @property
    def can_grow(self) -> bool:
        """Whether a contract that waits for a worker gets one even if all that serve go on for ever."""
        is_coming = any(worker.state in (STARTING, BLANK, DOOMED) for worker in self.by_id.values())
        return len(self.by_id) < self.workers_max or is_coming

    def request(self, contract: Contract, now_ns: int, effects: list[Effect]) -> None:
        """Get a worker for a contract: a blank one that is confined as it must be, or the next that becomes ready."""
        confinement = self._confinement_of(contract)
        if not confinement.has_grants:
            self._users[contract] = contract.record.settings.sandbox
        worker = next((each for each in self.blank if each.confinement == confinement), None)
        if worker is not None:
            self.blank.remove(worker)
            self._assign(worker, contract, now_ns, effects)
        else:
            self.waiting[contract] = None
        self.replenish(now_ns, effects)

    def replenish(self, now_ns: int, effects: list[Effect]) -> None:
        """Order the starts that are missing, within the bounds: those that contracts wait for before spares."""
        if not self.has_host or now_ns < self._retry_ns:
            return
        missing = self._missing(now_ns)
        room = min(self.workers_max - len(self.by_id), STARTS_AT_ONCE_MAX - self.starting_count)
        if missing and self.waiting and self.blank and len(self.by_id) >= self.workers_max:
            self._make_room(now_ns, effects)
        for confinement in missing[: self._paced(max(min(room, len(missing)), 0), now_ns)]:
            self.starts.take(now_ns)
            self._last_id += 1
            worker = Worker(self._last_id, self._new_routing_id(), confinement=confinement)
            worker.timer = self._wheel.set(now_ns + START_LIMIT_NS, worker)
            self.by_id[worker.id] = self.by_routing_id[worker.routing_id] = worker
            effects.append(StartWorker(worker))

    def _paced(self, count: int, now_ns: int) -> int:
        """Return how many of so many starts may be ordered now; `replenish` is called for the others."""
        available = self.starts.available(now_ns)
        if count > available and now_ns >= self._paced_until_ns:
            self._paced_until_ns = max(self.starts.next_ns(now_ns), now_ns + COST_NS)
            self._wheel.set(self._paced_until_ns, self)
        return min(count, available)

    def start_wait_ns(self, contract: Contract, now_ns: int) -> int:
        """Return for how long a contract waits for a worker because of the pace of starts, about; 0: not for that."""
        if contract not in self.waiting or self.starts.available(now_ns):
            return 0
        return self.starts.next_ns(now_ns) - now_ns + list(self.waiting).index(contract) * COST_NS

    def _make_room(self, now_ns: int, effects: list[Effect]) -> None:
        """Let a spare go for a worker that is confined otherwise, unless another's place becomes free anyway."""
        if not any(worker.state is DOOMED for worker in self.by_id.values()):
            verdict = "its place is needed for one that is confined otherwise"
            self.doom(self.blank[0], verdict, now_ns, effects)

    def _missing(self, now_ns: int) -> list[Confinement]:
        """Return how the workers are to be confined that are waited for, or due as spares, and not under way."""
        coming = Counter(worker.confinement for worker in self.by_id.values() if worker.state in (STARTING, BLANK))
        wanted = self.spares_wanted if now_ns >= self._spares_due_ns else 0
        spares = [Confinement(level) for level in sorted(self._levels_in_use) for _ in range(wanted)]
        missing = []
        for confinement in [*map(self._confinement_of, self.waiting), *spares]:
            if coming[confinement]:
                coming[confinement] -= 1
            else:
                missing.append(confinement)
        return missing

    @property
    def _levels_in_use(self) -> set[str]:
        """Levels that have spares: the floor, and those of contracts that have asked for a worker and are served."""
        return {self.floor} | {stricter(level, self.floor) for level in set(self._users.values())}

    def _confinement_of(self, contract: Contract) -> Confinement:
        return contract.record.settings.confinement.at_least(self.floor)

    def confined(self, worker: Worker, level: str, layers: tuple[Layer, ...], c_modules: str = "") -> None:
        """A worker has told its C modules and its level: the one it was ordered at, or the floor of its worker host.

        That floor becomes known by this: a worker that was ordered at a lower level is of the floor's. What it says
        once it may have run a contract counts no more.
        """
        if worker.state is not STARTING:
            return
        worker.c_modules = c_modules
        if not worker.confinement.has_grants:
            self.posture[level] = layers
        if worker.confinement.level == level:
            return
        self.floor = stricter(self.floor, level)
        for each in self.by_id.values():
            each.confinement = each.confinement.at_least(self.floor)

    def ready(self, worker: Worker, now_ns: int, effects: list[Effect]) -> None:
        """Take a worker that has connected into service."""
        self._stop_timer(worker)
        self._start_failures = 0
        worker.state = BLANK
        self.blank.append(worker)
        contract = self._next_waiting(worker.confinement)
        if contract is not None:
            self.blank.remove(worker)
            self._assign(worker, contract, now_ns, effects)
        elif worker.confinement.has_grants or worker.confinement.level not in self._levels_in_use:
            self.doom(worker, UNWANTED, now_ns, effects)
        self.replenish(now_ns, effects)

    def loaded(self, worker: Worker) -> None:
        """Note that a worker has its contract."""
        self._stop_timer(worker)
        worker.state = IDLE

    def doom(self, worker: Worker, verdict: str, now_ns: int, effects: list[Effect]) -> None:
        """Order a worker's death, once, and let nobody use it any more."""
        if worker.state is DOOMED:
            return
        self._discharge(worker, now_ns)
        worker.verdict = verdict
        effects.append(KillWorker(worker))
        self.replenish(now_ns, effects)

    def died(self, worker: Worker, cause: Cause, now_ns: int, effects: list[Effect]) -> None:
        """Forget a dead worker."""
        del self.by_id[worker.id], self.by_routing_id[worker.routing_id]
        self.deaths[cause.label] += 1
        self._discharge(worker, now_ns)
        self.replenish(now_ns, effects)

    def host_joined(self, now_ns: int, effects: list[Effect]) -> None:
        """A worker host is there: starts may be ordered."""
        self.has_host = True
        self._start_failures = 0
        self._retry_ns = 0
        self.replenish(now_ns, effects)

    def host_leaves(self, now_ns: int, effects: list[Effect]) -> list[Worker]:
        """The worker host is to end: doom the workers that are free, and let the others end their call.

        Returns:
            Those that were doomed.
        """
        self.has_host = False
        free = []
        for worker in self.by_id.values():
            if worker.state in (BUSY, WAITING):
                worker.state = LEAVING
            elif worker.state not in (LEAVING, DOOMED):
                free.append(worker)
        for worker in free:
            self.doom(worker, HOST_LEAVES, now_ns, effects)
        return free

    def host_left(self, now_ns: int) -> list[Worker]:
        """The worker host is gone and its workers die with it; return those that were of use until now."""
        self.has_host = False
        orphans = [worker for worker in self.by_id.values() if worker.state is not DOOMED]
        for worker in orphans:
            self._discharge(worker, now_ns)
            worker.verdict = HOST_GONE
        return orphans

    def withdraw(self, contract: Contract) -> None:
        """Forget that a contract waits for a worker."""
        self.waiting.pop(contract, None)

    def forget(self, contract: Contract, now_ns: int, effects: list[Effect]) -> None:
        """A contract is no longer served; if it was the last one of its level, that level's spares go."""
        self.withdraw(contract)
        if self._users.pop(contract, None) is None:
            return
        in_use = self._levels_in_use
        for worker in [each for each in self.blank if each.confinement.level not in in_use]:
            self.doom(worker, UNWANTED, now_ns, effects)

    def _assign(self, worker: Worker, contract: Contract, now_ns: int, effects: list[Effect]) -> None:
        """Have a worker load a contract, whose calls wait for it: the next spare is not urgent."""
        if self.spares_wanted and now_ns >= self._spares_due_ns:  # it is not put off again and again
            self._spares_due_ns = now_ns + SPARES_PAUSE_NS
            self._wheel.set(self._spares_due_ns, self)
        worker.state = LOADING
        worker.contract = contract
        contract.workers[worker] = None
        worker.timer = self._wheel.set(now_ns + LOAD_LIMIT_NS, worker)
        effects.append(LoadWorker(worker, contract.record))

    def _next_waiting(self, confinement: Confinement) -> Contract | None:
        """Return the contract that has waited longest for such a worker; those whose calls have expired need none."""
        for contract in [each for each in self.waiting if self._confinement_of(each) == confinement]:
            del self.waiting[contract]
            if contract.wants_worker:
                return contract
        return None

    def _discharge(self, worker: Worker, now_ns: int) -> None:
        """Take a worker out of use for good; back off when it never was of any."""
        self._stop_timer(worker)
        if worker.state is STARTING:
            self._back_off(now_ns)
        elif worker.state is BLANK:
            self.blank.remove(worker)
        _leave_contract(worker)
        worker.state = DOOMED

    def _back_off(self, now_ns: int) -> None:
        """Order no starts for a while; starts that fail together count once."""
        if now_ns < self._retry_ns:
            return
        self._start_failures += 1
        self._retry_ns = now_ns + backoff_ns(self._start_failures)
        self._wheel.set(self._retry_ns, self)

    def _stop_timer(self, worker: Worker) -> None:
        if worker.timer is not None:
            self._wheel.cancel(worker.timer, worker)
            worker.timer = None


def _leave_contract(worker: Worker) -> None:
    """Take a worker out of its contract's sets; it keeps the reference for messages."""
    contract = worker.contract
    if contract is None:
        return
    contract.workers.pop(worker, None)
    if contract.outgoing is worker:
        contract.outgoing = None
    if worker in contract.idle:
        contract.idle.remove(worker)
