"""The calls that proxies make: a worker made by hand answers them, no process is there."""

from __future__ import annotations

import asyncio
import gc
import inspect
import struct
from typing import Any

import pytest

from luacell.client import HostContractId
from luacell.client.description import TypedContracts
from luacell.client.proxy import CREATE, DESTROY, DROPPED_AT_ONCE, FETCH, make_async_proxy, make_proxy
from luacell.protocol.errors import AbiErrorCode, BufferTooSmall, CallError, HostContractCallFailed
from luacell.protocol.limits import PAYLOAD_MAX
from luacell.protocol.messages import IN_INSTANCE
from tests.support.apis import SVC

SVC_ID = int(HostContractId("host.svc", 1))
TEXT = "y" * 5000
RESULT = struct.pack("<QQ", 16, len(TEXT)) + TEXT.encode()


class Worker:
    """Remembers calls, and answers them as it is told."""

    def __init__(self, text: str = SVC) -> None:
        self.shared = TypedContracts().of(SVC_ID, {"api": text.encode()})
        self.calls: list[tuple[int, bytes, int, float | None]] = []
        self.fails: dict[int, BaseException] = {}
        self.kept = ""

    def __call__(self, contract_id: int, fn_id: int, args: bytes, out_size: int, timeout: float | None) -> bytes:
        assert contract_id == SVC_ID
        self.calls.append((fn_id, args, out_size, timeout))
        if fn_id in self.fails:
            raise self.fails.pop(fn_id)
        if fn_id == FETCH:
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


def test_dropped_instances_are_destroyed_in_batches(worker: Worker) -> None:
    for _ in range(DROPPED_AT_ONCE + 1):
        make_proxy(worker.shared, worker).scale(1, 1.0, True)
        gc.collect(0)
    gc.collect()
    make_proxy(worker.shared, worker)  # never called: nothing to destroy
    proxy = make_proxy(worker.shared, worker)
    proxy.scale(1, 1.0, True)
    proxy.scale(1, 1.0, True)
    destroyed = [args for fn_id, args, _, _ in worker.calls if fn_id == DESTROY]
    numbers = {number for args in destroyed for (number,) in struct.iter_unpack("<Q", args)}
    assert len(numbers) == DROPPED_AT_ONCE + 1
    assert all(16 <= len(args) <= 8 * DROPPED_AT_ONCE for args in destroyed)


def test_several_dropped_at_once_travel_together(worker: Worker) -> None:
    proxies = [make_proxy(worker.shared, worker) for _ in range(DROPPED_AT_ONCE + 1)]
    for proxy in proxies:
        proxy.scale(1, 1.0, True)
    proxies.clear()
    del proxy
    gc.collect()
    last = make_proxy(worker.shared, worker)
    worker.calls.clear()
    worker.fails[DESTROY] = failed(HostContractCallFailed, "not the caller's affair")
    assert last.scale(1, 1.0, True) == last.scale(1, 1.0, True) == 7.5
    assert [(fn_id, len(args)) for fn_id, args, _, _ in worker.calls if fn_id == DESTROY] == [
        (DESTROY, 8 * DROPPED_AT_ONCE),
        (DESTROY, 16),
    ]


def test_options_keep_the_instance_alive(worker: Worker) -> None:
    proxy = make_proxy(worker.shared, worker).with_options(timeout=0.5)
    gc.collect()
    assert proxy.scale(1, 1.0, True) == 7.5
    assert {timeout for _, _, _, timeout in worker.calls} == {0.5}
    assert not worker.shared.dropped


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
        ((1,), {"k": 1}, "'k'"),
        ((), {"nope": 1}, "'nope'"),
        ((1,), {"v": 1.0}, "lacks on"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    worker: Worker, given: tuple[Any, ...], named: dict[str, Any], text: str
) -> None:
    with pytest.raises(TypeError, match=text):
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
