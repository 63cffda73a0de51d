"""A typed contract run in this process: lupa with the binding and memory of ctypes, no luacell process at all."""

from __future__ import annotations

import ctypes
import signal
import struct
import time
from functools import partial
from typing import Any

from luacell.client.typed import HostTypes, Marshaller, compile_contract
from luacell.protocol.api import Contract, parse
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.headers import DONE, EXECUTE, HAS_ARGS, HAS_OUT, Done, Execute
from luacell.protocol.limits import MIB
from luacell.protocol.slots import PAYLOAD_OFFSET, SlotShape, write_generation
from luacell.worker.binding import binding_source
from luacell.worker.raw_binding import raw_binding_source
from luacell.worker.vm import Vm

IN_INSTANCE = 0x8000_0000
FETCH, CREATE, DESTROY = IN_INSTANCE | 0xFFFF, IN_INSTANCE | 0xFFFE, IN_INSTANCE | 0xFFFD
ARENA = 7
LIMIT_US = 60_000_000


class Failed(Exception):
    """A call was answered with a code."""

    def __init__(self, code: AbiErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class InProcess:
    """One contract of an api.toml, loaded into a VM of this process; out holds bytes that nobody wrote.

    Args:
        text: of the api.toml.
        source: the implementation.
        room: bytes of arguments and of results that a call has.
        fill: what lies in out before the first call.
    """

    def __init__(self, text: str, source: str, room: int = 4096, fill: int = 0xAA) -> None:
        api = parse(text, "api.toml")
        self.contract: Contract = api.host_contracts[0]
        self.types = HostTypes(api)
        self.functions: dict[str, Marshaller] = compile_contract(api, self.contract, self.types)
        self._shape = shape = SlotShape.for_payloads(room, room, 1)
        self._args = (ctypes.c_ubyte * shape.args_bytes)()
        self._out = (ctypes.c_ubyte * shape.out_bytes)()
        ctypes.memset(self._out, fill, shape.out_bytes)
        self._records = ctypes.create_string_buffer(EXECUTE.size)
        self._answers = ctypes.create_string_buffer(DONE.size)
        self.vm = Vm(ctypes.addressof(self._records), ctypes.addressof(self._answers))
        binding = binding_source(self.contract, api.enums)
        raw = partial(raw_binding_source, self.contract)
        self.problem, self.reason = self.vm.load(source.encode(), "@contract.lua", {}, 256 * MIB, binding, raw)
        self.map(ARENA)
        self._sequence = 0

    def map(self, arena: int) -> None:
        shape = self._shape
        addresses = ctypes.addressof(self._args), ctypes.addressof(self._out)
        self.vm.add_pair(arena, 0, *addresses, shape.count, shape.args_stride, shape.out_stride)

    def raw(self, fn_id: int, args: bytes, out_size: int, arena: int = ARENA) -> bytes:
        """Make a call with these bytes; return those that it wrote."""
        self._sequence += 1
        view = memoryview(self._args).cast("B")
        write_generation(view, 0, 1)
        view[PAYLOAD_OFFSET : PAYLOAD_OFFSET + len(args)] = args
        flags = (HAS_ARGS if args else 0) | (HAS_OUT if out_size else 0)
        record = Execute(
            sequence=self._sequence,
            deadline_ns=time.monotonic_ns() + LIMIT_US * 1000,
            fn_id=fn_id,
            limit_us=LIMIT_US,
            arena=arena,
            slot=0,
            generation=1,
            flags=flags,
            args_size=len(args),
            out_size=out_size,
        )
        EXECUTE.pack_into(self._records, 0, *record)
        before = signal.getitimer(signal.ITIMER_REAL)
        self.vm.execute(0, 0)
        self.vm.disarm()
        signal.setitimer(signal.ITIMER_REAL, *before)  # the test's own limit
        done = Done._make(DONE.unpack(self._answers))
        out = memoryview(self._out).cast("B")[PAYLOAD_OFFSET:]
        if done.code:
            raise Failed(AbiErrorCode(done.code), bytes(out[: done.error_size]).decode("utf-8", "replace"))
        assert done.out_size <= out_size
        return bytes(out[: done.out_size])

    def bytes_of(self, name: str, *args: Any) -> bytes:
        """Call a function; return its result as it lies in memory."""
        marshaller = self.functions[name]
        room = self._shape.out_stride - PAYLOAD_OFFSET if marshaller.out_varies else marshaller.out_size
        return self.raw(marshaller.fn_id, marshaller.pack(args), room)

    def call(self, name: str, *args: Any) -> Any:
        """Call a function; return its value."""
        return self.functions[name].unpack(self.bytes_of(name, *args))


def head(number: int) -> bytes:
    return struct.pack("<QQ", number, 0)
