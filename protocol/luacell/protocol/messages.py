"""The control messages: everything that is not a call or its answer.

Each class states who sends it and what it means; field bounds stand with the fields. Ids of contracts are
eight raw bytes, little-endian. Messages marked "descriptor channel" travel over the SEQPACKET socket, the
others over ZeroMQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from luacell.protocol.confinement import (
    C_MODULES_TEXT_MAX,
    DEFAULT,
    GRANTS_TEXT_MAX,
    POSTURE_MAX,
    SANDBOX_LEVELS,
    Confinement,
)
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.fields import (
    U32_MAX,
    U64_MAX,
    Message,
    blob,
    boolean,
    choice,
    contract_id,
    decode,
    encode,
    integer,
    optional_integer,
    optional_number,
    plain_map,
    size_of,
    text,
    text_map,
)
from luacell.protocol.headers import VERSION, Op
from luacell.protocol.identity import NAME_LENGTH_MAX
from luacell.protocol.limits import (
    CALLS_IN_FLIGHT_MAX,
    CONTRACTS_MAX,
    CRASHES_MAX,
    DEADLINE_DEFAULT_US,
    DEADLINE_MAX_US,
    ERROR_TEXT_MAX,
    HELD_CONTRACTS_MAX,
    LOG_LINES_DEFAULT,
    LOG_LINES_MAX,
    MAX_CALLS_LIMIT,
    MEMORY_DEFAULT,
    MEMORY_MAX,
    MEMORY_MIN,
    OUTPUT_PER_CALL_MAX,
    OUTPUT_PIECE_MAX,
    PAYLOAD_MAX,
    QUEUE_LIMIT,
    QUEUE_MAX,
    RSS_HARD_FACTOR,
    RSS_MARGIN,
    RSS_MAX,
    SLOTS_PER_SEGMENT_MAX,
    SOURCE_MAX,
    STATE_MAX,
    WORKERS_PER_CONTRACT_MAX,
)

ROUTING_ID_SIZE: Final = 16
HOST: Final = "host"
INLINE: Final = "inline"
REASON_MAX: Final = 2 * ERROR_TEXT_MAX  # characters: an error text within a sentence of our own
IN_INSTANCE: Final = 0x8000_0000  # of a typed call's function id: its arguments begin with the number of an instance
SEAT_SHIFT: Final = 16  # with IN_INSTANCE: these bits name the seat that the instance has (docs/protocol.md, 13)
SEAT_MASK: Final = 0x3F
FUNCTION_MASK: Final = 0xFFFF  # and these the function, or what is to be done with instances:
FETCH: Final = 0xFFFF
CREATE: Final = 0xFFFE
DESTROY: Final = 0xFFFD
OF_INSTANCES: Final = 0xFF00  # from here on they name no function
OF_NO_SEAT: Final = 0xFFFF_0000  # from here on a function id names no seat
API_MODULE: Final = ":api.toml"  # among a registration's modules: the description of a typed contract; never required
UNIT_MODULE: Final = ":unit"  # likewise: the name of the deployment that a contract belongs to
REQUIRES_MODULE: Final = ":requires"  # likewise: what that deployment requires, one `host.name@1.2` a line
UNIT_NAME_MAX: Final = 128  # characters
PROCESS_STATE_MAX: Final = 32  # characters; Linux's longest is "D (disk sleep)"
WAIT_CHANNEL_MAX: Final = 128  # characters; the kernel's own bound on the names of its functions is 512
ID_MAX: Final = U64_MAX
CRASH_ID_LENGTH: Final = 12  # hexadecimal digits
CRASH_PARTS: Final = ("args", "sources")  # neither is larger than a message may be; together they are

__all__ = ["Message", "decode", "encode", "size_of"]


def id_bytes(value: int) -> bytes:
    """Write a contract id as it travels."""
    return value.to_bytes(8, "little")


def id_of(raw: bytes) -> int:
    """Read a contract id as it travels."""
    return int.from_bytes(raw, "little")


@dataclass(frozen=True, slots=True)
class Hello:
    """A peer introduces itself; first message of a host on either channel and of a worker host.

    Attributes:
        role: "host", "inline" (a host without shared memory, over ZeroMQ alone) or "worker-host".
        version: the highest protocol version it speaks.
    """

    OP: ClassVar[Op] = Op.HELLO
    role: str = text(16)
    version: int = integer(1, 255, VERSION)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The broker accepts a peer.

    Attributes:
        routing_id: descriptor channel: the identity to take on the ROUTER; empty over ZeroMQ.
        epoch: random bytes of this broker's life, so that a restart is noticed.
        broker_pid: in the broker's pid namespace.
    """

    OP: ClassVar[Op] = Op.WELCOME
    routing_id: bytes = blob(0, ROUTING_ID_SIZE)
    epoch: bytes = blob(8, 8)
    broker_pid: int = integer()


@dataclass(frozen=True, slots=True)
class Settings:
    """What `luacell.toml` says of one contract; part of Register and Load.

    Attributes:
        deadline_us: default for callers.
        run_limit_us: when a running call is killed for good.
        memory: bytes that its Lua heap may use.
        max_queue: calls that may wait for a worker.
        max_in_flight: calls that one host may have in flight.
        max_output: bytes that a call prints which become records.
        max_log_lines: records a second.
        max_calls: that a worker serves before another follows it; 0 is no bound.
        max_rss: bytes of a worker's own memory at which another follows it; 0 is `memory` and RSS_MARGIN.
    """

    deadline_us: int = DEADLINE_DEFAULT_US
    run_limit_us: int = DEADLINE_DEFAULT_US
    memory: int = MEMORY_DEFAULT
    workers: int = 1
    stateless: bool = False
    idempotent: bool = False
    sandbox: str = DEFAULT
    read: str = ""
    write: str = ""
    network: bool = False
    max_queue: int = QUEUE_MAX
    max_in_flight: int = CALLS_IN_FLIGHT_MAX
    max_output: int = OUTPUT_PER_CALL_MAX
    max_log_lines: int = LOG_LINES_DEFAULT
    max_calls: int = 0
    max_rss: int = 0

    @property
    def confinement(self) -> Confinement:
        """How a worker of the contract is confined, as far as the contract has a say."""
        return Confinement(self.sandbox, self.read, self.write, self.network)

    @property
    def rss_limit(self) -> int:
        """Bytes of a worker's own memory at which another follows it."""
        return self.max_rss or self.memory + RSS_MARGIN

    @property
    def process_memory(self) -> int:
        """Bytes that a worker may take beyond what it has before it is given the contract, the Lua heap included."""
        return RSS_HARD_FACTOR * max(self.rss_limit, self.memory)

    def as_fields(self) -> dict[str, Any]:
        """Return the settings as fields of a message."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_message(cls, message: Register) -> Settings:
        """Read the settings of a registration."""
        return cls(**{name: getattr(message, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Register:
    """A host registers a contract; answered by a Reply when it has loaded, or failed to.

    Attributes:
        request_id: chosen by the host, returned in the Reply.
        contract: its id.
        name: dotted name, or "" when only the id is known.
        version: [major, minor, patch] packed as major << 32 | minor << 16 | patch; 0 with an empty name.
        source: the chunk, any bytes.
        chunk_name: shown in error messages, in Lua's form ("@file" or "=name").
        modules: the directory's own modules by `require` name.
        replace: take the place of a registered contract of this id.
        private: lives and dies with this host's session and is not listed.
        hold: once it has loaded, keep it back until COMMIT; not for private ones.
    """

    OP: ClassVar[Op] = Op.REGISTER
    request_id: int = integer(1, U64_MAX)
    contract: bytes = contract_id()
    name: str = text(NAME_LENGTH_MAX)
    version: int = integer(0, U64_MAX)
    source: bytes = blob(0, SOURCE_MAX)
    chunk_name: str = text(512)
    modules: Mapping[str, bytes] = text_map(SOURCE_MAX)
    replace: bool = boolean()
    private: bool = boolean()
    deadline_us: int = integer(1, DEADLINE_MAX_US)
    run_limit_us: int = integer(1, DEADLINE_MAX_US)
    memory: int = integer(MEMORY_MIN, MEMORY_MAX)
    workers: int = integer(1, WORKERS_PER_CONTRACT_MAX)
    stateless: bool = boolean()
    idempotent: bool = boolean()
    sandbox: str = text(16)
    hold: bool = boolean(False)
    read: str = text(GRANTS_TEXT_MAX, "")
    write: str = text(GRANTS_TEXT_MAX, "")
    network: bool = boolean(False)
    max_queue: int = integer(1, QUEUE_LIMIT, QUEUE_MAX)
    max_in_flight: int = integer(1, CALLS_IN_FLIGHT_MAX, CALLS_IN_FLIGHT_MAX)
    max_output: int = integer(0, OUTPUT_PER_CALL_MAX, OUTPUT_PER_CALL_MAX)
    max_log_lines: int = integer(1, LOG_LINES_MAX, LOG_LINES_DEFAULT)
    max_calls: int = integer(0, MAX_CALLS_LIMIT, 0)
    max_rss: int = integer(0, RSS_MAX, 0)


@dataclass(frozen=True, slots=True)
class Commit:
    """A host has contracts that are held for it served, all at once or none, or dropped.

    Attributes:
        contracts: their ids, 8 bytes each.
        serve: False drops them, those that still load included.
    """

    OP: ClassVar[Op] = Op.COMMIT
    request_id: int = integer(1, U64_MAX)
    contracts: bytes = blob(0, 8 * HELD_CONTRACTS_MAX)
    serve: bool = boolean()


@dataclass(frozen=True, slots=True)
class Unregister:
    """A host removes a contract, or several at once; calls in flight end first, queued ones fail with 100.

    Attributes:
        others: ids of more contracts, 8 bytes each; all that are there are removed in one transaction.
    """

    OP: ClassVar[Op] = Op.UNREGISTER
    request_id: int = integer(1, U64_MAX)
    contract: bytes = contract_id()
    others: bytes = blob(0, 8 * HELD_CONTRACTS_MAX, b"")


@dataclass(frozen=True, slots=True)
class Revive:
    """A host ends the quarantine of a contract, and the wait for its next load; the answer's body has `was_resting`."""

    OP: ClassVar[Op] = Op.REVIVE
    request_id: int = integer(1, U64_MAX)
    contract: bytes = contract_id()


@dataclass(frozen=True, slots=True)
class List:
    """A host asks for the registered contracts, a page at a time, ordered by id."""

    OP: ClassVar[Op] = Op.LIST
    request_id: int = integer(1, U64_MAX)
    first: int = integer(0, CONTRACTS_MAX)


@dataclass(frozen=True, slots=True)
class Describe:
    """A host asks for the description of a contract: its name, version and api.toml."""

    OP: ClassVar[Op] = Op.DESCRIBE
    request_id: int = integer(1, U64_MAX)
    contract: bytes = contract_id()


@dataclass(frozen=True, slots=True)
class Health:
    """A host asks how the service is."""

    OP: ClassVar[Op] = Op.HEALTH
    request_id: int = integer(1, U64_MAX)


@dataclass(frozen=True, slots=True)
class Crashes:
    """A local host asks for the crashes that are on record, a page at a time, newest first."""

    OP: ClassVar[Op] = Op.CRASHES
    request_id: int = integer(1, U64_MAX)
    first: int = integer(0, CRASHES_MAX)


@dataclass(frozen=True, slots=True)
class Crash:
    """A local host asks for one crash.

    Attributes:
        crash: its id, as in the list.
        part: "args": what is known of the call, with its arguments; "sources": what its worker had loaded.
    """

    OP: ClassVar[Op] = Op.CRASH
    request_id: int = integer(1, U64_MAX)
    crash: str = text(CRASH_ID_LENGTH)
    part: str = choice(CRASH_PARTS)


@dataclass(frozen=True, slots=True)
class Lease:
    """A host asks for a pair of segments in its arena for a contract.

    Attributes:
        args_size, out_size: bytes of payload each slot must hold.
        count: slots wanted.
    """

    OP: ClassVar[Op] = Op.LEASE
    request_id: int = integer(1, U64_MAX)
    contract: bytes = contract_id()
    args_size: int = integer(0, PAYLOAD_MAX)
    out_size: int = integer(0, PAYLOAD_MAX)
    count: int = integer(1, SLOTS_PER_SEGMENT_MAX)


@dataclass(frozen=True, slots=True)
class Reply:
    """The broker answers a request.

    Attributes:
        request_id: of the request.
        kind: "" on success, else the name of the exception class to raise.
        code: an AbiErrorCode.
        reason: what happened, for people.
        body: the answer, by request.
    """

    OP: ClassVar[Op] = Op.REPLY
    request_id: int = integer(1, U64_MAX)
    kind: str = text(64, "")
    code: int = integer(0, U32_MAX, int(AbiErrorCode.OK))
    reason: str = text(REASON_MAX, "")
    body: Mapping[str, Any] = plain_map({})


@dataclass(frozen=True, slots=True)
class Segment:
    """Descriptor channel, with two descriptors (args, out): the broker grants a pair of segments.

    Attributes:
        arena: id of the arena, unique in this broker's life.
        index: of the pair in the arena; a slot's number is index << 16 | position.
        request_id: of the Lease.
        deadline_us: the contract's default deadline, so that its host knows how long to wait.
    """

    OP: ClassVar[Op] = Op.SEGMENT
    request_id: int = integer(1, U64_MAX)
    arena: int = integer()
    index: int = integer(0, 65535)
    count: int = integer(1, SLOTS_PER_SEGMENT_MAX)
    args_stride: int = integer()
    out_stride: int = integer()
    deadline_us: int = integer(1, DEADLINE_MAX_US)


@dataclass(frozen=True, slots=True)
class Mapped:
    """A host has mapped a pair of segments; from now on its calls may name them."""

    OP: ClassVar[Op] = Op.MAPPED
    arena: int = integer()
    index: int = integer(0, 65535)


@dataclass(frozen=True, slots=True)
class GiveBack:
    """A host no longer uses a pair of segments."""

    OP: ClassVar[Op] = Op.GIVE_BACK
    arena: int = integer()
    index: int = integer(0, 65535)


@dataclass(frozen=True, slots=True)
class Bye:
    """A host leaves; its queued calls are dropped."""

    OP: ClassVar[Op] = Op.BYE


@dataclass(frozen=True, slots=True)
class Probe:
    """The broker finds out whether a host without shared memory is there; no answer."""

    OP: ClassVar[Op] = Op.PROBE


SLOT_FATES: Final = ("free", "kept", "unused")
BEGAN: Final = ("no", "yes", "unknown")
LOAD_PROBLEMS: Final = ("", "type", "load")


@dataclass(frozen=True, slots=True)
class Failure:
    """The broker answers a call that has no result.

    Attributes:
        call_id: of the call; 0 when the message could not be read that far.
        kind: "" or the name of an exception class more exact than the code's.
        slot: "free": it may be used again; "kept": RELEASED will tell; "unused": the call was never accepted.
        began: "no", "yes" or "unknown".
        retry_after: seconds after which another call may fare better, with 259 and 260; an estimate, or None.
    """

    OP: ClassVar[Op] = Op.FAILURE
    call_id: int = integer(0, U64_MAX)
    code: int = integer()
    message: str = text(REASON_MAX)
    kind: str = text(64, "")
    slot: str = choice(SLOT_FATES, "free")
    began: str = choice(BEGAN, "no")
    signal: int | None = optional_integer(0, 255, None)
    exit_code: int | None = optional_integer(0, 255, None)
    limit: str = text(200, "")
    queued: float | None = optional_number(None)
    ran: float | None = optional_number(None)
    cpu: float | None = optional_number(None)
    state: str = text(PROCESS_STATE_MAX, "")
    wchan: str = text(WAIT_CHANNEL_MAX, "")
    retry_after: float | None = optional_number(None)


@dataclass(frozen=True, slots=True)
class Load:
    """The broker gives a blank worker its contract.

    Attributes:
        sandbox, read, write, network: how it is to be confined at least; a worker that is not refuses it.
        workers: how many the contract may have.
        max_calls: after so many it says that another worker should follow it; 0: never.
        max_rss: likewise, with so many bytes of memory of its own.
    """

    OP: ClassVar[Op] = Op.LOAD
    contract: bytes = contract_id()
    name: str = text(NAME_LENGTH_MAX)
    source: bytes = blob(0, SOURCE_MAX)
    chunk_name: str = text(512)
    modules: Mapping[str, bytes] = text_map(SOURCE_MAX)
    memory: int = integer(MEMORY_MIN, MEMORY_MAX)
    sandbox: str = choice(SANDBOX_LEVELS, DEFAULT)
    read: str = text(GRANTS_TEXT_MAX, "")
    write: str = text(GRANTS_TEXT_MAX, "")
    network: bool = boolean(False)
    workers: int = integer(1, WORKERS_PER_CONTRACT_MAX, 1)
    max_calls: int = integer(0, MAX_CALLS_LIMIT, 0)
    max_rss: int = integer(0, RSS_MAX, 0)


@dataclass(frozen=True, slots=True)
class Map:
    """Descriptor channel, with two descriptors (args, out): a worker may meet this pair in its next calls."""

    OP: ClassVar[Op] = Op.MAP
    arena: int = integer()
    index: int = integer(0, 65535)
    count: int = integer(1, SLOTS_PER_SEGMENT_MAX)
    args_stride: int = integer()
    out_stride: int = integer()


@dataclass(frozen=True, slots=True)
class Unmap:
    """The broker tells a worker that a pair of segments is gone."""

    OP: ClassVar[Op] = Op.UNMAP
    arena: int = integer()
    index: int = integer(0, 65535)


@dataclass(frozen=True, slots=True)
class Forget:
    """The broker tells a worker that an arena is gone, and whatever it keeps for that host's calls is not needed."""

    OP: ClassVar[Op] = Op.FORGET
    arena: int = integer()


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker is connected, confined and blank.

    Attributes:
        pid: in its own pid namespace.
        posture: its layers of protection, one a line: "+" where it is in force, else "-", its name, a tab, and what it
            does or why it is not.
        sandbox: the level that it has; at least the one that START asked for.
        c_modules: paths of the C modules that its worker host has loaded, one a line.
    """

    OP: ClassVar[Op] = Op.READY
    pid: int = integer()
    posture: str = text(POSTURE_MAX, "")
    sandbox: str = choice(SANDBOX_LEVELS, DEFAULT)
    c_modules: str = text(C_MODULES_TEXT_MAX, "")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker has loaded its contract, or not.

    Attributes:
        problem: "" when it is ready for calls, "type" when the chunk gave no function, "load" when it failed.
        reason: for people; with "type" the Lua type that came.
        saves, restores: its singleton has `save`, or `restore`.
    """

    OP: ClassVar[Op] = Op.LOADED
    problem: str = choice(LOAD_PROBLEMS)
    reason: str = text(REASON_MAX)
    saves: bool = boolean(False)
    restores: bool = boolean(False)


@dataclass(frozen=True, slots=True)
class Save:
    """The broker asks a worker that gets no more calls for the state of its singleton."""

    OP: ClassVar[Op] = Op.SAVE


@dataclass(frozen=True, slots=True)
class Saved:
    """A worker gives the state of its singleton.

    Attributes:
        state: what `save()` returned; b"" with a problem.
        problem: why there is none, or "".
    """

    OP: ClassVar[Op] = Op.SAVED
    state: bytes = blob(0, STATE_MAX)
    problem: str = text(REASON_MAX)


@dataclass(frozen=True, slots=True)
class Restore:
    """The broker gives a worker that has had no call the state of the one it follows."""

    OP: ClassVar[Op] = Op.RESTORE
    state: bytes = blob(0, STATE_MAX)


@dataclass(frozen=True, slots=True)
class Restored:
    """A worker's singleton has taken its state up; or not, and it must not be used.

    Attributes:
        problem: why not, or "".
    """

    OP: ClassVar[Op] = Op.RESTORED
    problem: str = text(REASON_MAX)


@dataclass(frozen=True, slots=True)
class Start:
    """Descriptor channel: the broker orders a blank worker.

    Attributes:
        worker: number chosen by the broker, never reused in its life.
        routing_id: the worker's identity on the ROUTER.
        sandbox: its level; where the worker host has a stricter floor, that one.
        read, write: absolute paths that it is granted, one a line.
        network: whether it may use the network.
    """

    OP: ClassVar[Op] = Op.START
    worker: int = integer(1, U64_MAX)
    routing_id: bytes = blob(ROUTING_ID_SIZE, ROUTING_ID_SIZE)
    sandbox: str = choice(SANDBOX_LEVELS, DEFAULT)
    read: str = text(GRANTS_TEXT_MAX, "")
    write: str = text(GRANTS_TEXT_MAX, "")
    network: bool = boolean(False)


@dataclass(frozen=True, slots=True)
class Kill:
    """Descriptor channel: the broker orders a worker's death by SIGKILL."""

    OP: ClassVar[Op] = Op.KILL
    worker: int = integer(1, U64_MAX)


@dataclass(frozen=True, slots=True)
class Inspect:
    """Descriptor channel: the broker asks what a worker's process is doing; answered by Inspected, if it lives.

    Attributes:
        sequence: of the hand-over that it is about; comes back.
    """

    OP: ClassVar[Op] = Op.INSPECT
    worker: int = integer(1, U64_MAX)
    sequence: int = integer(1, U64_MAX)


@dataclass(frozen=True, slots=True)
class End:
    """Descriptor channel: the broker ends in an orderly way; its worker host is to kill its workers and end too."""

    OP: ClassVar[Op] = Op.END


@dataclass(frozen=True, slots=True)
class Started:
    """Descriptor channel, with two descriptors (pidfd, the broker's end of the worker's socketpair)."""

    OP: ClassVar[Op] = Op.STARTED
    worker: int = integer(1, U64_MAX)
    pid: int = integer()


@dataclass(frozen=True, slots=True)
class Exited:
    """Descriptor channel: a worker is dead and reaped, or could not be started.

    Attributes:
        signal: its number, or None.
        exit_code: or None.
        problem: why it could not be started, or "".
        cpu_us: CPU time of its whole life, or None.
        memory: bytes of resident memory that it had at most, or None.
        state: of its process when it was killed by order, as proc_pid_status(5) has it, such as "R (running)"; or "".
        wchan: the kernel's function in which it waited then, or "".
    """

    OP: ClassVar[Op] = Op.EXITED
    worker: int = integer(1, U64_MAX)
    signal: int | None = optional_integer(0, 255, None)
    exit_code: int | None = optional_integer(0, 255, None)
    problem: str = text(512, "")
    cpu_us: int | None = optional_integer(0, U64_MAX, None)
    memory: int | None = optional_integer(0, U64_MAX, None)
    state: str = text(PROCESS_STATE_MAX, "")
    wchan: str = text(WAIT_CHANNEL_MAX, "")


@dataclass(frozen=True, slots=True)
class Inspected:
    """Descriptor channel: what a worker's process was doing when the broker asked.

    Attributes:
        sequence: as it was asked.
        cpu_us: CPU time of its life so far, or None.
        memory: bytes of resident memory, or None.
        state, wchan: as in Exited.
    """

    OP: ClassVar[Op] = Op.INSPECTED
    worker: int = integer(1, U64_MAX)
    sequence: int = integer(1, U64_MAX)
    cpu_us: int | None = optional_integer(0, U64_MAX, None)
    memory: int | None = optional_integer(0, U64_MAX, None)
    state: str = text(PROCESS_STATE_MAX, "")
    wchan: str = text(WAIT_CHANNEL_MAX, "")


@dataclass(frozen=True, slots=True)
class Leaving:
    """Descriptor channel: a worker host is to end; it starts nothing more, and waits for its workers to be killed."""

    OP: ClassVar[Op] = Op.LEAVING


STREAMS: Final = ("stdout", "stderr", "tail")


@dataclass(frozen=True, slots=True)
class Output:
    """Descriptor channel: what a worker's contract has printed.

    Attributes:
        stream: "stdout", "stderr", or "tail": the end of its stderr once more, for the record of its death.
        data: as it came, any bytes; b"" where some were only cut.
        cut: bytes of this worker that were read and thrown away since its last OUTPUT.
    """

    OP: ClassVar[Op] = Op.OUTPUT
    worker: int = integer(1, U64_MAX)
    stream: str = choice(STREAMS)
    data: bytes = blob(0, OUTPUT_PIECE_MAX)
    cut: int = integer(0, U64_MAX, 0)
