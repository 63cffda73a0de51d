"""Raw functions as implementations of typed contracts: they find pointers, leave pointers, and give the same bytes."""

from __future__ import annotations

import ctypes
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luacell.protocol.api.parse import parse
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.limits import MIB
from luacell.worker.binding import binding_source
from luacell.worker.raw_binding import raw_binding_source
from luacell.worker.vm import Vm
from tests.support.apis import SVC, apis, values
from tests.support.in_process import CREATE, DESTROY, IN_INSTANCE, Failed, InProcess, head
from tests.support.typed_contracts import RAW_SVC_LUA, SVC_LUA, echoes, raw_echoes

NAMES = """
[[types]]
name = "Person"
fields = [{ name = "age", type = "u8" }, { name = "name", type = "StringView" }]
[[host_contract]]
name = "host.names"
version = "1"
[[host_contract.functions]]
name = "older"
params = [{ name = "people", type = "Array<Person>" }, { name = "tags", type = "Array<u16>" }]
return = "Array<Person>"
[[host_contract.functions]]
name = "count"
return = "u32"
[[host_contract.functions]]
name = "forget"
params = [{ name = "all", type = "bool" }]
[[host_contract.functions]]
name = "blob"
params = [{ name = "size", type = "u64" }]
return = "Buffer"
"""
NAMES_LUA = """
local ffi = require("ffi")
ffi.cdef [[
typedef struct { const uint8_t *ptr; size_t len; } View;
typedef struct { uint8_t age; View name; } Person;
typedef struct { Person *items; size_t len; } People;
typedef struct { People people; struct { const uint16_t *items; size_t len; } tags; } Older;
typedef struct { uint8_t *ptr; size_t len, cap; } Blob;
]]
local count, kept = 0, nil
return function(fn_id, args, out)
  count = count + 1
  if fn_id == 0 then
    local given = ffi.cast("Older *", args)
    kept = ffi.new("Person[?]", given.people.len)
    for index = 0, tonumber(given.people.len) - 1 do
      kept[index] = given.people.items[index]
      kept[index].age = kept[index].age + given.tags.items[index]
    end
    local result = ffi.cast("People *", out)
    result.items, result.len = kept, given.people.len
  elseif fn_id == 1 then
    assert(args == nil)
    ffi.cast("uint32_t *", out)[0] = count
  elseif fn_id == 2 then
    assert(args[0] == 1 and out == nil)
    count = 0
  else
    local size = tonumber(ffi.cast("uint64_t *", args)[0])
    kept = size <= 64 * 1024 * 1024 and ffi.new("uint8_t[?]", size) or nil
    local result = ffi.cast("Blob *", out)
    result.ptr, result.len, result.cap = kept, size, 7
  end
end
"""


def names() -> InProcess:
    made = InProcess(NAMES, NAMES_LUA)
    assert (made.problem, made.reason) == ("", "")
    return made


def test_known_contract_gives_the_bytes_that_its_typed_twin_gives() -> None:
    raw, typed = InProcess(SVC, RAW_SVC_LUA), InProcess(SVC, SVC_LUA)
    assert (raw.problem, raw.reason) == ("", "")
    calls = [
        ("scale", (3, 2.5, True)),
        ("upper", ("héllo\0",)),
        ("upper", ("",)),
        ("mix", (1, {"x": 1.0, "y": 2.0}, b"ab", 7)),
        ("mix", (0, {"x": -1.0, "y": 0.5}, b"", 65535)),
        ("open", (1, 0, 0)),
        ("open", (3, -128, -(1 << 63))),
    ]
    for name, args in calls:
        assert raw.bytes_of(name, *args) == typed.bytes_of(name, *args), name


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_drawn_descriptions_give_the_bytes_of_a_typed_echo(data: st.DataObject) -> None:
    text = data.draw(apis())
    raw, typed = (InProcess(text, source, room=1 << 16) for source in (raw_echoes(text), echoes(text)))
    assert (raw.problem, raw.reason) == ("", "")
    for function in raw.contract.functions:
        args = tuple(data.draw(values(param.type, raw.types)) for param in function.params)
        if any(param.type == function.result for param in function.params):
            packed = raw.functions[function.name].pack(args)
            assert raw.raw(function.id, packed, 1 << 16) == typed.raw(function.id, packed, 1 << 16)


def test_structs_in_arrays_are_followed_both_ways() -> None:
    made = names()
    people = [{"age": 1, "name": "Ada"}, {"age": 2, "name": ""}, {"age": 3, "name": "x" * 100}]
    found = made.call("older", people, [10, 20, 30])
    assert [(each.age, each.name) for each in found] == [(11, "Ada"), (22, ""), (33, "x" * 100)]
    assert made.call("older", [], []) == []


def test_nothing_is_null_and_state_is_that_of_the_function() -> None:
    made = names()
    assert [made.call("count") for _ in range(2)] == [1, 2]
    assert made.call("forget", True) is None
    made.raw(CREATE, head(5), 0)
    assert made.raw(IN_INSTANCE | 1, head(5), 4) == struct.pack("<I", 1), "the instances of callers are the function"
    made.raw(DESTROY, struct.pack("<Q", 5), 0)
    assert made.call("count") == 2
    with pytest.raises(Failed, match="the instance is gone") as raised:
        made.raw(IN_INSTANCE | 1, head(5), 4)
    assert raised.value.code is AbiErrorCode.STALE_HANDLE
    with pytest.raises(Failed, match="has 4 functions; there is no function 4"):
        made.raw(4, b"", 0)


def test_singleton_may_be_a_raw_function() -> None:
    made = InProcess(NAMES.replace('version = "1"', 'version = "1"\nsingleton = true'), NAMES_LUA)
    assert (made.problem, made.call("count"), made.vm.saves) == ("", 1, False)


def test_results_of_any_size_are_kept_and_bad_ones_named() -> None:
    made = names()
    assert made.call("blob", 0) == b""
    with pytest.raises(Failed, match="result of 8216 bytes is kept as 1"):
        made.raw(3, struct.pack("<Q", 8192), 1024)
    with pytest.raises(Failed, match=r"host\.names@1 blob: result: 67108865 items; the limit is 67108864"):
        made.call("blob", 64 * MIB + 1)
    with pytest.raises(Failed, match=r"host\.names@1 blob: result: the result has more than 67108864 bytes"):
        made.call("blob", 64 * MIB)
    null = NAMES_LUA.replace("size <= 64 * 1024 * 1024 and", "false and")
    with pytest.raises(Failed, match=r"host\.names@1 blob: result: a null pointer to 8 items"):
        InProcess(NAMES, null).call("blob", 8)


@pytest.mark.parametrize("words", [(17, 1), (0, 17), ((1 << 64) - 1, 1), (1, (1 << 64) - 1)])
def test_ranges_that_hosts_name_are_checked_before_they_become_pointers(words: tuple[int, int]) -> None:
    made = InProcess(SVC, RAW_SVC_LUA)
    with pytest.raises(Failed, match=r"host\.svc@1 upper: text: ") as raised:
        made.raw(1, struct.pack("<QQ", *words), 64)
    assert raised.value.code is AbiErrorCode.HOST_CONTRACT_CALL_FAILED
    with pytest.raises(Failed, match=r"host\.svc@1 upper: 15 bytes of arguments, not 16"):
        made.raw(1, bytes(15), 64)


def test_untrusted_contracts_are_no_raw_functions() -> None:
    api = parse(SVC, "api.toml")
    (contract,) = api.host_contracts
    memory = (ctypes.c_ubyte * 8192)()  # nothing is called, so nothing is written to it
    vm = Vm(ctypes.addressof(memory), ctypes.addressof(memory))
    binding = binding_source(contract, api.enums)
    problem = vm.load(
        b"function() end",
        "=raw",
        {},
        16 * MIB,
        binding,
        lambda: raw_binding_source(contract),
        sandbox="untrusted",
    )
    assert problem == ("type", "table function")
