"""Crash records: what is known of calls that crashed their workers, and how a broker is asked for it.

It decides what is to be asked and reads the answers; the bridges ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luacell.client.requests import Request
from luacell.client.units import Question, Questions
from luacell.protocol import messages
from luacell.protocol.errors import CrashNotFound
from luacell.protocol.limits import US_PER_S
from luacell.protocol.messages import CRASH_ID_LENGTH, Settings, id_of


@dataclass(frozen=True, slots=True)
class CrashInfo:
    """A call that crashed its worker, ran out of time and was stopped, or ran out of memory.

    Attributes:
        id: short text; the same in every life of the broker.
        time: unix seconds.
        contract_id: u64.
        contract: as messages name it, such as "host.kv@1".
        version: "1.2.0", or "" where only the id is known.
        fn_id: u32.
        function: the name of a typed function, or "".
        code: 256, 257 or 258.
        cause: how the worker ended, or why it was ended.
        signal, exit_code: of the worker, or None.
        began: "yes".
        queued, ran, cpu: seconds, or None.
        args_size: bytes, as called.
        args_kept: bytes that are on record.
        out_size: bytes of results that were asked for.
        source_digest: SHA-256 of what the worker had loaded, in hexadecimal digits.
        host: whose call it was.
        stderr: the end of what the worker wrote there.
    """

    id: str
    time: float
    contract_id: int
    contract: str
    version: str
    fn_id: int
    function: str
    code: int
    cause: str
    signal: int | None
    exit_code: int | None
    began: str
    queued: float | None
    ran: float | None
    cpu: float | None
    args_size: int
    args_kept: int
    out_size: int
    source_digest: str
    host: str
    stderr: str

    @classmethod
    def from_listing(cls, row: Mapping[str, Any]) -> CrashInfo:
        """Read a row of the broker's list."""
        return cls(
            **{name: row[name] for name in cls.__dataclass_fields__} | {"contract_id": id_of(row["contract_id"])}
        )


@dataclass(frozen=True, slots=True)
class Crash:
    """A crash with all that makes the call again.

    Attributes:
        info: what is known of it.
        args: the call's arguments, cut to `info.args_kept` bytes; None where it had none.
        source: the chunk that the worker had loaded.
        chunk_name: its name, in Lua's form.
        modules: by `require` name.
        settings: of the contract.
        sandbox: the level that its worker had, which may be stricter than the contract's; "" where it is not on record.
        c_modules: paths of the C modules that its worker host had loaded.
        budget: seconds that its caller gave the call; None where that is not on record.
    """

    info: CrashInfo
    args: bytes | None
    source: bytes
    chunk_name: str
    modules: dict[str, bytes]
    settings: Settings
    sandbox: str = ""
    c_modules: tuple[str, ...] = ()
    budget: float | None = None


def listing_crashes() -> Questions[list[CrashInfo]]:
    """Ask for all crashes on record; return them newest first."""
    found: dict[str, CrashInfo] = {}  # a row that slid to the next page meanwhile comes twice
    asked = 0
    while True:
        reply = yield Question(_page(asked))
        rows: Any = reply.body["crashes"]
        found.update((row["id"], CrashInfo.from_listing(row)) for row in rows if row["id"] not in found)
        asked += len(rows)
        if asked >= reply.body["total"] or not rows:
            return list(found.values())


def _page(first: int) -> Request:
    return lambda number: messages.Crashes(request_id=number, first=first)


def reading_crash(crash_id: str) -> Questions[Crash]:
    """Ask for both parts of a crash; return it.

    Raises:
        CrashNotFound: no crash has such an id.
    """
    if not isinstance(crash_id, str) or len(crash_id) != CRASH_ID_LENGTH:
        raise CrashNotFound(crash_id)
    call = (yield _part(crash_id, "args")).body
    sources = (yield _part(crash_id, "sources")).body
    circumstances = call.get("circumstances") or {}  # a record of an earlier release has none
    budget_us = circumstances.get("budget_us")
    return Crash(
        info=CrashInfo.from_listing(call["crash"]),
        args=call["args"],
        source=sources["source"],
        chunk_name=call["chunk_name"],
        modules=dict(sources["modules"]),
        settings=_settings_of(call["settings"]),
        sandbox=circumstances.get("sandbox", ""),
        c_modules=tuple(filter(None, circumstances.get("c_modules", "").split("\n"))),
        budget=None if budget_us is None else budget_us / US_PER_S,
    )


def _part(crash_id: str, part: str) -> Question:
    return Question(lambda number: messages.Crash(request_id=number, crash=crash_id, part=part))


def _settings_of(fields: Mapping[str, Any]) -> Settings:
    """Read settings that may come from another release: what they do not say is the default."""
    return Settings(**{name: fields[name] for name in Settings.__dataclass_fields__ if name in fields})
