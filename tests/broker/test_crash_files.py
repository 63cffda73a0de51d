"""What is told of a crash, and the form of its files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from zlib import crc32

import pytest

from luacell.broker.crash_files import (
    CAUSE_MAX,
    HEAD_SIZE,
    MAGIC,
    DamagedFile,
    circumstances_of,
    digest_of,
    function_of,
    kept_size,
    packed_call,
    packed_sources,
    row_of,
    unpacked,
)
from luacell.client.crashes import CrashInfo
from luacell.protocol import codec
from luacell.protocol.headers import HAS_ARGS
from luacell.protocol.identity import HostContractId, Version
from luacell.protocol.limits import CRASH_ARGS_MAX, DEADLINE_DEFAULT_US, NS_PER_MS
from luacell.protocol.messages import API_MODULE, CREATE, IN_INSTANCE, SEAT_SHIFT
from luacell.protocol.paths import CRASH_SOURCES_SUFFIX, CRASH_SUFFIX
from tests.broker.bench import Bench, record_of
from tests.broker.crash_samples import crash_on, crashed_call, row_with

ID = "0123456789ab"
API = b"""
[[host_contract]]
name = "host.kv"
version = "1.2.0"
[[host_contract.functions]]
name = "get"
[[host_contract.functions]]
name = "put"
"""
TYPED = replace(
    record_of(int(HostContractId("host.kv", 1))), name="host.kv", version=Version(1, 2, 0), modules={API_MODULE: API}
)


def test_a_row_tells_what_hosts_read() -> None:
    row = row_of(crashed_call(ID), "d" * 64)
    assert row == row_with()
    assert CrashInfo.from_listing(row).contract_id == 1


def test_named_contracts_and_long_causes() -> None:
    crashed = crashed_call(ID, None, TYPED)
    row = row_of(crashed._replace(crash=crashed.crash._replace(cause="x" * 2000)), "d" * 64)
    assert (row["contract"], row["version"], len(row["cause"]), row["args_kept"]) == (
        "host.kv@1",
        "1.2.0",
        CAUSE_MAX,
        0,
    )


@pytest.mark.parametrize(
    ("fn_id", "name"),
    [(0, "get"), (1, "put"), (2, ""), (IN_INSTANCE | 3 << SEAT_SHIFT | 1, "put"), (IN_INSTANCE | CREATE, "")],
)
def test_functions_of_typed_contracts_have_names(fn_id: int, name: str) -> None:
    assert function_of(TYPED, fn_id) == name


@pytest.mark.parametrize("api", [b"\xff", b"name =", API.replace(b"host.kv", b"host.other")])
def test_a_description_that_cannot_be_read_names_nothing(api: bytes) -> None:
    assert function_of(replace(TYPED, modules={API_MODULE: api}), 0) == ""


def test_no_more_arguments_are_kept_than_fit() -> None:
    crash = crash_on(Bench())
    assert kept_size(crash) == 8
    for size, flags, kept in ((CRASH_ARGS_MAX + 1, HAS_ARGS, CRASH_ARGS_MAX), (0, HAS_ARGS, 0), (0, 0, None)):
        crash.call.header = crash.call.header._replace(args_size=size, flags=flags)
        assert kept_size(crash) == kept


def test_files_are_read_as_they_were_written() -> None:
    crashed = crashed_call(ID, record=TYPED)
    sources = packed_sources(TYPED)
    assert unpacked(CRASH_SOURCES_SUFFIX, sources) == {"source": b"return f", "modules": {API_MODULE: API}}
    row = row_of(crashed, digest_of(sources))
    found = unpacked(CRASH_SUFFIX, packed_call(crashed, row))
    assert (found["crash"], found["args"], found["chunk_name"]) == (row, b"args", "=f")
    assert found["settings"] == TYPED.settings.as_fields()


def test_circumstances_are_those_of_the_worker_and_the_caller() -> None:
    crash = crash_on(Bench())
    assert circumstances_of(crash) == {"sandbox": "default", "c_modules": "", "budget_us": DEADLINE_DEFAULT_US}
    worker = crash.call.worker
    assert worker is not None
    worker.confinement = worker.confinement.at_least("hardened")
    worker.c_modules = "/lib/a.so\n/lib/b.so"
    crash.call.deadline_ns = crash.call.arrived_ns + 250 * NS_PER_MS
    assert circumstances_of(crash) == {
        "sandbox": "hardened",
        "c_modules": "/lib/a.so\n/lib/b.so",
        "budget_us": 250_000,
    }


def test_a_record_of_an_earlier_release_has_no_circumstances() -> None:
    crashed = crashed_call(ID)
    body = codec.unpack(memoryview(packed_call(crashed, row_with()))[HEAD_SIZE:])
    assert body["circumstances"]["sandbox"] == "default"
    del body["circumstances"]
    assert unpacked(CRASH_SUFFIX, framed(body)) == body | {"circumstances": {}}
    with pytest.raises(DamagedFile, match="field budget_us is of type str"):
        unpacked(CRASH_SUFFIX, framed(body | {"circumstances": circumstances_of(crashed.crash) | {"budget_us": "1"}}))


def framed(body: Any) -> bytes:
    """Write a map as a file of crash records has it."""
    data = codec.pack(body)
    return MAGIC + crc32(data).to_bytes(4, "little") + data


def test_sources_have_the_same_digest_whatever_the_order_of_their_modules() -> None:
    one, other = replace(TYPED, modules={"a": b"1", "b": b"2"}), replace(TYPED, modules={"b": b"2", "a": b"1"})
    assert digest_of(packed_sources(one)) == digest_of(packed_sources(other)) != digest_of(packed_sources(TYPED))


def test_what_is_damaged_is_not_read() -> None:
    crashed = crashed_call(ID)
    data = packed_call(crashed, row_with())
    damaged = {
        b"": "does not begin",
        b"SQLite format 3\0": "does not begin",
        data[:-1]: "checksum",
        data[:-1] + b"x": "checksum",
        packed_sources(record_of()): "fields are not those",
        packed_call(crashed, row_with(fn_id="7")): "field fn_id is of type str",
        packed_call(crashed, row_with(more=1)): "fields are not those",
        packed_call(crashed, []): "field crash is of type list",  # type: ignore[arg-type]
    }
    for content, reason in damaged.items():
        with pytest.raises(DamagedFile, match=reason):
            unpacked(CRASH_SUFFIX, content)


def test_a_checksum_does_not_make_a_map() -> None:
    for body, reason in ((b"\xc1", "malformed msgpack"), (b"\x90", "fields are not those")):
        with pytest.raises(DamagedFile, match=reason):
            unpacked(CRASH_SUFFIX, b"lccrash1" + crc32(body).to_bytes(4, "little") + body)
