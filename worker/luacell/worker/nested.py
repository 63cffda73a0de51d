"""What `lua/nested.lua` needs of Python: names of contracts to ids, and the control messages of a contract's own calls.

Everything is given and returned as Lua can hold it: bytes, numbers, and dicts that become tables. What goes wrong is a
dict with `code`, `message`, `kind` and `began`, as the error will show them; nothing is raised into Lua.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

from luacell.protocol import messages
from luacell.protocol.api import ApiError, find_contract, parse
from luacell.protocol.errors import AbiErrorCode, call_error_class
from luacell.protocol.identity import ContractRef, Version
from luacell.protocol.messages import decode, encode, id_bytes
from luacell.worker.binding import caller_source

KINDS: Final = {int(code): call_error_class(code).__name__ for code in AbiErrorCode if code is not AbiErrorCode.OK}
_REQUEST_ID: Final = 1  # one at a time


def named(name: bytes) -> dict[str, Any]:
    """Return `id` of a contract, and `request`: the message that asks for its description; or an error."""
    try:
        contract_id = id_bytes(ContractRef.of(name.decode()).id)
    except ValueError as error:
        return _problem(AbiErrorCode.BAD_REQUEST, str(error))
    return {"id": contract_id, "request": encode(messages.Describe(request_id=_REQUEST_ID, contract=contract_id))}


def described(message: bytes, name: bytes) -> dict[str, Any]:
    """Read the answer to `request`: `source` of a caller's binding, and `sum` of what it was made of; or an error."""
    wanted = ContractRef.of(name.decode())
    reply = decode(messages.Reply, message)
    if reply.kind:
        return _problem(AbiErrorCode(reply.code), reply.reason)
    api = bytes(reply.body["api"])
    if not api:
        text = f"{wanted} is a raw contract, without an api.toml: its functions are called by number"
        return _problem(AbiErrorCode.BAD_REQUEST, text)
    version = reply.body["version"]
    assert wanted.version is not None
    if version and not Version.parse(version).satisfies(wanted.version):
        text = f"{wanted.name}: version {wanted.version} is required, {version} is registered"
        return _problem(AbiErrorCode.HOST_CONTRACT_VERSION_MISMATCH, text)
    try:
        contract = find_contract(parse(api.decode("utf-8", "replace"), "api.toml"), wanted.id)
    except ApiError as error:
        return _problem(AbiErrorCode.BAD_REQUEST, str(error))
    return {"source": caller_source(contract).encode(), "sum": zlib.crc32(api)}


def failed(message: bytes) -> dict[str, Any]:
    """Read a FAILURE."""
    failure = decode(messages.Failure, message)
    problem = _problem(AbiErrorCode(failure.code), failure.message, failure.kind, failure.began)
    return {"call_id": failure.call_id, **problem}


def _problem(code: AbiErrorCode, message: str, kind: str = "", began: str = "no") -> dict[str, Any]:
    return {
        "code": int(code),
        "message": message.encode("utf-8", "replace"),
        "kind": (kind or call_error_class(code).__name__).encode(),
        "began": began.encode(),
    }
