"""The arguments of a crash, for people: decoded by the contract's api.toml where it has one, and as a hex dump."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from luacell.cli.reproduction import INSTANCE_HEAD_SIZE
from luacell.protocol.messages import API_MODULE, CREATE, DESTROY, FETCH, FUNCTION_MASK, IN_INSTANCE

if TYPE_CHECKING:
    from luacell.client import Crash

DUMP_MAX: Final = 1024  # bytes that a dump shows: 64 lines, a screen or two

_LINE: Final = 16  # bytes


def decoded(crash: Crash) -> dict[str, Any] | None:
    """Return the arguments of a typed call by name, as JSON has them; None where they are mere bytes."""
    from luacell.cli.values import json_of
    from luacell.client.typed.unpacking import make_unpacker
    from luacell.client.typed.values import HostTypes
    from luacell.protocol.api import ApiError, find_contract, parse
    from luacell.protocol.api.layout import FunctionLayout
    from luacell.protocol.api.model import Field, Struct
    from luacell.protocol.errors import BadResult

    info, text, args = crash.info, crash.modules.get(API_MODULE), crash.args or b""
    fn_id = info.fn_id
    if fn_id >= IN_INSTANCE:  # where the contract is typed
        fn_id, args = fn_id & FUNCTION_MASK, args[INSTANCE_HEAD_SIZE:]
    if text is None or fn_id in (CREATE, DESTROY, FETCH) or info.args_kept < info.args_size:
        return None
    try:
        api = parse(text.decode("utf-8", "replace"), "api.toml")
        contract = find_contract(api, info.contract_id)
    except ApiError:
        return None
    if fn_id >= len(contract.functions):
        return None
    function = contract.functions[fn_id]
    if not function.params:
        return {}
    # Arguments lie as the fields of a struct would: one that no api.toml declares, for its name is no identifier.
    struct = Struct(f"arguments of {function.name}", tuple(Field(each.name, each.type) for each in function.params))
    types = HostTypes(replace(api, structs=(*api.structs, struct)))

    def refused(_: object) -> BadResult:
        return BadResult("these are not the arguments of the function", began="no")

    layout = FunctionLayout.of(function).args
    unpack = make_unpacker(struct, layout, types, struct.name, refused, views=False)
    try:
        found: dict[str, Any] = json_of(struct, unpack(args))
    except BadResult:
        return None
    return found


def dumped(data: bytes, size_max: int = DUMP_MAX) -> Iterator[str]:
    """Yield the lines of a hex dump: offset, bytes, and those of them that are printable ASCII."""
    for at in range(0, min(len(data), size_max), _LINE):
        line = data[at : min(at + _LINE, size_max)]
        shown = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in line)
        yield f"{at:08x}  {line.hex(' '):<{3 * _LINE - 1}}  {shown}"
    if len(data) > size_max:
        yield f"… {len(data) - size_max} bytes more; --output json has all"
