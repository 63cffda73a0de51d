"""Golden frames: at least one message of every operation, pinned byte by byte.

`golden_frames.json` is what the tests read. It changes only when somebody runs
`python -m tests.protocol.golden` to add frames; a frame that was there and changes is a new version of the
protocol.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, NamedTuple

from luacell.protocol import messages
from luacell.protocol.fields import encode
from luacell.protocol.headers import (
    HAS_ARGS,
    HAS_OUT,
    NOT_BEGUN,
    RECYCLE,
    RETIRE,
    SLOT_FREE,
    Call,
    CallInline,
    Done,
    Execute,
    More,
    Op,
    Piece,
    Result,
    encode_inline,
    encode_records,
)
from tests.protocol.support import CallId

PATH: Final = Path(__file__).with_name("golden_frames.json")
EXACT_MAX: Final = 2**53 - 1  # beyond, a reader that keeps numbers as doubles would lose digits

_LOGGER: Final = 0xF53EB5F2845853BB  # host_contract:host.logger@1
_CONTRACT: Final = messages.id_bytes(_LOGGER)
_ROUTING_ID: Final = bytes(range(0xA0, 0xB0))
_EPOCH: Final = bytes(range(1, 9))

CALL: Final = Call(1, _LOGGER, 5, 250_000, 7, 0x0001_0002, 3, HAS_ARGS | HAS_OUT, 24, 8)
BARE_CALL: Final = Call(2**64 - 1, 2**64 - 1, 2**32 - 1, 0, 0, 0, 2**32 - 1, 0, 0, 0)
EXECUTE: Final = Execute(9, 123_456_789_012_345, 5, 1_000_000, 7, 0x0001_0002, 3, HAS_ARGS | HAS_OUT, 24, 8, 0)

INLINE_CALL: Final = CallInline(1, _LOGGER, 5, 250_000, HAS_ARGS | HAS_OUT, 5, 8)


class WithPiece(NamedTuple):
    """A record and the bytes that follow it."""

    record: Any
    piece: bytes


EXAMPLES: Final[dict[Op, dict[str, Any]]] = {
    Op.HELLO: {
        "a host": messages.Hello(role="host"),
        "a worker host": messages.Hello(role="worker-host"),
        "a host without shared memory": messages.Hello(role="inline"),
    },
    Op.CALL: {
        "one call": [CALL],
        "two calls, the second without buffers and with the contract's own deadline": [CALL, BARE_CALL],
    },
    Op.CANCEL: {"two calls": [CallId(1), CallId(2**64 - 1)]},
    Op.MAPPED: {"the second pair of an arena": messages.Mapped(arena=7, index=1)},
    Op.GIVE_BACK: {"the second pair of an arena": messages.GiveBack(arena=7, index=1)},
    Op.BYE: {"a host leaves": messages.Bye()},
    Op.REGISTER: {
        "with a name and a module": messages.Register(
            request_id=1,
            contract=_CONTRACT,
            name="host.logger",
            version=1 << 32 | 2 << 16 | 3,
            source=b"return function(fn_id, args, out) end",
            chunk_name="@logger.lua",
            modules={"util": b"return {}"},
            replace=True,
            private=False,
            deadline_us=250_000,
            run_limit_us=1_000_000,
            memory=64 << 20,
            workers=2,
            stateless=True,
            idempotent=False,
            sandbox="default",
        ),
        "by its id alone": messages.Register(
            request_id=2**64 - 1,
            contract=bytes(8),
            name="",
            version=0,
            source=b"",
            chunk_name="",
            modules={},
            replace=False,
            private=True,
            **messages.Settings().as_fields(),
        ),
        "held until it is committed": messages.Register(
            request_id=11,
            contract=_CONTRACT,
            name="host.logger",
            version=1 << 32 | 2 << 16 | 3,
            source=b"return function(fn_id, args, out) end",
            chunk_name="@logger.lua",
            modules={messages.UNIT_MODULE: b"logging", messages.REQUIRES_MODULE: b"host.clock@1.2.0"},
            replace=True,
            private=False,
            **messages.Settings().as_fields(),
            hold=True,
        ),
    },
    Op.COMMIT: {
        "one contract": messages.Commit(request_id=9, contracts=_CONTRACT, serve=True),
        "none, after all": messages.Commit(request_id=10, contracts=_CONTRACT, serve=False),
    },
    Op.UNREGISTER: {
        "by id": messages.Unregister(request_id=2, contract=_CONTRACT),
        "two at once": messages.Unregister(request_id=2, contract=_CONTRACT, others=_CONTRACT[::-1]),
    },
    Op.REVIVE: {"by id": messages.Revive(request_id=9, contract=_CONTRACT)},
    Op.CRASHES: {"the first page": messages.Crashes(request_id=12, first=0)},
    Op.CRASH: {
        "a call": messages.Crash(request_id=13, crash="0123456789ab", part="args"),
        "its sources": messages.Crash(request_id=14, crash="0123456789ab", part="sources"),
    },
    Op.LIST: {"the second page": messages.List(request_id=3, first=500)},
    Op.DESCRIBE: {"a contract": messages.Describe(request_id=8, contract=_CONTRACT)},
    Op.HEALTH: {"a question": messages.Health(request_id=4)},
    Op.LEASE: {"16 slots": messages.Lease(request_id=5, contract=_CONTRACT, args_size=24, out_size=8, count=16)},
    Op.CALL_INLINE: {
        "with all its arguments": WithPiece(INLINE_CALL, b"hello"),
        "without buffers and with the contract's own deadline": WithPiece(CallInline(2, _LOGGER, 6, 0, 0, 0, 0), b""),
    },
    Op.WELCOME: {
        "over fd.sock, to a host": messages.Welcome(routing_id=_ROUTING_ID, epoch=_EPOCH, broker_pid=4321),
        "over ZeroMQ, or to a worker host": messages.Welcome(routing_id=b"", epoch=_EPOCH, broker_pid=4321),
    },
    Op.RESULT: {
        "a value": [Result(1, 0, 8, 0, SLOT_FREE)],
        "an error of the contract, and a value whose slot is kept": [
            Result(2, 102, 0, 37, SLOT_FREE),
            Result(3, 0, 2**32 - 1, 0, 0),
        ],
    },
    Op.FAILURE: {
        "a crash": messages.Failure(
            call_id=1,
            code=257,
            message="host.logger@1 fn 5: the worker died with signal 11 (SIGSEGV) while running the call",
            began="yes",
            signal=11,
            queued=0.25,
            ran=1.5,
        ),
        "a deadline": messages.Failure(
            call_id=2,
            code=256,
            message="host.logger@1 fn 5: not finished within its deadline 0.25 s: queued 0 s, ran 0.25 s, "
            "0.2 s of CPU, state S (sleeping) in do_sys_poll",
            slot="kept",
            began="yes",
            limit="deadline 0.25 s",
            queued=0.0,
            ran=0.25,
            cpu=0.2,
            state="S (sleeping)",
            wchan="do_sys_poll",
        ),
        "a contract that no longer loads": messages.Failure(
            call_id=3, code=102, message="VM dispatch failed", kind="ContractLoadFailed", slot="unused"
        ),
        "a message that is none": messages.Failure(call_id=0, code=263, message="protocol version 9 is outside 1..1"),
    },
    Op.RELEASED: {"one call": [CallId(2)]},
    Op.REPLY: {
        "done": messages.Reply(request_id=1),
        "refused": messages.Reply(request_id=2, kind="ContractNotFound", code=100, reason="host contract not found"),
        "a listing": messages.Reply(
            request_id=3,
            body={
                "contracts": [
                    {
                        "id": _CONTRACT,
                        "name": "host.logger",
                        "version": "1.2.3",
                        "deadline_us": 250_000,
                        "stateless": True,
                        "workers": 2,
                    }
                ],
                "total": 1,
            },
        ),
    },
    Op.SEGMENT: {
        "with the descriptors of args and out": messages.Segment(
            request_id=5,
            arena=7,
            index=1,
            count=16,
            args_stride=4096,
            out_stride=8192,
            deadline_us=250_000,
        )
    },
    Op.RESULT_INLINE: {
        "a value": WithPiece(Result(1, 0, 8, 0, 0), b"result 1"),
        "an error of the contract": WithPiece(Result(2, 102, 0, 4, 0), b"boom"),
    },
    Op.PROBE: {"a look whether a host is there": messages.Probe()},
    Op.LOAD: {
        "a contract": messages.Load(
            contract=_CONTRACT,
            name="host.logger",
            source=b"return function(fn_id, args, out) end",
            chunk_name="@logger.lua",
            modules={"util": b"return {}"},
            memory=64 << 20,
        )
    },
    Op.EXECUTE: {"one call": [EXECUTE]},
    Op.UNMAP: {"a pair": messages.Unmap(arena=7, index=1)},
    Op.FORGET: {"an arena": messages.Forget(arena=7)},
    Op.SAVE: {"a worker that others follow": messages.Save()},
    Op.RESTORE: {"state": messages.Restore(state=b"n=7")},
    Op.SAVED: {
        "state": messages.Saved(state=b"n=7", problem=""),
        "none": messages.Saved(state=b"", problem="save() returned nil, not a string"),
    },
    Op.RESTORED: {"taken up": messages.Restored(problem="")},
    Op.MAP: {
        "with the descriptors of args and out": messages.Map(
            arena=7, index=1, count=16, args_stride=4096, out_stride=8192
        )
    },
    Op.READY: {
        "a blank worker": messages.Ready(
            pid=4322, posture="+seccomp\tno fork", c_modules="/usr/lib/a.so\n/usr/lib/b.so"
        )
    },
    Op.LOADED: {
        "ready for calls": messages.Loaded(problem="", reason=""),
        "a singleton with state": messages.Loaded(problem="", reason="", saves=True, restores=True),
        "no function": messages.Loaded(problem="type", reason="table"),
        "a syntax error": messages.Loaded(problem="load", reason="logger.lua:1: unexpected symbol"),
    },
    Op.DONE: {
        "a value": [Done(9, 0, 8, 0, 0)],
        "out of memory, and a call that was not begun": [
            Done(10, 258, 0, 40, RETIRE),
            Done(11, 0, 0, 0, NOT_BEGUN),
            Done(12, 0, 8, 0, RECYCLE),
        ],
    },
    Op.START: {"a worker": messages.Start(worker=3, routing_id=_ROUTING_ID)},
    Op.KILL: {"a worker": messages.Kill(worker=3)},
    Op.INSPECT: {"a worker that runs the call of a hand-over": messages.Inspect(worker=3, sequence=9)},
    Op.END: {"the broker ends": messages.End()},
    Op.STARTED: {
        "with a pidfd and a socketpair's end": messages.Started(worker=3, pid=4322),
    },
    Op.EXITED: {
        "killed": messages.Exited(
            worker=3, signal=9, cpu_us=250_000, memory=30 << 20, state="S (sleeping)", wchan="do_sys_poll"
        ),
        "exited": messages.Exited(worker=4, exit_code=0),
        "not started": messages.Exited(worker=5, problem="a worker could not be started: no memory"),
    },
    Op.LEAVING: {"a worker host is to end": messages.Leaving()},
    Op.OUTPUT: {
        "a line": messages.Output(worker=3, stream="stdout", data=b"hello\n"),
        "the end of a flood": messages.Output(worker=3, stream="stderr", data=b"", cut=1 << 33),
        "last words, which are no UTF-8": messages.Output(worker=3, stream="tail", data=b"PANIC: \xff\n"),
    },
    Op.INSPECTED: {
        "one that computes": messages.Inspected(
            worker=3, sequence=9, cpu_us=250_000, memory=30 << 20, state="R (running)"
        )
    },
    Op.PIECE: {"the last three bytes of 262147": WithPiece(Piece(3, 262_144, 3), b"end")},
    Op.MORE: {"the first piece was taken": [More(3, 262_144)]},
}


def encoded(op: Op, example: Any) -> bytes:
    if isinstance(example, WithPiece):
        return encode_inline(op, example.record, example.piece)
    return encode_records(op, example) if isinstance(example, list) else encode(example)


def to_json(value: Any) -> Any:
    """Write a field in terms of JSON: bytes as hex digits, large integers as decimal digits."""
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, int) and value > EXACT_MAX:
        return {"integer": str(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return value


def from_json(value: Any) -> Any:
    """Read what `to_json` wrote."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"bytes": str(digits), **rest} if not rest:
            return bytes.fromhex(digits)
        case {"integer": str(digits), **rest} if not rest:
            return int(digits)
    return {key: from_json(item) for key, item in value.items()}


def described(op: Op, what: str, example: Any) -> dict[str, Any]:
    """The entry of one frame."""
    frame = {"what": what, "hex": encoded(op, example).hex()}
    if isinstance(example, WithPiece):
        return frame | {"records": [to_json(example.record._asdict())], "piece": to_json(example.piece)}
    if isinstance(example, list):
        return frame | {"records": [to_json(record._asdict()) for record in example]}
    values = {item.name: getattr(example, item.name) for item in fields(example)}
    return frame | {"fields": to_json(values)}


def read_golden_frames() -> dict[str, list[dict[str, Any]]]:
    frames: dict[str, list[dict[str, Any]]] = json.loads(PATH.read_text())
    return frames


def write_golden_frames() -> None:
    """Write the file anew; called by nobody but the person who adds frames."""
    frames = {op.name: [described(op, what, example) for what, example in EXAMPLES[op].items()] for op in Op}
    PATH.write_text(json.dumps(frames, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write_golden_frames()
