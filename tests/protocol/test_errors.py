"""Errors: polyplug's codes and texts literally, one exception per code, and facts that survive copying."""

import copy
import inspect
import pickle
import re

import pytest

from luacell.protocol import errors
from luacell.protocol.errors import AbiError, AbiErrorCode, CallError, LuacellError, call_error_class

CODES = {
    "OK": 0,
    "GENERIC": 1,
    "BUFFER_TOO_SMALL": 2,
    "PANIC": 3,
    "NOT_FOUND": 4,
    "STALE_HANDLE": 5,
    "FUNCTION_NOT_AVAILABLE": 6,
    "DUPLICATE_PROVIDER": 7,
    "INVALID_POINTER": 8,
    "REENTRANT_CALL": 9,
    "HOST_CONTRACT_NOT_FOUND": 100,
    "HOST_CONTRACT_VERSION_MISMATCH": 101,
    "HOST_CONTRACT_CALL_FAILED": 102,
    "DEADLINE_EXCEEDED": 256,
    "WORKER_CRASHED": 257,
    "OUT_OF_MEMORY": 258,
    "BUSY": 259,
    "QUARANTINED": 260,
    "UNAVAILABLE": 261,
    "UNAUTHORIZED": 262,
    "BAD_REQUEST": 263,
    "TOO_LARGE": 264,
    "CANCELLED": 265,
}
BRIDGE_ERRORS = [
    (
        errors.DuplicateContract(0x4D2),
        "duplicate host contract registration: contract_id=0x00000000000004D2",
        {"contract_id": 0x4D2},
    ),
    (
        errors.ContractNotFound(0xF53EB5F2845853BB),
        "host contract not found: contract_id=0xF53EB5F2845853BB",
        {"contract_id": 0xF53EB5F2845853BB},
    ),
    (
        errors.TypeMismatch(0x4D2, "Lua function", "Lua table"),
        "implementation type mismatch for contract_id=0x00000000000004D2: expected Lua function, got Lua table",
        {"contract_id": 0x4D2, "expected": "Lua function", "got": "Lua table"},
    ),
    (
        errors.TypeMismatch.of_lua(0x4D2, "nil"),
        "implementation type mismatch for contract_id=0x00000000000004D2: expected Lua function, got Lua nil",
        {"contract_id": 0x4D2, "expected": "Lua function", "got": "Lua nil"},
    ),
    (
        errors.TypeMismatch.of_lua(0x4D2, "table function"),
        "implementation type mismatch for contract_id=0x00000000000004D2: expected Lua table, got Lua function",
        {"contract_id": 0x4D2, "expected": "Lua table", "got": "Lua function"},
    ),
    (
        errors.VmRegistrationFailed(0x4D2, "kv.lua:1: unexpected symbol"),
        "VM registration failed for contract_id=0x00000000000004D2: kv.lua:1: unexpected symbol",
        {"contract_id": 0x4D2, "reason": "kv.lua:1: unexpected symbol"},
    ),
    (
        errors.VmDispatchFailed(0x4D2, 5, "no memory"),
        "VM dispatch failed for contract_id=0x00000000000004D2 fn_id=5: no memory",
        {"contract_id": 0x4D2, "fn_id": 5, "reason": "no memory"},
    ),
    (
        errors.BridgeNotInitialized("Lua"),
        "host runtime bridge not initialized for runtime=Lua",
        {"runtime": "Lua", "reason": ""},
    ),
    (
        errors.BridgeNotInitialized("Lua", "the broker died"),
        "host runtime bridge not initialized for runtime=Lua: the broker died",
        {"runtime": "Lua", "reason": "the broker died"},
    ),
]
CALL_ERRORS = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, CallError)]


def test_codes_are_polyplugs_and_luacells_own_from_256() -> None:
    assert {code.name: int(code) for code in AbiErrorCode} == CODES


@pytest.mark.parametrize("value", [10, 99, 103, 255, 266, 1023, -1, 1 << 32, "OK", None, 1024.5])
def test_unknown_code_reads_as_generic(value: object) -> None:
    assert AbiErrorCode(value) is AbiErrorCode.GENERIC  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1024, 5000, (1 << 32) - 1])
def test_contracts_own_code_is_kept(value: int) -> None:
    code = AbiErrorCode(value)
    assert code == value
    assert code.name == f"CONTRACT_{value}"
    assert code == AbiErrorCode(value)
    assert pickle.loads(pickle.dumps(code)) == code
    assert value not in list(AbiErrorCode)


def test_supported_languages_have_polyplugs_numbers() -> None:
    assert [(language.name, int(language)) for language in errors.SupportedLanguage] == [
        ("RUST", 0),
        ("CPP", 1),
        ("DOTNET", 2),
        ("PYTHON", 3),
        ("LUA", 4),
        ("JAVASCRIPT", 5),
    ]


def test_abi_error_is_ok_with_code_zero_alone() -> None:
    assert AbiError(AbiErrorCode.OK).ok
    assert AbiError(AbiErrorCode.OK).message == ""
    assert not AbiError(AbiErrorCode.GENERIC, "why").ok
    assert not AbiError(AbiErrorCode(5000)).ok


@pytest.mark.parametrize(("error", "text", "facts"), BRIDGE_ERRORS)
def test_bridge_error_has_polyplugs_text_and_its_facts(
    error: errors.BridgeError, text: str, facts: dict[str, object]
) -> None:
    assert str(error) == text
    assert vars(error) == facts


def test_a_crash_that_is_not_on_record_is_named() -> None:
    error = errors.CrashNotFound("0123456789ab")
    assert error.crash_id == "0123456789ab"
    assert str(error).startswith("crash '0123456789ab' is not on record, or no longer")


@pytest.mark.parametrize(("error", "text", "facts"), BRIDGE_ERRORS)
def test_bridge_error_survives_copy_and_pickle(error: errors.BridgeError, text: str, facts: dict[str, object]) -> None:
    for twin in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is type(error)
        assert str(twin) == text
        assert vars(twin) == facts


def test_call_error_survives_copy_and_pickle_with_every_fact() -> None:
    error = errors.WorkerCrashed("it died", began="yes", signal=11, exit_code=None, limit="none", queued=0.1, ran=0.2)
    error.__cause__ = ValueError("lost on the way, as with every exception")
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is errors.WorkerCrashed
        assert str(twin) == twin.message == "it died"
        assert vars(twin) == vars(error)


@pytest.mark.parametrize("code", [code for code in AbiErrorCode if code != AbiErrorCode.OK])
def test_every_code_has_a_class_of_its_own(code: AbiErrorCode) -> None:
    error_class = call_error_class(code)
    error = error_class("why")
    assert error.code is code
    assert error_class.__name__.lower() == code.name.replace("_", "").lower()
    assert (error.message, error.began, error.signal, error.exit_code) == ("why", "unknown", None, None)
    assert (error.limit, error.queued, error.ran) == (None, None, None)


def test_contracts_own_code_is_generic_and_shows_its_code() -> None:
    code = AbiErrorCode(5000)
    error = call_error_class(code)("why", code=code)
    assert type(error) is errors.Generic
    assert error.code == 5000


def test_errors_that_are_of_two_kinds_can_be_caught_as_either() -> None:
    not_found = errors.HostContractNotFound("none", began="no")
    assert isinstance(not_found, errors.ContractNotFound)
    assert (not_found.code, not_found.contract_id) == (100, 0)
    unloadable = errors.ContractLoadFailed("syntax", began="no")
    assert isinstance(unloadable, errors.HostContractCallFailed)
    assert isinstance(unloadable, errors.VmDispatchFailed)
    assert (unloadable.code, unloadable.contract_id, unloadable.fn_id, unloadable.reason) == (102, 0, 0, "")
    not_found.contract_id = 7
    assert pickle.loads(pickle.dumps(not_found)).contract_id == 7


def test_tree_at_the_top_names_every_error_and_no_other() -> None:
    tree = inspect.getdoc(errors) or ""
    tree = tree[tree.index("LuacellError") : tree.index("Codes below")]
    names = {name for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, LuacellError)}
    written = set(re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)+\b|\b(?:Generic|Panic|Busy)\b", tree))
    written |= set(re.findall(r"\b(?:Quarantined|Unavailable|Cancelled|Unauthorized)\b", tree))
    assert written == names


def test_every_error_is_a_luacell_error() -> None:
    for error_class in [*CALL_ERRORS, errors.ProtocolError, errors.BridgeClosed, errors.BridgeForked]:
        assert issubclass(error_class, LuacellError)
        assert error_class.__doc__
