"""Proxies of typed contracts: objects whose methods are the contract's functions.

A proxy packs arguments, has its bridge make the call, and unpacks the result. It has an instance of its own in the
contract's worker, made when it is first called, unless the contract is a singleton; the instance goes with the proxy.

    args     16 bytes that name the instance, then the arguments as they lie in memory
    result   at most as large as the room it is given; a larger one is kept by the worker and fetched
"""

from __future__ import annotations

import inspect
import re
import secrets
import struct
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Final

from luacell.client.description import DroppedInstance, Shared
from luacell.client.typed.marshaller import Marshaller
from luacell.protocol.api import Function
from luacell.protocol.api.tables import meant
from luacell.protocol.errors import ArgumentTypeError, BufferTooSmall, CallError, StaleHandle
from luacell.protocol.limits import PAYLOAD_MAX
from luacell.protocol.messages import CREATE, DESTROY, FETCH, IN_INSTANCE, SEAT_SHIFT

CREATIONS_MAX: Final = (
    3  # of one instance that is lost before it was used; contracts are replaced ten times a second at most
)

_HEAD: Final = struct.Struct("<QQ")
_TOKEN: Final = struct.Struct("<Q")
_NUMBER_BITS: Final = 52  # Lua keeps them as numbers
_GONE: Final = "the instance is gone"
_KEPT: Final = re.compile(r"result of ([0-9]{1,12}) bytes is kept as ([0-9]{1,19})")

Call = Callable[[int, int, bytes, int, float | None], bytes]  # contract id, function id, args, out size, timeout
AsyncCall = Callable[[int, int, bytes, int, float | None], Awaitable[bytes]]


class Instance:
    """A proxy's instance in a worker of the contract.

    Attributes:
        number: that names it there, among those of this host.
        head: what names it at the head of arguments.
        is_made: whether the worker has said that it exists.
        is_used: whether a call may have changed its state.
    """

    def __init__(self, shared: Shared) -> None:
        self.number = secrets.randbits(_NUMBER_BITS) | 1  # 0 is the default one, of raw calls
        self.head = _HEAD.pack(self.number, 0)
        self.is_made = False
        self.is_used = False
        self._seat: int | None = None  # set when it may exist
        self._shared = shared
        self._beginning = threading.Lock()

    def fn_id(self, function: int) -> int:
        """Return the function id by which its worker is found, and in it a function or a deed."""
        return fn_id_in(self._seat or 0, function)

    def begin(self) -> bytes:
        """Return the arguments that ask for it; from now on it may exist, in the same place whoever asks."""
        with self._beginning:
            if self._seat is None:
                self._seat = self._shared.take_seat()
        return self.head

    def drop(self) -> None:
        """Have it destroyed by whoever next uses the bridge."""
        if self._seat is not None:
            self._shared.dropped.add(self._shared, self._seat, self.number)


def fn_id_in(seat: int, function: int) -> int:
    """Return the function id of a function, or a deed, for an instance in a seat."""
    return IN_INSTANCE | seat << SEAT_SHIFT | function


def destruction(dropped: list[DroppedInstance]) -> tuple[int, int, bytes]:
    """Return the call that destroys instances of one contract and seat: contract id, function id, arguments."""
    shared, seat, _ = dropped[0]
    numbers = [number for _, _, number in dropped]
    for _ in numbers:
        shared.leave_seat(seat)
    return shared.description.contract_id, fn_id_in(seat, DESTROY), struct.pack(f"<{len(numbers)}Q", *numbers)


class Steps:
    """The calls that one typed call takes, for a bridge of either kind.

    Args:
        shared: of its contract.
        instance: of its caller.
        views: whether buffers of the result become memoryviews into it.
    """

    def __init__(self, shared: Shared, instance: Instance, *, views: bool = False) -> None:
        self._shared = shared
        self._instance = instance
        self._views = views

    def run(self, name: str, marshaller: Marshaller, payload: bytes) -> Any:
        """Yield (function id, args, out size), and be sent the bytes that came; `StopIteration` carries the value."""
        shared, instance = self._shared, self._instance
        room, has_instance = shared.room(marshaller, name), not shared.description.contract.singleton
        fn_id, args, is_new, creations = marshaller.fn_id, payload, False, 0
        while True:
            if has_instance:
                is_new = not instance.is_made
                if is_new:  # callers at once may each do this: it is made once
                    creations += 1
                    head = instance.begin()  # before its function ids are asked for
                    yield instance.fn_id(CREATE), head, 0
                    instance.is_made = True
                else:
                    instance.is_used = True
                fn_id, args = instance.fn_id(marshaller.fn_id), instance.head + payload
            try:
                result = yield fn_id, args, room
            except BufferTooSmall as error:
                instance.is_used = True
                match = _KEPT.fullmatch(error.message)
                if match is None or int(match[1]) > PAYLOAD_MAX:
                    raise
                shared.learn(marshaller, name, int(match[1]))
                fetch_id = instance.fn_id(FETCH) if has_instance else fn_id_in(0, FETCH)
                result = yield fetch_id, _TOKEN.pack(int(match[2])), int(match[1])
            except StaleHandle as error:
                is_lost = error.message.startswith(_GONE)
                if not is_new or not is_lost or instance.is_used or creations == CREATIONS_MAX:
                    raise
                instance.is_made = (
                    False  # its worker was replaced before anybody had used it: there was nothing to lose
                )
                continue
            instance.is_used = True
            return marshaller.unpack_views(result) if self._views else marshaller.unpack(result)


def drive(steps: Any, call: Callable[[int, bytes, int], bytes]) -> Any:
    """Make the calls of a typed call, one after another."""
    try:
        request = next(steps)
        while True:
            try:
                result = call(*request)
            except CallError as error:
                request = steps.throw(error)
            else:
                request = steps.send(result)
    except StopIteration as done:
        return done.value


async def _drive_async(steps: Any, call: Callable[[int, bytes, int], Awaitable[bytes]]) -> Any:
    try:
        request = next(steps)
        while True:
            try:
                result = await call(*request)
            except CallError as error:
                request = steps.throw(error)
            else:
                request = steps.send(result)
    except StopIteration as done:
        return done.value


def make_proxy(shared: Shared, call: Call) -> Any:
    """Return a proxy whose methods wait for their results."""
    return _proxy_class(shared, is_async=False)(shared, call)


def make_async_proxy(shared: Shared, call: AsyncCall) -> Any:
    """Return a proxy whose methods are awaited."""
    return _proxy_class(shared, is_async=True)(shared, call)


class _Proxy:
    """What all proxies have; their classes add a method for each function."""

    def __init__(
        self,
        shared: Shared,
        call: Any,
        timeout: float | None = None,
        instance: Instance | None = None,
        *,
        views: bool = False,
    ) -> None:
        self.__luacell_shared__ = shared
        self.__luacell_call__ = call
        self.__luacell_timeout__ = timeout
        self.__luacell_views__ = views
        self.__luacell_instance__ = Instance(shared) if instance is None else instance
        self.__luacell_keeps__: Any = None  # the proxy that this one was made from: its instance must live as long
        if instance is None:
            weakref.finalize(self, self.__luacell_instance__.drop).atexit = False

    def with_options(self, *, timeout: float | None = None, views: bool = False) -> Any:
        """Return a proxy of the same instance with other options; those that are not given are the usual ones.

        Args:
            timeout: of its calls, in seconds; None is the contract's deadline.
            views: whether buffers of results are memoryviews into what came, without a copy of each, in place of bytes.
        """
        shared, call, instance = self.__luacell_shared__, self.__luacell_call__, self.__luacell_instance__
        other = type(self)(shared, call, timeout, instance, views=views)
        other.__luacell_keeps__ = self
        return other

    def __dir__(self) -> list[str]:
        return sorted(self.__luacell_shared__.description.functions)

    def __repr__(self) -> str:
        contract = self.__luacell_shared__.description.contract
        return f"<{contract.name}@{contract.version}>"


def _proxy_class(shared: Shared, *, is_async: bool) -> type[Any]:
    description = shared.description
    methods = {
        name: (_async_method if is_async else _method)(name, marshaller)
        for name, marshaller in description.functions.items()
    }
    for function in description.contract.functions:
        method = methods[function.name]
        method.__name__ = function.name
        method.__doc__ = _docstring(function)
        parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
        parameters += [
            inspect.Parameter(
                each.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=description.types.of(each.type)
            )
            for each in function.params
        ]
        result = description.types.of(function.result)
        method.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    name = description.contract.name.rpartition(".")[2]
    return type(f"{name}_proxy", (_Proxy,), {**methods, "__doc__": description.contract.docs or None})


def _docstring(function: Function) -> str | None:
    """Return what the description says of a function, its parameters and its result; None where it says nothing."""
    params = "\n".join(f"    {param.name}: {param.docs}" for param in function.params if param.docs)
    parts = (
        function.docs,
        params and f"Args:\n{params}",
        function.result_docs and f"Returns:\n    {function.result_docs}",
    )
    return "\n\n".join(filter(None, parts)) or None


def _arguments(signature: list[str], given: tuple[Any, ...], named: dict[str, Any], title: str) -> tuple[Any, ...]:
    if not named:
        return given
    rest = signature[len(given) :]
    for name in named:
        if name in signature and name not in rest:
            raise ArgumentTypeError(title, "", f"got {name} twice, by place and by name")
        if name not in rest:
            raise ArgumentTypeError(title, "", f"has no parameter {name!r}{meant(name, signature or ('none',))}")
    missing = [name for name in rest if name not in named]
    if missing:
        raise ArgumentTypeError(title, "", f"lacks {', '.join(missing)}; it takes {', '.join(signature)}")
    return (*given, *(named[name] for name in rest))


def _method(name: str, marshaller: Marshaller) -> Callable[..., Any]:
    def method(self: _Proxy, /, *given: Any, **named: Any) -> Any:
        shared = self.__luacell_shared__
        names = [each.name for each in shared.description.contract.functions[marshaller.fn_id].params] if named else []
        payload = marshaller.pack(_arguments(names, given, named, marshaller.title))
        contract_id, call, timeout = shared.description.contract_id, self.__luacell_call__, self.__luacell_timeout__
        views = self.__luacell_views__
        steps = Steps(shared, self.__luacell_instance__, views=views).run(name, marshaller, payload)
        return drive(steps, lambda fn_id, args, out_size: call(contract_id, fn_id, args, out_size, timeout))

    return method


def _async_method(name: str, marshaller: Marshaller) -> Callable[..., Any]:
    async def method(self: _Proxy, /, *given: Any, **named: Any) -> Any:
        shared = self.__luacell_shared__
        names = [each.name for each in shared.description.contract.functions[marshaller.fn_id].params] if named else []
        payload = marshaller.pack(_arguments(names, given, named, marshaller.title))
        contract_id, call, timeout = shared.description.contract_id, self.__luacell_call__, self.__luacell_timeout__
        views = self.__luacell_views__
        steps = Steps(shared, self.__luacell_instance__, views=views).run(name, marshaller, payload)
        return await _drive_async(
            steps, lambda fn_id, args, out_size: call(contract_id, fn_id, args, out_size, timeout)
        )

    return method
