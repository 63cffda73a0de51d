"""The calls that proxies make: a worker made by hand answers them, no process is there."""

from __future__ import annotations

import asyncio
import gc
import inspect
import struct
from typing import Any

import pytest

from luacell.client import HostContractId
from luacell.client.description import DROPPED_AT_ONCE, TypedContracts
from luacell.client.proxy import CREATIONS_MAX, destruction, fn_id_in, make_async_proxy, make_proxy
from luacell.protocol import messages
from luacell.protocol.errors import (
    AbiErrorCode,
    ArgumentTypeError,
    BufferTooSmall,
    CallError,
    HostContractCallFailed,
    StaleHandle,
)
from luacell.protocol.limits import PAYLOAD_MAX
from luacell.protocol.messages import FUNCTION_MASK, IN_INSTANCE, SEAT_SHIFT
from tests.support.apis import SVC

FETCH, CREATE, DESTROY = (fn_id_in(0, deed) for deed in (messages.FETCH, messages.CREATE, messages.DESTROY))
SVC_ID = int(HostContractId("host.svc", 1))
TEXT = "y" * 5000
RESULT = struct.pack("<QQ", 16, len(TEXT)) + TEXT.encode()


class Worker:
    """Remembers calls, and answers them as it is told."""

    def __init__(self, text: str = SVC, workers: int = 1) -> None:
        self.typed = TypedContracts()
        self.shared = self.typed.of(SVC_ID, {"api": text.encode(), "workers": workers})
        self.calls: list[tuple[int, bytes, int, float | None]] = []
        self.fails: dict[int, BaseException] = {}
        self.always: dict[int, BaseException] = {}
        self.kept = ""

    def __call__(self, contract_id: int, fn_id: int, args: bytes, out_size: int, timeout: float | None) -> bytes:
        assert contract_id == SVC_ID
        self.calls.append((fn_id, args, out_size, timeout))
        if fn_id in self.always:
            raise self.always[fn_id]
        if fn_id in self.fails:
            raise self.fails.pop(fn_id)
        if fn_id & FUNCTION_MASK == messages.FETCH:
            return RESULT
        if fn_id & 0xFF == 1:
            if self.kept and out_size < len(RESULT):
                raise failed(BufferTooSmall, self.kept)
            return RESULT
        return struct.pack("<d", 7.5) if fn_id & 0xFF == 0 else b""

    @property
    def ids(self) -> list[int]:
        return [call[0] for call in self.calls]


def failed(kind: type[CallError], text: str) -> CallError:
    return kind(text, code=AbiErrorCode.BUFFER_TOO_SMALL if kind is BufferTooSmall else AbiErrorCode(102), began="yes")


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_instance_is_made_once_and_named_in_every_call(worker: Worker) -> None:
    proxy = make_proxy(worker.shared, worker)
    assert [proxy.scale(1, 1.0, True), proxy.scale(1, v=1.0, on=True)] == [7.5, 7.5]
    assert worker.ids == [CREATE, IN_INSTANCE, IN_INSTANCE]
    number = worker.calls[0][1][:8]
    assert all(args.startswith(number) for _, args, _, _ in worker.calls)
    assert [out_size for _, _, out_size, _ in worker.calls] == [0, 8, 8]


def test_creation_that_failed_is_tried_again(worker: Worker) -> None:
    proxy = make_proxy(worker.shared, worker)
    worker.fails[CREATE] = failed(HostContractCallFailed, "no")
    with pytest.raises(HostContractCallFailed):
        proxy.scale(1, 1.0, True)
    assert proxy.scale(1, 1.0, True) == 7.5
    assert worker.ids == [CREATE, CREATE, IN_INSTANCE]
    assert worker.calls[0][1] == worker.calls[1][1]  # of the same number: it is made once


def test_singleton_needs_no_instance() -> None:
    worker = Worker(SVC.replace('version = "1.3.0"', 'version = "1.3.0"\nsingleton = true'))
    assert make_proxy(worker.shared, worker).scale(1, 1.0, True) == 7.5
    assert worker.ids == [0]
    assert len(worker.calls[0][1]) == 24


def test_dropped_instances_are_to_be_destroyed_in_batches(worker: Worker) -> None:
    proxies = [make_proxy(worker.shared, worker) for _ in range(DROPPED_AT_ONCE + 1)]
    for proxy in proxies:
        proxy.scale(1, 1.0, True)
    made = {args[:8] for fn_id, args, _, _ in worker.calls if fn_id == CREATE}
    make_proxy(worker.shared, worker)  # never called: nothing to destroy
    proxies.clear()
    del proxy
    gc.collect()
    dropped = worker.typed.dropped
    dropped.put_back(dropped.take())
    first = dropped.take()
    calls = [destruction(first), destruction(dropped.take())]
    assert dropped.take() == []
    assert {call[:2] for call in calls} == {(SVC_ID, DESTROY)}
    assert [len(args) for _, _, args in calls] == [8 * DROPPED_AT_ONCE, 8]
    assert {args[at : at + 8] for _, _, args in calls for at in range(0, len(args), 8)} == made


def test_instances_are_spread_over_the_seats_and_stay_there() -> None:
    worker = Worker(workers=3)
    proxies = [make_proxy(worker.shared, worker) for _ in range(6)]
    for proxy in proxies * 2:
        proxy.scale(1, 1.0, True)
    seats = [(fn_id >> SEAT_SHIFT & 0x3F, args[:8]) for fn_id, args, _, _ in worker.calls]
    assert sorted(seat for seat, _ in set(seats)) == [0, 0, 1, 1, 2, 2]
    assert all(fn_id & FUNCTION_MASK == 0 for fn_id in worker.ids[-6:])
    worker.kept = f"result of {len(RESULT)} bytes is kept as 9"
    assert proxies[0].upper("x") == TEXT
    assert worker.ids[-1] == fn_id_in(seats[0][0], messages.FETCH)
    del proxies[:2], proxy
    gc.collect()
    seats_left = []
    while taken := worker.typed.dropped.take():
        _, fn_id, _ = destruction(taken)
        seats_left.append(fn_id >> SEAT_SHIFT & 0x3F)
    assert sorted(seats_left) == sorted(seat for seat, _ in seats[:4:2])
    worker.calls.clear()
    others = [make_proxy(worker.shared, worker) for _ in range(2)]
    for other in others:
        other.scale(1, 1.0, True)
    assert sorted(fn_id >> SEAT_SHIFT & 0x3F for fn_id in worker.ids[::2]) == sorted(seats_left)


def test_contract_that_has_other_workers_now_is_described_anew() -> None:
    worker = Worker()
    body = {"api": SVC.encode(), "workers": 1}
    assert worker.typed.of(SVC_ID, body) is worker.shared
    assert worker.typed.of(SVC_ID, {**body, "workers": 2}).description.seats == 2


def test_options_keep_the_instance_alive(worker: Worker) -> None:
    proxy = make_proxy(worker.shared, worker).with_options(timeout=0.5)
    gc.collect()
    assert proxy.scale(1, 1.0, True) == 7.5
    assert {timeout for _, _, _, timeout in worker.calls} == {0.5}
    assert not worker.typed.dropped.notes


GONE = "the instance is gone: its worker was replaced; a new proxy gets a new one"


def test_instance_that_is_lost_before_it_was_used_is_made_again(worker: Worker) -> None:
    proxy = make_proxy(worker.shared, worker)
    worker.fails[IN_INSTANCE] = failed(StaleHandle, GONE)
    assert proxy.scale(1, 1.0, True) == 7.5
    assert worker.ids == [CREATE, IN_INSTANCE, CREATE, IN_INSTANCE]
    worker.fails[IN_INSTANCE] = failed(StaleHandle, GONE)
    with pytest.raises(StaleHandle):
        proxy.scale(1, 1.0, True)
    assert worker.ids[4:] == [IN_INSTANCE], "its state is lost, and its caller is told"


def test_contract_that_is_replaced_all_the_time_is_a_stale_handle_at_last(worker: Worker) -> None:
    proxy = make_proxy(worker.shared, worker)
    worker.always[IN_INSTANCE] = failed(StaleHandle, GONE)
    with pytest.raises(StaleHandle):
        proxy.scale(1, 1.0, True)
    assert worker.ids == [CREATE, IN_INSTANCE] * CREATIONS_MAX


@pytest.mark.parametrize("text", ["the contract says so", "the result is no longer kept"])
def test_stale_handle_of_a_call_that_ran_is_its_callers(worker: Worker, text: str) -> None:
    proxy = make_proxy(worker.shared, worker)
    worker.fails[IN_INSTANCE] = failed(StaleHandle, text)
    with pytest.raises(StaleHandle, match=text):
        proxy.scale(1, 1.0, True)
    assert worker.ids == [CREATE, IN_INSTANCE]


def test_result_that_did_not_fit_is_fetched_and_its_size_learned(worker: Worker) -> None:
    proxy = make_proxy(worker.shared, worker)
    worker.kept = f"result of {len(RESULT)} bytes is kept as 9"
    assert [proxy.upper("x"), proxy.upper("x")] == [TEXT, TEXT]
    assert worker.ids == [CREATE, IN_INSTANCE | 1, FETCH, IN_INSTANCE | 1]
    assert worker.calls[2][1:3] == (struct.pack("<Q", 9), len(RESULT))


@pytest.mark.parametrize("text", ["too small", f"result of {PAYLOAD_MAX + 1} bytes is kept as 9"])
def test_other_failures_of_that_code_are_the_callers(worker: Worker, text: str) -> None:
    worker.kept = text
    with pytest.raises(BufferTooSmall, match=text):
        make_proxy(worker.shared, worker).upper("x")


def test_proxy_looks_like_its_contract(worker: Worker) -> None:
    proxy = make_proxy(worker.shared, worker)
    assert dir(proxy) == ["mix", "open", "scale", "upper"]
    assert repr(proxy) == "<host.svc@1.3.0>"
    assert str(inspect.signature(proxy.scale)) == "(k: int, v: float, on: bool) -> float"
    assert proxy.scale.__name__ == "scale"


@pytest.mark.parametrize(
    ("given", "named", "text"),
    [
        ((1,), {"k": 1}, r"^host\.svc@1\.scale: got k twice, by place and by name$"),
        ((), {"onn": 1}, r"^host\.svc@1\.scale: has no parameter 'onn'; did you mean 'on'\?$"),
        ((), {"nope": 1}, r"^host\.svc@1\.scale: has no parameter 'nope'; known are k, on, v$"),
        ((1,), {"v": 1.0}, r"^host\.svc@1\.scale: lacks on; it takes k, v, on$"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    worker: Worker, given: tuple[Any, ...], named: dict[str, Any], text: str
) -> None:
    with pytest.raises(ArgumentTypeError, match=text):
        make_proxy(worker.shared, worker).scale(*given, **named)
    assert worker.calls == []


def test_async_proxies_make_the_same_calls(worker: Worker) -> None:
    async def call(*request: Any) -> bytes:
        await asyncio.sleep(0)
        return worker(*request)

    async def main() -> None:
        proxy = make_async_proxy(worker.shared, call)
        worker.kept = f"result of {len(RESULT)} bytes is kept as 9"
        assert await proxy.upper("x") == TEXT
        assert await proxy.scale(1, v=1.0, on=True) == 7.5

    asyncio.run(main())
    assert worker.ids == [CREATE, IN_INSTANCE | 1, FETCH, IN_INSTANCE]


def test_functions_may_have_any_name(worker: Worker) -> None:
    names = ["_call", "_shared", "_instance", "with_options", "_"]
    functions = "".join(f'[[host_contract.functions]]\nname = "{name}"\nreturn = "f64"\n' for name in names)
    odd = Worker(f'[[host_contract]]\nname = "host.svc"\nversion = "1.0"\n{functions}')
    proxy = make_proxy(odd.shared, lambda *request: struct.pack("<d", 7.5))
    assert dir(proxy) == sorted(names)
    assert [getattr(proxy, name)() for name in names] == [7.5] * len(names)


def test_methods_say_what_the_description_says() -> None:
    told = Worker("""
[[host_contract]]
name = "host.svc"
version = "1"
[[host_contract.functions]]
name = "scale"
docs = "Scale a value."
params = [{ name = "k", type = "u8", docs = "by what" }, { name = "v", type = "f64" }]
return = { type = "f64", docs = "the product" }
[[host_contract.functions]]
name = "quiet"
""")
    methods = type(make_proxy(told.shared, told))
    assert methods.scale.__doc__ == "Scale a value.\n\nArgs:\n    k: by what\n\nReturns:\n    the product"
    assert methods.quiet.__doc__ is None
