"""Every bound that two parts must agree on, with the arithmetic behind it.

Times carry their unit in the name. A bound that only one part knows stands in that part.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

NS_PER_US: Final = 1_000
NS_PER_MS: Final = 1_000_000
NS_PER_S: Final = 1_000_000_000
US_PER_S: Final = 1_000_000

# -- calls ---------------------------------------------------------------------------------------------------
DEADLINE_DEFAULT_US: Final = 5 * US_PER_S
DEADLINE_MAX_US: Final = 60 * US_PER_S  # who needs longer should poll; fits u32 microseconds 71 times
ANSWER_GRACE_NS: Final = 250 * NS_PER_MS  # promise 1: the answer comes this long after the deadline at most
ERROR_TEXT_MAX: Final = 4 * KIB  # bytes; a 64 MB message costs a second to copy and nobody reads it

# -- payloads ------------------------------------------------------------------------------------------------
PAYLOAD_MAX: Final = 64 * MIB  # bytes of args, and of out, of one call
HOST_MEMORY_MAX: Final = 1024 * MIB  # bytes of segments per host: seven pairs of one 64 MiB slot (72 + 72)
TOTAL_MEMORY_MAX: Final = 4096 * MIB  # bytes of segments in all: four hosts at their limit
SEGMENTS_PER_ARENA_MAX: Final = 64  # pairs; a slot number keeps the pair in its high 16 bits
SLOTS_PER_SEGMENT_MAX: Final = 128

# -- payloads of hosts without shared memory -----------------------------------------------------------------
INLINE_PIECE: Final = 256 * KIB  # bytes; copied in 50 us, so that nobody waits long behind one
NESTED_PAYLOAD_MAX: Final = MIB  # bytes of args, and of out, of a call that a contract makes: four pieces
INLINE_WINDOW: Final = 8  # pieces of a call that were not acknowledged: 2 MiB
INLINE_HOST_WINDOW: Final = 64  # pieces of results of one host that it has not acknowledged: 16 MiB
INLINE_SMALL_MAX: Final = 16 * KIB  # bytes of results that are not acknowledged: 4096 queued ones are 64 MiB
INLINE_STALL_NS: Final = 10 * NS_PER_S  # a host that takes no piece of its results for this long is sent away
INLINE_PROBE_NS: Final = NS_PER_S  # between looks at whether such a host is there

# -- hosts and contracts -------------------------------------------------------------------------------------
CALLS_IN_FLIGHT_MAX: Final = 1024  # per host; its slots of 12 KiB are 12 MiB
QUEUE_MAX: Final = 1024  # calls that wait for one contract, over all hosts, where it does not say otherwise
QUEUE_LIMIT: Final = 16_384  # the most that it may say; 1 KiB each are 16 MiB
SESSIONS_MAX: Final = 4096  # hosts; each costs two descriptors
CONTRACTS_MAX: Final = 10_000
HELD_CONTRACTS_MAX: Final = 256  # committed at once: as many as one api.toml declares
WORKERS_PER_CONTRACT_MAX: Final = 64
WORKERS_MAX: Final = 1024  # processes; at 4 MB each 4 GB
SPARES_MAX: Final = 64

LOAD_LIMIT_NS: Final = 5 * NS_PER_S  # a contract must load within this
START_LIMIT_NS: Final = 5 * NS_PER_S  # a blank worker must report within this
REQUEST_LIMIT_NS: Final = 15 * NS_PER_S  # a control request: spare start, load and one retry fit in

STATE_MAX: Final = 4 * MIB  # bytes of state that a singleton hands to its successor; fits a message, as sources do
CARRY_LIMIT_NS: Final = 2 * NS_PER_S  # for saving state, and for restoring it; calls wait meanwhile

MEMORY_DEFAULT: Final = 64 * MIB  # bytes a contract's Lua heap may use
MEMORY_MIN: Final = 1 * MIB
MEMORY_MAX: Final = 2048 * MIB
MAX_CALLS_LIMIT: Final = (
    2**31 - 1
)  # the most that a contract may say of how often a worker serves before it is recycled
RSS_MIN: Final = 64 * MIB  # bytes of a worker's own at which it is recycled: one that has just begun has about 20 MiB
RSS_MAX: Final = 16_384 * MIB
RSS_MARGIN: Final = 192 * MIB  # over a contract's `memory`, where it does not say: FFI's memory, C modules, the process
RSS_HARD_FACTOR: Final = 2  # at so many times the limit a worker is not used any more, whether another follows or not

# -- what contracts print ------------------------------------------------------------------------------------
OUTPUT_PER_CALL_MAX: Final = 64 * KIB  # bytes that become records; the rest is counted
LOG_LINES_DEFAULT: Final = 200  # records a second of one contract
LOG_LINES_MAX: Final = 10_000
OUTPUT_PIECE_MAX: Final = 3 * KIB  # bytes in one message and one record, so that its line fits a pipe's 4 KiB
STDERR_TAIL_MAX: Final = 2 * KIB  # bytes in the record of a death

# -- crash records -------------------------------------------------------------------------------------------
CRASHES_MAX: Final = 1000  # that are kept in all; 10 KiB each without arguments are 10 MiB
CRASH_ARGS_MAX: Final = 4 * MIB  # bytes of a call's arguments that are kept; fit a message, as sources do
LISTED_CRASHES_MAX: Final = 200  # per page; 10 KiB each are 2 MiB, and 42 values each 8,400

# -- messages ------------------------------------------------------------------------------------------------
CALLS_PER_MESSAGE_MAX: Final = 1024
SOURCE_MAX: Final = 4 * MIB  # bytes of all Lua sources of one contract
MESSAGE_MAX: Final = SOURCE_MAX + 256 * KIB  # the largest message is a registration
DESCRIPTOR_MESSAGE_MAX: Final = 4 * KIB  # bytes; fits any SEQPACKET buffer
NODES_MAX: Final = 20_000  # msgpack containers and items: 1 MiB of empty maps would be 73 MB of objects
LISTED_CONTRACTS_MAX: Final = 500  # per page of a listing
FRAMES_MAX: Final = 8
