"""What the dispatcher reasons about: hosts, contracts, workers and calls, and the effects it asks for.

Plain state with questions about itself; all changes are made by the dispatcher and the workforce.

    call:    QUEUED ──sent to a worker──> HELD ──done, or its worker died──> ENDED
               │ ^───── not begun ──────────┘                                  ^
               └─────── expired, cancelled, host gone ─────────────────────────┘

    worker:  STARTING ──ready──> BLANK ──load──> LOADING ──loaded──> IDLE <──done── BUSY
             any state ──kill ordered──> DOOMED ──died──> gone                └─sent─^
             IDLE, BUSY ──to be followed by another──> SAVING ──saved──> DOOMED
             LOADING ──loaded, follows another──> RESTORING ──restored──> IDLE
             BUSY ──its worker host leaves, another follows──> LEAVING ──done──> DOOMED
             BUSY ──it calls a contract itself──> WAITING ──answered──> BUSY
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple, Protocol
from zlib import crc32

from luacell.broker.books import Pair, SlotBook
from luacell.broker.outputs import RecordRate
from luacell.broker.quarantine import Quarantine
from luacell.broker.queues import FairQueue
from luacell.broker.registry import ContractRecord
from luacell.protocol import headers
from luacell.protocol.confinement import UNGRANTED, Confinement
from luacell.protocol.errors import AbiErrorCode, Began
from luacell.protocol.limits import CALLS_IN_FLIGHT_MAX, NS_PER_US, QUEUE_MAX
from luacell.protocol.messages import API_MODULE
from luacell.protocol.slots import Answer

WINDOW_FIRST: Final = 8  # calls handed ahead to a worker before its pace is known
WINDOW_FIRST_OF_MANY: Final = 2  # the same where other workers serve the contract too


class CallState(Enum):
    """Where a call stands."""

    QUEUED = "queued"
    HELD = "held"
    ENDED = "ended"


class WorkerState(Enum):
    """Where a worker stands."""

    STARTING = "starting"
    BLANK = "blank"
    LOADING = "loading"
    IDLE = "idle"
    BUSY = "busy"
    WAITING = "waiting"
    LEAVING = "leaving"
    DOOMED = "doomed"
    SAVING = "saving"
    RESTORING = "restoring"


# Looking a member up in its enum costs a quarter of a microsecond; the hot path reads these.
QUEUED, HELD, ENDED = CallState
STARTING, BLANK, LOADING, IDLE, BUSY, WAITING, LEAVING, DOOMED, SAVING, RESTORING = WorkerState


@dataclass(slots=True, eq=False)
class Session:
    """A host's connection, or that of a worker whose contract calls others.

    Attributes:
        id: its routing id.
        name: the host as people know it, such as "pid 123 of uid 0", or "".
        calls: in flight, by call id; a call leaves when its slot is free.
        worker: whose calls these are, where it is no host.
        chains: what the calls that are made for its own calls queue as, each turn one of them all; its own as itself.
    """

    id: bytes
    name: str = ""
    calls: dict[int, Call] = field(default_factory=dict)
    worker: Worker | None = None
    chains: object = field(default_factory=object)

    @property
    def title(self) -> str:
        """The host as records name it."""
        return self.name or self.id.hex()


class Call:
    """One call from its acceptance until its slot is free.

    Attributes:
        header: as the host sent it, checked.
        pair: the segments its slot lies in.
        answered: whether the host has its one answer.
        sequence: number of its last hand-over, unique in this broker's life; 0 before.
        sent_ns: when its worker was free to begin it, as far as the broker knows; 0 while it waits for that.
        attempts: workers that died when they were about to begin it.
        taken_back: its worker was forbidden to begin it, so that another may.
        inquiry: it counts as answered, and is answered when its worker's process was looked at.
        parent: the call whose contract has made this one and waits for it; None for a host's.
        depth: how many such calls there are above it.
        is_overdue: it was answered because it was past its time.
        waited_ns: how long it has waited for calls of its own, which is no time of running.
        extra: the contract that may have a worker more on its account, or None.
    """

    state: CallState = QUEUED
    answered = False
    worker: Worker | None = None
    sequence = 0
    sent_ns = 0
    attempts = 0
    taken_back = False
    inquiry: Inquiry | None = None
    timer: int | None = None
    parent: Call | None = None
    depth = 0
    is_overdue = False
    waited_ns = 0
    extra: Contract | None = None

    def __init__(
        self,
        session: Session,
        header: headers.Call,
        contract: Contract,
        book: SlotBook,
        arrived_ns: int,
        deadline_ns: int,
    ) -> None:
        self.session = session
        self.header = header
        self.contract = contract
        self.book = book
        self.arrived_ns = arrived_ns
        self.deadline_ns = deadline_ns

    @property
    def pair(self) -> Pair:
        """The segments its slot lies in."""
        return self.book.pair

    @property
    def host(self) -> Session:
        """The session of the host for which it is made: its own, or that of its chain's first call."""
        call = self
        while call.parent is not None:
            call = call.parent
        return call.session

    @property
    def owner(self) -> object:
        """As what it takes its turn in a queue."""
        return self.session if self.parent is None else self.host.chains

    @property
    def title(self) -> str:
        """The call as messages name it."""
        return self.contract.record.title_of(self.header.fn_id)

    @property
    def has_ended(self) -> bool:
        """Whether its slot is free."""
        return self.state is ENDED

    @property
    def was_handed_over(self) -> bool:
        """Whether it ended in the hands of a worker, or is there."""
        return self.worker is not None


@dataclass(slots=True, eq=False)
class Inquiry:
    """A call is past its time and runs: what its process is doing is found out before its host is told.

    Attributes:
        due_ns: when it was past its time.
        limit: the bound that was hit, or "" for its deadline.
        seen: what its slot said then.
        timer: when its host is told in any case.
    """

    call: Call
    due_ns: int
    limit: str
    seen: Answer
    timer: int


@dataclass(slots=True, eq=False)
class Contract:
    """A contract that is served, or that is being registered.

    Attributes:
        request: the registration that waits for its first load, or None.
        hold: whether it is kept back, once it has loaded, until its host commits it.
        holder: the session that it is kept back for, or b"".
        successor_of: the contract that this one replaces once it has loaded.
        is_seat: it is one of the seats of another, which stands for all of them.
        seats: of a contract that keeps instances in several workers: itself and one more for each other worker (see
            `seats`); else empty.
        restores: its implementation takes up the state of another one.
        inherits: the worker whose state the next worker of this contract is to have, until it is saved; see `carrying`.
        state: what that worker has saved, until a worker of this contract has taken it up.
        workers: those that serve or load it, oldest first, without doomed ones and those that were followed.
        idle: a subset of `workers`, the most recently used last.
        workers_max: how many workers it may have.
        outgoing: its worker that is to be followed by the next one that loads, or None; see `recycling`.
        extra: how many more it may have for a while, each for one call of a chain that would else wait for itself.
        window: calls that one worker may hold ahead, by how fast they are.
        pace_ns: how long a worker takes for a call while it is busy; 0 while that is not known.
        in_flight_max: calls that one host may have in flight.
        quarantine: of hosts whose calls crash it.
        record_rate: of what it prints.
        deadline_us: default budget of a call.
        quick_budget_us: largest budget with which a call needs no thought; 0 where every one does: for a private
            contract, and in quarantine.
        run_limit_ns: how long a call may run before its worker is killed for good.
        api_sum: CRC-32 of its description, by which contracts that call it know whether theirs is of this version.
        called: whether any call was handed to a worker.
        retired: no longer served; what its workers hold ends first.
        failures: loads that failed in a row.
        failure: why the last one did, or "".
        retry_ns: no load before this point in time.
        died_loading: whether a worker died of its own while loading since the last load that ended.
    """

    record: ContractRecord
    request: Request | None = None
    hold: bool = False
    holder: bytes = b""
    successor_of: Contract | None = None
    is_seat: bool = False
    seats: tuple[Contract, ...] = ()
    restores: bool = False
    inherits: Worker | None = None
    state: bytes | None = None
    queue: FairQueue[object, Call] = field(default_factory=lambda: FairQueue(QUEUE_MAX))
    workers: dict[Worker, None] = field(default_factory=dict)
    idle: list[Worker] = field(default_factory=list)
    workers_max: int = 1
    outgoing: Worker | None = None
    extra: int = 0
    window: int = 0
    pace_ns: int = 0
    in_flight_max: int = 0
    quarantine: Quarantine = field(default_factory=Quarantine)
    record_rate: RecordRate = field(init=False)
    owner: bytes | None = None
    deadline_us: int = 0
    quick_budget_us: int = 0
    api_sum: int = 0
    run_limit_us: int = 0
    run_limit_ns: int = 0
    called: bool = False
    retired: bool = False
    failures: int = 0
    failure: str = ""
    retry_ns: int = 0
    died_loading: bool = False
    timer: int | None = None

    def __post_init__(self) -> None:
        self.owner = self.record.owner
        self.deadline_us = self.record.settings.deadline_us
        self.note_quarantine()
        self.record_rate = RecordRate(self.record.settings.max_log_lines)
        self.queue.bound = self.record.settings.max_queue
        self.in_flight_max = min(self.record.settings.max_in_flight, CALLS_IN_FLIGHT_MAX)
        self.workers_max = self.record.settings.workers
        if self.record.seats:
            self._take_seat(self.record.seats)
        self.window = WINDOW_FIRST if self.workers_max == 1 else WINDOW_FIRST_OF_MANY  # others may be free sooner
        self.api_sum = crc32(self.record.modules.get(API_MODULE, b""))
        self.run_limit_us = self.record.settings.run_limit_us
        self.run_limit_ns = self.record.settings.run_limit_us * NS_PER_US

    def _take_seat(self, count: int) -> None:
        """Be one of `count` seats, and the first one for all of them; together they queue as much as a contract may."""
        self.workers_max = 1
        self.queue.bound = max(1, self.record.settings.max_queue // count)
        if not self.is_seat:
            others = (Contract(self.record, is_seat=True, quarantine=self.quarantine) for _ in range(count - 1))
            self.seats = (self, *others)

    @property
    def places(self) -> tuple[Contract, ...]:
        """All that calls of this contract may wait for: its seats, or itself."""
        return self.seats or (self,)

    def note_quarantine(self) -> None:
        """Have every call looked at while the contract is in quarantine, as those of a private one always are."""
        settings = self.record.settings
        needs_thought = self.owner is not None or self.record.seats or self.quarantine.is_in_force
        self.quick_budget_us = 0 if needs_thought else min(settings.deadline_us, settings.run_limit_us)

    @property
    def wants_worker(self) -> bool:
        """Whether calls, or its registration, wait for a worker that it may have and does not have yet."""
        if self.request is not None:
            return not self.workers
        loading = self._loading_count
        if self.outgoing is not None and not loading:
            return len(self.workers) <= self.workers_max + self.extra
        return len(self.queue) > loading and self.may_have_more_workers

    @property
    def _loading_count(self) -> int:
        return sum(worker.state in (LOADING, RESTORING) for worker in self.workers)

    @property
    def has_too_many_workers(self) -> bool:
        """Whether one of them has come for a while only; one that is to follow another has not."""
        following = self._loading_count if self.outgoing is not None else 0
        return len(self.workers) - following > self.workers_max

    @property
    def may_have_more_workers(self) -> bool:
        """Whether it has fewer workers than it may have."""
        return len(self.workers) < self.workers_max + self.extra


@dataclass(slots=True, eq=False)
class Worker:
    """A worker process, from the order to start it until its death is known.

    Attributes:
        id: number, never reused in this broker's life.
        routing_id: its identity on the ROUTER.
        pid: 0 until the worker host has reported it.
        call: the one that it runs, or is about to begin, as far as the broker knows.
        ahead: calls that it holds besides and has not begun, in order.
        passed: numbers of hand-overs that were taken back while it ran the one before them; it has to say so.
        finished: calls that it has marked as done and not answered for yet, in order.
        inner: the call that its contract has made and waits for.
        waits_ns: since when.
        silent_ns: since when it has marked all that it holds as done, or last answered for some of that.
        verdict: why it is doomed, for the caller that hears of its death, or "".
        served: calls it has finished.
        paced_ns: since when its pace is measured; 0: not at all.
        paced_served: calls it had finished then.
        mapped: pairs of segments that it was sent.
        confinement: what it was ordered as, with the level that it has told.
        arenas: those of all pairs that it was ever sent and that are not gone.
        saves: its implementation can hand on its state.
        heir: the contract whose next worker is to have this one's state, until it is saved; see `carrying`.
        is_restoring: it was sent state and has not said that it has taken it up.
        is_followed: another has taken its place: it ends what it holds; see `recycling`.
        is_worn_out: it was to be recycled and could not be, which was said.
        c_modules: paths of the C modules that its process was forked with, one a line.
    """

    id: int
    routing_id: bytes
    state: WorkerState = STARTING
    pid: int = 0
    contract: Contract | None = None
    call: Call | None = None
    ahead: deque[Call] = field(default_factory=deque)
    passed: deque[int] = field(default_factory=deque)
    finished: deque[Call] = field(default_factory=deque)
    inner: Call | None = None
    waits_ns: int = 0
    silent_ns: int = 0
    served: int = 0
    paced_ns: int = 0
    paced_served: int = 0
    mapped: set[Pair] = field(default_factory=set)
    arenas: set[int] = field(default_factory=set)
    saves: bool = False
    heir: Contract | None = None
    is_restoring: bool = False
    is_followed: bool = False
    is_worn_out: bool = False
    c_modules: str = ""
    verdict: str = ""
    timer: int | None = None
    confinement: Confinement = UNGRANTED

    @property
    def held(self) -> list[Call]:
        """The calls whose slots it may touch, in the order in which it was handed them."""
        running = () if self.call is None else (self.call,)
        return [*self.finished, *running, *self.ahead]


class Waiter(Protocol):
    """Something else that waits for a point in time."""

    def replenish(self, now_ns: int, effects: list[Effect]) -> None:
        """Act on it."""


Subject = Call | Worker | Contract | Inquiry | Waiter


class Request(NamedTuple):
    """A host's control request that is answered later."""

    session_id: bytes
    request_id: int


# -- effects: what the server is to do ---------------------------------------------------------------------
class SlotMemory(Protocol):
    """What the dispatcher needs of shared memory; the server provides it."""

    def look(self, call: Call) -> Answer:
        """Return what the worker has written about its calls into the call's slot."""

    def withdraw(self, call: Call) -> None:
        """Forbid the worker to begin the call; ordered before any later `look`."""


class SendCall(NamedTuple):
    """Send EXECUTE to the worker that holds the call, after MAP where it has not seen the pair."""

    worker: Worker
    call: Call


class SendResult(NamedTuple):
    """Send RESULT to the call's host."""

    call: Call
    code: int
    out_size: int
    error_size: int
    slot_free: bool


class SendFailure(NamedTuple):
    """Send FAILURE to a host."""

    session_id: bytes
    call_id: int
    code: AbiErrorCode
    message: str
    kind: str = ""
    slot: str = "free"
    began: Began = "no"
    signal: int | None = None
    exit_code: int | None = None
    limit: str = ""
    queued: float | None = None
    ran: float | None = None
    cpu: float | None = None
    state: str = ""
    wchan: str = ""
    retry_after: float | None = None


class SendReleased(NamedTuple):
    """Tell a host that the slot of an answered call is free."""

    session_id: bytes
    call_id: int


class SendReply(NamedTuple):
    """Answer a control request."""

    request: Request
    kind: str = ""
    code: AbiErrorCode = AbiErrorCode.OK
    reason: str = ""
    body: Mapping[str, Any] = {}


class StoreContract(NamedTuple):
    """Write a registered contract to the registry's file; `contract_stored` tells how that went."""

    contract: Contract
    request: Request


class StoreContracts(NamedTuple):
    """Write contracts that were held, all or none; `contracts_stored` tells how that went."""

    contracts: tuple[Contract, ...]
    request: Request


class StartWorker(NamedTuple):
    """Order a blank worker from the worker host."""

    worker: Worker


class LoadWorker(NamedTuple):
    """Give a blank worker its contract."""

    worker: Worker
    record: ContractRecord


class SaveState(NamedTuple):
    """Ask a worker for the state of its singleton; `worker_saved` tells."""

    worker: Worker


class RestoreState(NamedTuple):
    """Give a worker the state of the one that it follows; `worker_restored` tells."""

    worker: Worker
    state: bytes


class KillWorker(NamedTuple):
    """Order a worker's death."""

    worker: Worker


class InspectWorker(NamedTuple):
    """Find out what a worker's process is doing; `worker_inspected` tells, unless it dies or its worker host does."""

    worker: Worker
    sequence: int


class DropPair(NamedTuple):
    """Unmap and close a pair of segments that nobody uses any more."""

    pair: Pair


class RecordCrash(NamedTuple):
    """Put a call on record that its worker has died of, or that has used up its memory; its slot is still its own.

    Attributes:
        code: what its host is told, or was.
        cause: how its worker ended, or why it was ended.
        signal, exit_code: of the worker, or None.
        queued, ran, cpu: seconds; see `deaths.Episode`.
        stderr: the end of what its worker wrote there; None where that is still to die.
    """

    call: Call
    code: AbiErrorCode
    cause: str
    signal: int | None
    exit_code: int | None
    queued: float
    ran: float
    cpu: float | None
    stderr: str | None


class Record(NamedTuple):
    """Write a log record."""

    level: str
    event: str
    fields: Mapping[str, Any]


Effect = (
    SendCall
    | SendResult
    | SendFailure
    | SendReleased
    | SendReply
    | StoreContract
    | StoreContracts
    | StartWorker
    | LoadWorker
    | SaveState
    | RestoreState
    | KillWorker
    | InspectWorker
    | DropPair
    | RecordCrash
    | Record
)
