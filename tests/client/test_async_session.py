"""An event loop's session at a real ROUTER, with the test as the broker: what leaves together, and what does not."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import zmq

from luacell.client.async_session import READ_MAX, AsyncSession, Awaited
from luacell.client.connection import Connection
from luacell.client.stream_wire import StreamWire
from luacell.protocol import headers, messages
from luacell.protocol.errors import Unavailable
from luacell.protocol.headers import Op
from luacell.protocol.limits import CALLS_PER_MESSAGE_MAX
from luacell.protocol.memory.stream import connect_stream
from tests.support.waiting import LIMIT_S

WELCOME = messages.Welcome(routing_id=b"", epoch=bytes(8), broker_pid=1)
HOST = b"h" * 16
FREE = headers.SLOT_FREE


class Broker:
    """The broker's end of one session."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="loop-")
        path = Path(self._directory.name) / "sock"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = self._context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        self.router.setsockopt(zmq.RCVTIMEO, int(LIMIT_S * 1000))
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.router.setsockopt(zmq.RCVHWM, 2)
        self.router.bind(f"ipc://{path}")
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setblocking(False)
        self.wire = StreamWire(connect_stream(path, HOST, LIMIT_S))
        self.connection = Connection(theirs, self.wire, WELCOME)

    def receive(self) -> tuple[Op, list[int]]:
        """Receive a message of records; return its operation and the ids of its calls."""
        _, message = self.router.recv_multipart()
        op, count = headers.parse_preamble(message)
        return op, [record[0] for record in headers.parse_records(op, count, message)]

    def answer(self, *call_ids: int) -> None:
        records: list[tuple[int, ...]] = [(call_id, 0, 0, 0, FREE) for call_id in call_ids]
        self.router.send_multipart([HOST, headers.encode_records(Op.RESULT, records)])

    def go(self) -> None:
        """End as a killed broker does."""
        self.router.close()
        self.channel.close()

    def close(self) -> None:
        self.go()
        self._context.term()
        self._directory.cleanup()


class Talk:
    """A session with a broker of the test's own."""

    def __init__(self) -> None:
        self.broker = Broker()
        self.loop = asyncio.get_running_loop()
        self.session = AsyncSession(self.broker.connection, self.loop)

    def put(self, call_id: int) -> Awaited:
        pending = Awaited(self.loop)
        pending.call_id = call_id
        self.session.put(pending, headers.CALL.pack(call_id, *(9 * [0])))
        return pending

    async def wait(self, pending: Awaited, limit_s: float = LIMIT_S) -> object:
        await self.session.wait(pending, limit_s, "an answer")
        return pending.answer

    async def received(self) -> tuple[Op, list[int]]:
        return await asyncio.to_thread(self.broker.receive)


def talk(work: Callable[[Talk], Awaitable[None]]) -> None:
    async def main() -> None:
        talking = Talk()
        try:
            await work(talking)
        finally:
            talking.session.close()
            talking.broker.close()
            await asyncio.to_thread(talking.session.end)

    asyncio.run(main())


def test_calls_of_one_iteration_leave_in_one_message() -> None:
    async def work(talking: Talk) -> None:
        calls = [talking.put(number) for number in range(1, 6)]
        assert not any(call.is_sent for call in calls)
        assert await talking.received() == (Op.CALL, [1, 2, 3, 4, 5])
        talking.put(6)
        assert await talking.received() == (Op.CALL, [6])
        talking.broker.answer(5, 1)
        assert (await talking.wait(calls[4])) == (5, 0, 0, 0, FREE)
        assert (await talking.wait(calls[0])) == (1, 0, 0, 0, FREE)

    talk(work)


def test_message_holds_no_more_calls_than_its_bound() -> None:
    async def work(talking: Talk) -> None:
        for number in range(1, CALLS_PER_MESSAGE_MAX + 4):
            talking.put(number)
        _, first = await talking.received()
        _, second = await talking.received()
        assert (len(first), len(second)) == (CALLS_PER_MESSAGE_MAX, 3)

    talk(work)


def test_call_that_is_given_up_before_it_leaves_never_does() -> None:
    async def work(talking: Talk) -> None:
        first, _ = talking.put(1), talking.put(2)
        talking.session.give_up(first)
        assert await talking.received() == (Op.CALL, [2])

    talk(work)


def test_call_that_is_given_up_later_is_withdrawn() -> None:
    async def work(talking: Talk) -> None:
        call = talking.put(1)
        assert await talking.received() == (Op.CALL, [1])
        talking.session.give_up(call)
        assert await talking.received() == (Op.CANCEL, [1])

    talk(work)


def test_flood_of_answers_is_read_to_its_end() -> None:
    async def work(talking: Talk) -> None:
        calls = [talking.put(number) for number in range(1, 2 * READ_MAX + 10)]
        await talking.received()
        for call in calls:
            talking.broker.answer(call.call_id)
        await asyncio.wait_for(asyncio.gather(*(talking.wait(call) for call in calls)), LIMIT_S)

    talk(work)


def test_answers_that_were_there_before_the_end_count() -> None:
    async def work(talking: Talk) -> None:
        answered, running = talking.put(1), talking.put(2)
        await talking.received()
        talking.broker.answer(1)
        talking.broker.channel.close()
        assert await talking.wait(answered) == (1, 0, 0, 0, FREE)
        await fails(talking, running, "unknown")
        await fails(talking, None, "no")

    talk(work)


def test_calls_that_could_not_be_sent_did_not_begin() -> None:
    async def work(talking: Talk) -> None:
        talking.broker.go()
        calls = [talking.put(number) for number in (1, 2)]
        await asyncio.gather(*(fails(talking, call, ("no", "unknown")) for call in calls))
        assert not talking.session.is_open

    talk(work)


def test_broker_that_hangs_up_on_one_way_is_gone() -> None:
    async def work(talking: Talk) -> None:
        answered, running = talking.put(1), talking.put(2)
        await talking.received()
        talking.broker.answer(1)
        assert await talking.wait(answered) == (1, 0, 0, 0, FREE)
        talking.broker.router.close()  # the channel stays
        await fails(talking, running, "unknown")
        await fails(talking, None, "no")
        assert not talking.session.is_open

    talk(work)


def test_calls_that_find_no_room_leave_later() -> None:
    async def work(talking: Talk) -> None:
        count = 40 * CALLS_PER_MESSAGE_MAX  # 2 MiB, which no socket holds
        calls = [talking.put(number) for number in range(1, count + 1)]
        await asyncio.sleep(0)
        assert talking.session._wire.has_unsent
        received: list[int] = []
        while len(received) < count:
            received += (await talking.received())[1]
        assert received == [call.call_id for call in calls]
        assert not talking.session._wire.has_unsent
        talking.broker.answer(count)
        assert await talking.wait(calls[-1]) == (count, 0, 0, 0, FREE)

    talk(work)


def test_silence_ends_a_wait() -> None:
    async def work(talking: Talk) -> None:
        await fails(talking, talking.put(1), "unknown", limit_s=0.02)

    talk(work)


async def fails(talking: Talk, call: Awaited | None, began: str | tuple[str, ...], limit_s: float = LIMIT_S) -> None:
    try:
        await talking.wait(call or talking.put(99), limit_s)
    except Unavailable as error:
        assert error.began in began
    else:
        raise AssertionError("the call was answered")
