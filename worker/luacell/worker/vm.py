"""One LuaJIT VM: the only place that knows lupa.

It loads the prelude and one contract and runs calls; it reads no socket. lupa ships no types, so its values are fenced
in here.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, Final

from luacell.protocol.confinement import DEFAULT, UNTRUSTED
from luacell.worker import nested

# C modules of the system (lua-cjson, lpeg) resolve LuaJIT's symbols from the process: they must be global.
sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
from lupa import luajit21 as lupa  # noqa: E402

_PRELUDE: Final = {
    name: files("luacell.worker").joinpath("lua", name).read_bytes()
    for name in ("execute.lua", "load.lua", "log.lua", "nested.lua", "serve.lua", "typed.lua", "untrusted.lua")
}
_ENCODING: Final = "latin-1"  # every byte string survives the way through lupa

OutOfLuaMemory: Final[type[Exception]] = lupa.LuaMemoryError
LuaFailure: Final[type[Exception]] = lupa.LuaError


class Vm:
    """A VM for one contract.

    Args:
        records_address, answers_address: buffers for EXECUTE and DONE records, owned by the caller, which outlive it.
    """

    def __init__(self, records_address: int, answers_address: int) -> None:
        self._lua: Any = lupa.LuaRuntime(
            encoding=_ENCODING,
            register_eval=False,
            register_builtins=False,
            attribute_filter=_no_attributes,
            max_memory=0,
        )
        self._runtime: Any = self._chunk("execute.lua")
        self._chunk("log.lua", self._runtime)
        self._load: Any = self._chunk("load.lua", self._runtime)
        self._runtime.set_buffers(records_address, answers_address)
        self.execute: Any = self._runtime.execute
        self.arm_for: Any = self._runtime.arm_for
        self.disarm: Any = self._runtime.disarm
        self.add_pair: Any = self._runtime.add_pair
        self.remove_pair: Any = self._runtime.remove_pair
        self.forget: Any = self._runtime.forget
        self.set_panic: Any = self._runtime.set_panic
        self.limit_memory: Any = self._runtime.limit_memory
        self.limit_wear: Any = self._runtime.limit_wear
        self._typed: Any = None

    def make_loop(self, *arguments: object) -> Any:
        """Return the loop of serve.lua: a table with `serve`; see there for the arguments."""
        loop = self._chunk("serve.lua", self._runtime, *arguments)
        typed = self._chunk("typed.lua", self._runtime)
        asked = (self._asked(nested.named), self._asked(nested.described), self._asked(nested.failed))
        self._chunk("nested.lua", self._runtime, loop, typed, *asked, self._lua.table_from(nested.KINDS))
        return loop

    def _asked(self, function: Callable[..., Mapping[str, Any]]) -> Callable[..., Any]:
        """Return a function of Python as Lua can call it."""

        def answer(*texts: str) -> Any:
            return self._lua.table_from(function(*(text.encode(_ENCODING) for text in texts)))

        return answer

    def load(
        self,
        source: bytes,
        chunk_name: str,
        modules: Mapping[str, bytes],
        memory: int,
        binding: str | None = None,
        raw_binding: Callable[[], str] | None = None,
        *,
        sandbox: str = DEFAULT,
        c_modules: Sequence[str] = (),
    ) -> tuple[str, str]:
        """Load the contract.

        Args:
            source: the chunk.
            chunk_name: in Lua's form.
            modules: by `require` name.
            memory: bytes the Lua heap may use from now on.
            binding: of a typed contract, as `binding_source` makes it; None for a raw one.
            raw_binding: makes the one that is needed where the implementation is a raw function; such a function works
                on memory, so there is none at `untrusted`.
            sandbox: the level: with `default`, `require` looks into the system's directories; with the others it knows
                the contract's own modules only, with `hardened` C modules too; with `untrusted` there is no FFI.
            c_modules: paths of those C modules, which are loaded.

        Returns:
            "" when it is ready, else "type" or "load"; and the reason.

        Raises:
            OutOfLuaMemory: there is no more, of its own or of the process's.
        """
        sources = self._lua.table_from({name.encode(): module for name, module in modules.items()})
        own_only = None if sandbox == DEFAULT else self._lua.table_from(map(str.encode, c_modules))
        strip = self._chunk("untrusted.lua", self._runtime) if sandbox == UNTRUSTED else None
        raw = None if raw_binding is None or strip is not None else lambda: raw_binding().encode()
        typed = self._typed = None if binding is None else self._chunk("typed.lua", self._runtime)
        if typed is not None:
            typed.limit_memory(memory)
        self._lua.set_max_memory(memory)
        try:
            text = None if binding is None else binding.encode()
            problem, reason = self._load(source, chunk_name.encode(), sources, typed, text, raw, own_only, strip)
        except LuaFailure as error:
            return "load", f"an error escaped the loader: {error}"
        if problem == "memory":
            raise OutOfLuaMemory(reason)
        return problem, reason.encode(_ENCODING).decode("utf-8", "replace")

    @property
    def saves(self) -> bool:
        """Whether the contract, once it has loaded, is a singleton that hands on its state."""
        return self._typed is not None and bool(self._typed.saves())

    @property
    def restores(self) -> bool:
        """Whether it takes up another's state."""
        return self._typed is not None and bool(self._typed.restores())

    @property
    def heap_left(self) -> int:
        """Bytes that the Lua heap may still take."""
        left: int = self._lua.get_max_memory() - self._lua.get_memory_used()
        return left

    def collect(self) -> None:
        """Free what the contract does not use any more; what its finalizers raise is nobody's."""
        with contextlib.suppress(OutOfLuaMemory, LuaFailure):
            self._lua.gccollect()

    def save(self, size_max: int) -> tuple[bytes, str]:
        """Return the state of the singleton, and "", or why there is none."""
        try:
            state, problem = self._typed.save(size_max)
        except OutOfLuaMemory:
            state, problem = None, "save() used more memory than the contract may have"
        return (state or "").encode(_ENCODING), problem.encode(_ENCODING).decode("utf-8", "replace")

    def restore(self, state: bytes) -> str:
        """Have the singleton take up state; return "", or why it must not be used."""
        try:
            problem: str = self._typed.restore(state)
        except OutOfLuaMemory:
            return "restore() used more memory than the contract may have"
        return problem.encode(_ENCODING).decode("utf-8", "replace")

    def _chunk(self, name: str, *arguments: object) -> Any:
        source = _PRELUDE[name].decode(_ENCODING)
        return self._lua.compile(source, name=f"={name}".encode())(*arguments)


def _no_attributes(obj: object, name: object, is_setting: bool) -> object:
    """Refuse Lua every attribute of every Python object."""
    raise AttributeError("contracts see no Python objects")
