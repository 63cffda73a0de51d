"""Everything that a host needs to move the values of one function, made when its contract is loaded.

It moves values between Python and bytes; where the bytes go is the affair of a bridge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luacell.client.typed.packing import make_packer
from luacell.client.typed.refusals import ArgumentCheck, ResultCheck
from luacell.client.typed.unpacking import make_unpacker
from luacell.client.typed.values import HostTypes
from luacell.protocol.api.layout import FunctionLayout
from luacell.protocol.api.model import Api, Array, Buffer, Contract, Function, ResultType, StringView, Struct


@dataclass(frozen=True, slots=True)
class Marshaller:
    """The packers of one function.

    Attributes:
        title: contract and function, as errors name them.
        fn_id: of the function.
        pack: from a tuple of arguments to the payload, b"" without parameters; raises an ArgumentError, or TooLarge.
        unpack: from a result's payload to its value; raises BadResult.
        unpack_views: the same, but buffers are memoryviews into the payload, good for as long as that is.
        out_size: bytes of the result without what its strings, buffers and arrays hold; 0 for Void.
        out_varies: whether a result may have such bytes.
    """

    title: str
    fn_id: int
    pack: Callable[[tuple[Any, ...]], bytes]
    unpack: Callable[[bytes | memoryview], Any]
    unpack_views: Callable[[bytes | memoryview], Any]
    out_size: int
    out_varies: bool


def compile_function(api: Api, contract: Contract, function: Function, types: HostTypes | None = None) -> Marshaller:
    """Write and compile the packers of a function.

    Args:
        api: which declares it.
        contract: which has it.
        function: itself.
        types: the Python types of `api`; whoever compiles several functions makes them once, or each function
            returns structs of its own.
    """
    types = types or HostTypes(api)
    title = f"{contract}.{function.name}"
    layout = FunctionLayout.of(function)
    arguments, result = ArgumentCheck(function, types, title), ResultCheck(function.result, title)
    unpack, unpack_views = (
        make_unpacker(function.result, layout.result, types, title, result.explain, views=views)
        for views in (False, True)
    )
    return Marshaller(
        title=title,
        fn_id=function.id,
        pack=make_packer(function, layout.args, types, title, arguments.explain),
        unpack=unpack,
        unpack_views=unpack_views,
        out_size=layout.result.size if layout.result else 0,
        out_varies=_varies(function.result),
    )


def compile_contract(api: Api, contract: Contract, types: HostTypes | None = None) -> dict[str, Marshaller]:
    """Compile all functions of a contract, by name, with the same Python types."""
    types = types or HostTypes(api)
    return {function.name: compile_function(api, contract, function, types) for function in contract.functions}


def _varies(type_: ResultType) -> bool:
    if isinstance(type_, Struct):
        return any(_varies(field.type) for field in type_.fields)
    return isinstance(type_, (StringView, Buffer, Array))
