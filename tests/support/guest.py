"""A plugin's side of polyplug's ABI: values as C has them, and contracts found and called as plugins do.

Nothing here uses luacell's layouts or packers, which it is to check.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any, Final

from luacell.protocol.api import Api, Array, Buffer, Enum, Ptr, Scalar, StringView, Struct, Void
from luacell.protocol.identity import ContractRef

_CTYPES: Final = {
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "f32": ctypes.c_float,
    "f64": ctypes.c_double,
    "bool": ctypes.c_bool,
}


class _View(ctypes.Structure):
    _fields_ = (("ptr", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Buffer(ctypes.Structure):
    _fields_ = (("ptr", ctypes.c_void_p), ("len", ctypes.c_size_t), ("cap", ctypes.c_size_t))


@functools.cache
def c_type(type_: Any) -> Any:
    if isinstance(type_, Struct):
        return structure(tuple((field.name, field.type) for field in type_.fields))
    if isinstance(type_, Enum):
        return _CTYPES[type_.repr.name]
    if isinstance(type_, Ptr):
        return ctypes.c_uint64
    if isinstance(type_, Scalar):
        return _CTYPES[type_.name]
    return _Buffer if isinstance(type_, Buffer) else _View


def structure(members: tuple[tuple[str, Any], ...]) -> Any:
    return type("Members", (ctypes.Structure,), {"_fields_": [(name, c_type(item)) for name, item in members]})


def to_c(type_: Any, value: Any, keep: list[Any]) -> Any:
    """Return a value as C has it; `keep` gets what it points to."""
    made = c_type(type_)
    if isinstance(type_, Struct):
        return made(*(to_c(field.type, value[field.name], keep) for field in type_.fields))
    if isinstance(type_, StringView | Buffer):
        data = value.encode() if isinstance(value, str) else value
        keep.append(ctypes.create_string_buffer(data, len(data) or 1))
        words = (ctypes.addressof(keep[-1]) if data else None, len(data))
        return made(*words, len(data)) if isinstance(type_, Buffer) else made(*words)
    if isinstance(type_, Array):
        items = (c_type(type_.item) * len(value))(*(to_c(type_.item, item, keep) for item in value))
        keep.append(items)
        return made(ctypes.addressof(items) if value else None, len(value))
    return made(value)


def from_c(type_: Any, value: Any) -> Any:
    """Read a value where C has it."""
    if isinstance(type_, Struct):
        return {field.name: from_c(field.type, getattr(value, field.name)) for field in type_.fields}
    if isinstance(type_, StringView | Buffer):
        assert value.ptr, "an empty string has an address, too"
        data = ctypes.string_at(value.ptr, value.len)
        return data.decode() if isinstance(type_, StringView) else data
    if isinstance(type_, Array):
        assert value.ptr % 8 == 0
        items = (c_type(type_.item) * value.len).from_address(value.ptr)
        return [from_c(type_.item, item) for item in items]
    return value.value if hasattr(value, "value") else value


@dataclass(frozen=True)
class Answer:
    code: int
    text: str


class Guest:
    """A plugin that uses one contract, with an instance of its own."""

    def __init__(self, runtime: Any, contract: str, api: Api | None = None, min_version: int = 0) -> None:
        from polyplug_abi import abi

        self._abi = abi
        ref = ContractRef.of(contract)
        host = abi.HostApi.from_address(runtime.host)
        address = host.resolve_host_contract_interface(runtime.host, ref.id, min_version)
        assert address, f"the runtime has no {contract}"
        self.interface = abi.HostContractInterface.from_address(address)
        self.instance = host.get_host_contract(runtime.host, ref.id, min_version)
        self._contract = next((each for each in api.host_contracts if str(each) == contract), None) if api else None

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of a typed contract; return its result, or an Answer where it failed."""
        assert self._contract is not None
        function = self._contract.function(name)
        assert function is not None
        keep: list[Any] = []
        values = [to_c(param.type, value, keep) for param, value in zip(function.params, args, strict=True)]
        packed = values[0] if len(values) == 1 else None
        if len(values) > 1:
            packed = structure(tuple((param.name, param.type) for param in function.params))(*values)
        out = None if isinstance(function.result, Void) else c_type(function.result)()
        answer = self.call_raw(function.id, packed, out)
        if answer.code:
            return answer
        return None if out is None else from_c(function.result, out)

    def call_raw(self, fn_id: int, args: Any, out: Any) -> Answer:
        """Call a function by its id, the way the interface asks for."""
        error = self._abi.AbiError(0xDEAD)
        places = (None if args is None else ctypes.addressof(args), None if out is None else ctypes.addressof(out))
        dispatch = self.interface.dispatch
        if self.interface.dispatch_type == self._abi.DispatchType.VirtualMachine:
            instance = self._abi.GuestContractInstance(self.instance.data, self.interface.contract_id)
            dispatch.vm.call(dispatch.vm.loader_data, instance, fn_id, *places, None, ctypes.addressof(error))
        else:
            assert fn_id < dispatch.native.function_count
            kind = ctypes.CFUNCTYPE(None, self._abi.HostContractInstance, *[ctypes.c_void_p] * 3)
            table = (ctypes.c_void_p * dispatch.native.function_count).from_address(dispatch.native.functions)
            kind(table[fn_id])(self.instance, *places, ctypes.addressof(error))
        text = ctypes.string_at(error.message.ptr, error.message.len).decode() if error.message.len else ""
        return Answer(error.code, text)

    def leave(self) -> None:
        """Destroy the instance."""
        self.interface.destroy_instance(ctypes.addressof(self.interface), self.instance)


# A plugin in C, as polyplug's native loader loads it. Its threads, which Python did not start, each get an instance of
# a contract from the runtime and call fn 0, StringView -> StringView, in step with the others; they look at what they
# were lent only after all have called.
THREADS_C: Final = r"""
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { THREADS_MAX = 64, NATIVE = 0 };

typedef struct { const uint8_t *ptr; size_t len; } view;
typedef struct { uint32_t code; view message; } abi_error;
typedef struct { void *data; } instance;
typedef struct { void *data; uint64_t contract_id; } vm_instance;
typedef struct { void *data; } loader_data;
typedef void (*native_call)(instance, const void *, void *, abi_error *);
typedef void (*vm_call)(loader_data, vm_instance, uint32_t, const void *, void *, void *, abi_error *);

typedef struct interface {
  uint64_t contract_id;
  uint32_t version[3];
  bool singleton;
  uint32_t dispatch_type;
  void *runtime, *user_data;
  void (*create)(const struct interface *, const void *, instance *);
  void (*destroy)(const struct interface *, instance);
  union {
    struct { uint32_t count; native_call *functions; } native;
    struct { vm_call call; loader_data data; } vm;
  };
} interface;

typedef struct host {
  void *before[7];
  instance (*get_host_contract)(const struct host *, uint64_t, uint32_t);
  const interface *(*resolve_host_contract_interface)(const struct host *, uint64_t, uint32_t);
} host;

static pthread_barrier_t step;
static const host *api; /* given when the plugin is loaded */
static uint64_t contract;
static int rounds;

static void call(const interface *found, instance self, view *args, view *out, abi_error *error) {
  if (found->dispatch_type == NATIVE) {
    found->native.functions[0](self, args, out, error);
  } else {
    vm_instance passed = { self.data, contract };
    found->vm.call(found->vm.data, passed, 0, args, out, NULL, error);
  }
}

static void *run(void *number) {
  intptr_t wrong = 0;
  const interface *found = api->resolve_host_contract_interface(api, contract, 0);
  instance self = api->get_host_contract(api, contract, 0);
  for (int round = 0; round < rounds; round++) {
    char text[64], wanted[64];
    snprintf(text, sizeof text, "thread %d round %d", (int)(intptr_t)number, round);
    snprintf(wanted, sizeof wanted, "THREAD %d ROUND %d", (int)(intptr_t)number, round);
    view args = { (const uint8_t *)text, strlen(text) }, out = { 0, 0 };
    abi_error error = { 57005, { 0, 0 } };
    call(found, self, &args, &out, &error);
    pthread_barrier_wait(&step);
    if (error.code != 0 || out.len != strlen(wanted) || memcmp(out.ptr, wanted, out.len)) wrong++;
    pthread_barrier_wait(&step);
  }
  found->destroy(found, self);
  return (void *)wrong;
}

uint32_t polyplug_abi_version(void) { return 1; }

abi_error polyplug_init(const host *given, const void *context) {
  api = given;
  return (abi_error){ 0, { 0, 0 } };
}

int run_threads(uint64_t contract_id, int threads, int times) {
  pthread_t ids[THREADS_MAX];
  intptr_t wrong = 0;
  contract = contract_id;
  rounds = times;
  pthread_barrier_init(&step, 0, threads);
  for (intptr_t index = 0; index < threads; index++)
    if (pthread_create(&ids[index], 0, run, (void *)index)) return -1;
  for (int index = 0; index < threads; index++) {
    void *result;
    pthread_join(ids[index], &result);
    wrong += (intptr_t)result;
  }
  pthread_barrier_destroy(&step);
  return (int)wrong;
}
"""
