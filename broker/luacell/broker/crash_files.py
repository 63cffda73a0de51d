"""Crash records as they lie in files: what is told of a call, the form of the files and their names.

Two kinds of file, each a magic, a checksum and one msgpack map: a call with its arguments, and the sources that it ran
on, which calls share. It opens nothing, and how many are kept is `crash_shelf`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final, NamedTuple
from zlib import crc32

from luacell.broker.model import RecordCrash
from luacell.broker.registry import ContractRecord
from luacell.protocol import codec
from luacell.protocol.api import find_contract, parse
from luacell.protocol.errors import ApiError, ProtocolError
from luacell.protocol.headers import HAS_ARGS
from luacell.protocol.limits import CRASH_ARGS_MAX, MESSAGE_MAX, NS_PER_US
from luacell.protocol.messages import API_MODULE, FUNCTION_MASK, IN_INSTANCE, OF_INSTANCES, id_bytes
from luacell.protocol.paths import CRASH_SOURCES_SUFFIX, CRASH_SUFFIX

MAGIC: Final = b"lccrash1"
HEAD_SIZE: Final = len(MAGIC) + 4
FILE_MAX: Final = MESSAGE_MAX  # bytes; either kind fits the message that asks for it
CAUSE_MAX: Final = 1024  # characters; the longest names a contract of 255
_NUMBER: Final = (int, float)
_ROW: Final[dict[str, tuple[type, ...]]] = {
    "id": (str,),
    "time": _NUMBER,
    "contract_id": (bytes,),
    "contract": (str,),
    "version": (str,),
    "fn_id": (int,),
    "function": (str,),
    "code": (int,),
    "cause": (str,),
    "signal": (int, type(None)),
    "exit_code": (int, type(None)),
    "began": (str,),
    "queued": (*_NUMBER, type(None)),
    "ran": (*_NUMBER, type(None)),
    "cpu": (*_NUMBER, type(None)),
    "args_size": (int,),
    "args_kept": (int,),
    "out_size": (int,),
    "source_digest": (str,),
    "host": (str,),
    "stderr": (str,),
}
_FORMS: Final[dict[str, dict[str, tuple[type, ...]]]] = {
    CRASH_SUFFIX: {
        "crash": (dict,),
        "args": (bytes, type(None)),
        "chunk_name": (str,),
        "settings": (dict,),
        "circumstances": (dict,),
    },
    CRASH_SOURCES_SUFFIX: {"source": (bytes,), "modules": (dict,)},
}
# The level of the sandbox and the C modules (one a line) that the worker had, whatever the contract asks for, and the
# microseconds that its caller gave the call. Records of earlier releases have none of them.
_CIRCUMSTANCES: Final[dict[str, tuple[type, ...]]] = {"sandbox": (str,), "c_modules": (str,), "budget_us": (int,)}

Row = Mapping[str, Any]


class DamagedFile(ValueError):
    """A file is not what its name says; the text tells why."""


class CrashedCall(NamedTuple):
    """A call as it is to be written.

    Attributes:
        id: of the crash.
        time: unix seconds.
        crash: what the dispatcher tells of it.
        record: the contract as it was then.
        args: the call's arguments, cut to CRASH_ARGS_MAX; None where it had none.
    """

    id: str
    time: float
    crash: RecordCrash
    record: ContractRecord
    args: bytes | None


def kept_size(crash: RecordCrash) -> int | None:
    """Return how many bytes of a call's arguments are kept, or None where it had none."""
    header = crash.call.header
    return min(header.args_size, CRASH_ARGS_MAX) if header.flags & HAS_ARGS else None


def row_of(crashed: CrashedCall, digest: str) -> dict[str, Any]:
    """Return what a list shows of a call.

    Args:
        crashed: the call.
        digest: of its sources.
    """
    crash, record = crashed.crash, crashed.record
    header = crash.call.header
    return {
        "id": crashed.id,
        "time": crashed.time,
        "contract_id": id_bytes(record.id),
        "contract": record.title,
        "version": str(record.version) if record.version else "",
        "fn_id": header.fn_id,
        "function": function_of(record, header.fn_id),
        "code": int(crash.code),
        "cause": crash.cause[:CAUSE_MAX],
        "signal": crash.signal,
        "exit_code": crash.exit_code,
        "began": "yes",
        "queued": crash.queued,
        "ran": crash.ran,
        "cpu": crash.cpu,
        "args_size": header.args_size,
        "args_kept": len(crashed.args or b""),
        "out_size": header.out_size,
        "source_digest": digest,
        "host": crash.call.host.title,
        "stderr": crash.stderr or "",
    }


def circumstances_of(crash: RecordCrash) -> dict[str, Any]:
    """Return what a call's worker was confined to, and how much time its caller gave it; see `_CIRCUMSTANCES`."""
    call, worker = crash.call, crash.call.worker
    assert worker is not None  # it has crashed
    return {
        "sandbox": worker.confinement.level,
        "c_modules": worker.c_modules,
        "budget_us": (call.deadline_ns - call.arrived_ns) // NS_PER_US,
    }


def function_of(record: ContractRecord, fn_id: int) -> str:
    """Return the name of a typed contract's function, or ""."""
    names = _functions(record.modules.get(API_MODULE, b""), record.id)
    number = fn_id & FUNCTION_MASK if fn_id >= IN_INSTANCE else fn_id
    return names[number] if number < min(len(names), OF_INSTANCES) else ""


@lru_cache(maxsize=8)
def _functions(api: bytes, contract_id: int) -> tuple[str, ...]:
    """Return the names of a contract's functions by number; none where it is raw."""
    try:
        contract = find_contract(parse(api.decode(), "api.toml"), contract_id)
    except (ApiError, UnicodeDecodeError):
        return ()
    return tuple(function.name for function in contract.functions)


def digest_of(sources: bytes) -> str:
    """Return the SHA-256 of what a worker had loaded, in hexadecimal digits: the name of the file with that content."""
    return sha256(memoryview(sources)[HEAD_SIZE:]).hexdigest()


def packed_sources(record: ContractRecord) -> bytes:
    """Return the content of the file with a contract's sources."""
    return _packed({"source": record.source, "modules": dict(sorted(record.modules.items()))})


def packed_call(crashed: CrashedCall, row: Row) -> bytes:
    """Return the content of the file with a call."""
    return _packed(
        {
            "crash": row,
            "args": crashed.args,
            "chunk_name": crashed.record.chunk_name,
            "settings": crashed.record.settings.as_fields(),
            "circumstances": circumstances_of(crashed.crash),
        }
    )


def _packed(body: Mapping[str, Any]) -> bytes:
    data = codec.pack(body)
    return MAGIC + crc32(data).to_bytes(4, "little") + data


def unpacked(suffix: str, data: bytes) -> dict[str, Any]:
    """Read the content of a file.

    Args:
        suffix: of its name.
        data: all of it.

    Raises:
        DamagedFile: it is another's, cut off, changed, or of another release.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise DamagedFile("it does not begin as crash records do")
    body = memoryview(data)[HEAD_SIZE:]
    if crc32(body).to_bytes(4, "little") != data[len(MAGIC) : HEAD_SIZE]:
        raise DamagedFile("its checksum is wrong")
    try:
        found = codec.unpack(body)
    except ProtocolError as error:
        raise DamagedFile(str(error)) from None
    if suffix == CRASH_SUFFIX and type(found) is dict:
        found.setdefault("circumstances", {})
    _check(found, _FORMS[suffix])
    if suffix == CRASH_SUFFIX:
        _check(found["crash"], _ROW)
        if found["circumstances"]:
            _check(found["circumstances"], _CIRCUMSTANCES)
    checked: dict[str, Any] = found
    return checked


def _check(found: Any, form: Mapping[str, tuple[type, ...]]) -> None:
    if type(found) is not dict or found.keys() != form.keys():
        raise DamagedFile("its fields are not those of this release")
    for name, types in form.items():
        if type(found[name]) not in types:
            raise DamagedFile(f"its field {name} is of type {type(found[name]).__name__}")
