"""Calls of a contract by code in this process, which passes real pointers: polyplug's guests.

It reads arguments where guests have them, has the bridge make the call, and writes the result where guests want it.
What a wrong pointer does is not in its power: it is read as C would read it. How guests come to call is `polyplug`'s
business.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Final, Protocol

from luacell.client.description import Shared
from luacell.client.proxy import Call, Instance, Steps, drive
from luacell.client.typed.marshaller import Marshaller
from luacell.client.typed.pointers import (
    Pointer,
    gather,
    pointers_of_arguments,
    pointers_of_result,
    settle,
)
from luacell.protocol.api.layout import FunctionLayout
from luacell.protocol.api.model import FUNCTIONS_MAX
from luacell.protocol.errors import (
    CallError,
    DeadlineExceeded,
    FunctionNotAvailable,
    InvalidPointer,
    OutOfMemory,
    StaleHandle,
    WorkerCrashed,
)
from luacell.protocol.limits import PAYLOAD_MAX
from luacell.protocol.messages import CREATE

INSTANCES_MAX: Final = 100_000  # of one contract, alive at once; as many as a worker holds
DEFAULT_INSTANCE: Final = 0  # what a guest without an instance passes: NULL
_ONLY: Final = 1  # the handle of a singleton
_GONE: Final = "the instance is gone"  # how the worker's text begins

Sizes = Mapping[int, tuple[int, int]]  # by function id: bytes of args, bytes of out


class Target(Protocol):
    """A contract, as guests call it.

    Attributes:
        title: contract and version, for errors.
        function_count: function ids are below it.
        is_singleton: whether all guests share one instance.
    """

    title: str
    function_count: int
    is_singleton: bool

    def call(self, instance: int, fn_id: int, args: int, out: int) -> object:
        """Make a call.

        Args:
            instance: what `create` returned, or DEFAULT_INSTANCE.
            fn_id: u32.
            args: an address, or 0.
            out: an address, or 0; untouched when the call fails.

        Returns:
            What must be kept for as long as the result is used.

        Raises:
            CallError: there is no result.
            BridgeError: the bridge cannot be used.
        """

    def create(self) -> int:
        """Return the handle of a new instance, or 0 where there are too many."""

    def destroy(self, instance: int) -> None:
        """Forget an instance; one that is unknown is none."""


class RawTarget:
    """A raw contract: bytes go in and out as they are, and pointers in them mean nothing to it.

    Args:
        title: contract and version, for errors.
        contract_id: u64.
        call: of the bridge.
        sizes: of args and out by function id.
        timeout: seconds, or None.

    Raises:
        ValueError: a size or a function id is out of range.
    """

    is_singleton = True

    def __init__(self, title: str, contract_id: int, call: Call, sizes: Sizes, timeout: float | None) -> None:
        for fn_id, pair in sizes.items():
            if type(fn_id) is not int or not 0 <= fn_id < FUNCTIONS_MAX:
                raise ValueError(f"sizes: function id {fn_id!r} is no integer in 0..{FUNCTIONS_MAX - 1}")
            if len(pair) != 2 or any(type(size) is not int or not 0 <= size <= PAYLOAD_MAX for size in pair):
                raise ValueError(f"sizes: {pair!r} of function {fn_id} is no pair of sizes in 0..{PAYLOAD_MAX}")
        self.title = title
        self.function_count = max(sizes, default=-1) + 1
        self._contract_id = contract_id
        self._call = call
        self._sizes = dict(sizes)
        self._timeout = timeout

    def call(self, instance: int, fn_id: int, args: int, out: int) -> object:
        """Make a call; nothing needs to be kept."""
        pair = self._sizes.get(fn_id)
        if pair is None:
            raise FunctionNotAvailable(f"{self.title}: no sizes were given for function {fn_id}", began="no")
        args_size, out_size = pair
        _check_pointers(f"{self.title} function {fn_id}", args, args_size, out, out_size)
        payload = ctypes.string_at(args, args_size) if args_size else b""
        result = self._call(self._contract_id, fn_id, payload, out_size, self._timeout)
        if out_size:
            ctypes.memmove(out, result, out_size)
        return None

    def create(self) -> int:
        """Return the one handle that there is: raw contracts know no instances."""
        return _ONLY

    def destroy(self, instance: int) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class _Function:
    """How one function's values get from guests to a payload and back.

    Attributes:
        name: of the function.
        title: contract and function.
        marshaller: with results left as they came.
        check: raises BadResult for a result that is not of its type.
        args_size: bytes, 0 without parameters.
        args: the pointers in arguments.
        result: the pointers in the result.
    """

    name: str
    title: str
    marshaller: Marshaller
    check: Callable[[bytes], object]
    args_size: int
    args: tuple[Pointer, ...]
    result: tuple[Pointer, ...]


def _as_it_came(result: bytes | memoryview) -> bytes:
    return bytes(result)


class TypedTarget:
    """A typed contract, whose values are known, those behind pointers too.

    An instance that is lost with its worker is told once, by the error of a call, and made anew by the next call: a
    guest keeps its handle for as long as it lives.

    Args:
        shared: the contract.
        call: of the bridge.
        timeout: seconds, or None.
    """

    def __init__(self, shared: Shared, call: Call, timeout: float | None) -> None:
        contract = shared.description.contract
        self.title = str(contract)
        self.function_count = len(contract.functions)
        self.is_singleton = contract.singleton
        self._shared = shared
        self._functions = [self._function(name) for name in shared.description.functions]
        self._call = call
        self._timeout = timeout
        self._lock = threading.Lock()
        self._handles = count(_ONLY + 1)
        self._instances = {DEFAULT_INSTANCE: _Instance(shared, self._request)}
        if contract.singleton:
            self._instances[_ONLY] = self._instances[DEFAULT_INSTANCE]

    def _function(self, name: str) -> _Function:
        description = self._shared.description
        marshaller = description.functions[name]
        function = description.contract.functions[marshaller.fn_id]
        layout = FunctionLayout.of(function)
        return _Function(
            name=name,
            title=marshaller.title,
            marshaller=replace(marshaller, unpack=_as_it_came),
            check=marshaller.unpack_views,
            args_size=layout.args.size if layout.args else 0,
            args=pointers_of_arguments(function),
            result=pointers_of_result(function.result),
        )

    def _request(self, fn_id: int, args: bytes, out_size: int) -> bytes:
        return self._call(self._shared.description.contract_id, fn_id, args, out_size, self._timeout)

    def call(self, instance: int, fn_id: int, args: int, out: int) -> object:
        """Make a call; what the result points to is to be kept."""
        if fn_id >= self.function_count:
            text = f"{self.title} has {self.function_count} functions; there is no function {fn_id}"
            raise FunctionNotAvailable(text, began="no")
        function = self._functions[fn_id]
        out_size = function.marshaller.out_size
        _check_pointers(function.title, args, function.args_size, out, out_size)
        value = ctypes.string_at(args, function.args_size) if function.args_size else b""
        payload = gather(value, function.args, ctypes.string_at, function.title)
        result = self._run(instance, function, payload)
        function.check(result)
        if not out_size:
            return None
        if not function.result:
            ctypes.memmove(out, result, out_size)
            return None
        settled = settle(result, out_size, function.result, function.title)
        memory = (ctypes.c_char * len(settled.memory)).from_buffer(settled.memory)
        settled.place(ctypes.addressof(memory))
        ctypes.memmove(out, memory, out_size)
        return memory

    def _run(self, handle: int, function: _Function, payload: bytes) -> bytes:
        instance = self._instances.get(handle)
        if instance is None:
            raise StaleHandle(f"{function.title}: the instance was destroyed, or never made", began="no")
        current = instance.made()
        try:
            steps = Steps(self._shared, current).run(function.name, function.marshaller, payload)
            return bytes(drive(steps, self._request))
        except CallError as error:
            if _took_the_instance(error):
                instance.lose(current)
            raise

    def create(self) -> int:
        """Return the handle of a new instance; its worker makes it when it is first called."""
        if self.is_singleton:
            return _ONLY
        with self._lock:
            if len(self._instances) > INSTANCES_MAX:
                return DEFAULT_INSTANCE
            handle = next(self._handles)
            self._instances[handle] = _Instance(self._shared, self._request)
        return handle

    def destroy(self, instance: int) -> None:
        """Have an instance destroyed with the bridge's next call; the shared ones stay."""
        if self.is_singleton or instance == DEFAULT_INSTANCE:
            return
        with self._lock:
            gone = self._instances.pop(instance, None)
        if gone is not None:
            gone.drop()


class _Instance:
    """A guest's instance, which outlives those in workers that stand for it."""

    def __init__(self, shared: Shared, request: Callable[[int, bytes, int], bytes]) -> None:
        self._shared = shared
        self._request = request
        self._lock = threading.Lock()
        self._current: Instance | None = None

    def made(self) -> Instance:
        """Return the instance in the worker, made by the first thread that needs it.

        Raises:
            CallError: it could not be made.
        """
        with self._lock:
            if self._current is None:
                fresh = Instance(self._shared)
                if not self._shared.description.contract.singleton:
                    args = fresh.begin()
                    self._request(fresh.fn_id(CREATE), args, 0)
                    fresh.is_made = True
                self._current = fresh
            return self._current

    def lose(self, lost: Instance) -> None:
        """The instance in the worker is gone; another thread may have noticed it before."""
        with self._lock:
            if self._current is lost:
                self._current = None

    def drop(self) -> None:
        """Have the instance in the worker destroyed with the next call."""
        with self._lock:
            if self._current is not None:
                self._current.drop()
                self._current = None


def _took_the_instance(error: CallError) -> bool:
    if isinstance(error, StaleHandle):
        return error.message.startswith(_GONE)
    return isinstance(error, WorkerCrashed | DeadlineExceeded | OutOfMemory) and error.began != "no"


def _check_pointers(title: str, args: int, args_size: int, out: int, out_size: int) -> None:
    """Refuse NULL where there must be something.

    Raises:
        InvalidPointer: it is.
    """
    for what, address, size in (("args", args, args_size), ("out", out, out_size)):
        if size and not address:
            raise InvalidPointer(f"{title}: {what} of {size} bytes is NULL", began="no")
