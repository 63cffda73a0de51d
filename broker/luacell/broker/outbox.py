"""The broker's outgoing messages: encodes what the dispatcher wants said and sends it without ever waiting.

A send that waits for a dead peer would stop the service for all: every send is non-blocking. A peer that is gone is
not missed, its death is told elsewhere; one that does not read is reported to the server, which sends it away.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from struct import Struct
from typing import Final, Protocol

import zmq

from luacell.broker import model
from luacell.broker.books import Pair
from luacell.broker.model import SendFailure, SendReply
from luacell.protocol import headers, messages
from luacell.protocol.headers import Op
from luacell.protocol.messages import Message, encode

log = logging.getLogger("luacell.broker")

_SEND_FIRST: Final = int(zmq.SNDMORE | zmq.NOBLOCK)  # plain integers: pyzmq's enums cost microseconds
_SEND_LAST: Final = int(zmq.NOBLOCK)
_send: Final = zmq.backend.Socket.send  # without the wrapper's handling of options that we do not use
_EXECUTE: Final = Struct(f"<{headers.PREAMBLE_SIZE}s" + headers.EXECUTE.format.removeprefix("<"))
_EXECUTE_HEAD: Final = headers.head(Op.EXECUTE)
_execute_record: Final = headers.EXECUTE.pack
answer_record: Final = headers.RESULT.pack
_RESULT: Final = Struct(f"<{headers.PREAMBLE_SIZE}s" + headers.RESULT.format.removeprefix("<"))
_RESULT_HEAD: Final = headers.head(Op.RESULT)


class Correspondent(Protocol):
    """A host that gets answers to its calls in another way."""

    def on_result(self, call: model.Call, code: int, out_size: int, error_size: int, slot_free: bool) -> None:
        """Relay a result."""

    def on_failure(self, effect: SendFailure) -> None:
        """Relay a failure."""

    def on_released(self, number: int) -> None:
        """Act on the end of a call whose slot was kept."""


class Outbox:
    """Everything the broker says over its ROUTER.

    Args:
        router: the socket; the server's.
        expel: called with the routing id of a peer that does not read.

    Attributes:
        correspondents: hosts without shared memory, by routing id; nothing else reports their end.
    """

    def __init__(self, router: zmq.Socket[bytes], expel: Callable[[bytes], None]) -> None:
        self._router = router
        self._expel = expel
        self.correspondents: Mapping[bytes, Correspondent] = {}

    def send(self, peer: bytes, message: bytes) -> None:
        """Send an encoded message."""
        router = self._router
        try:
            _send(router, peer, _SEND_FIRST)
            _send(router, message, _SEND_LAST)
        except zmq.ZMQError as error:
            self._not_sent(peer, error)

    def tell(self, peer: bytes, message: Message) -> None:
        """Send a control message."""
        self.send(peer, encode(message))

    def _not_sent(self, peer: bytes, error: zmq.ZMQError) -> None:
        if error.errno == zmq.EAGAIN:
            log.warning("peer does not read; dropping it", extra={"fields": {"peer": peer.hex()}})
            self._expel(peer)
        elif error.errno != zmq.EHOSTUNREACH:
            raise error
        elif peer in self.correspondents:
            self._expel(peer)

    # -- calls and answers ----------------------------------------------------------------------------------------
    def send_execute(self, call: model.Call) -> None:
        """Hand a call to the worker that holds it, which has its pair mapped."""
        worker = call.worker
        assert worker is not None
        _, _, fn_id, _, arena, slot, generation, flags, args_size, out_size = call.header
        message = _EXECUTE.pack(
            _EXECUTE_HEAD, call.sequence, call.deadline_ns, fn_id, call.contract.run_limit_us, arena, slot, generation,
            flags if worker.call is call else flags | headers.AHEAD, args_size, out_size, 0,
        )  # fmt: skip
        router, peer = self._router, worker.routing_id
        try:  # as `send`, without its frame: this is the hot path
            _send(router, peer, _SEND_FIRST)
            _send(router, message, _SEND_LAST)
        except zmq.ZMQError as error:
            self._not_sent(peer, error)

    def send_executes(self, worker: model.Worker, calls: list[model.Call]) -> None:
        """Hand a worker several calls in one message; it has their pairs mapped."""
        records = []
        for call in calls:
            _, _, fn_id, _, arena, slot, generation, flags, args_size, out_size = call.header
            if worker.call is not call:
                flags |= headers.AHEAD
            records.append(
                _execute_record(
                    call.sequence, call.deadline_ns, fn_id, call.contract.run_limit_us, arena, slot, generation, flags,
                    args_size, out_size, 0,
                )
            )  # fmt: skip
        self.send(worker.routing_id, headers.head(Op.EXECUTE, len(records)) + b"".join(records))

    def send_answers(self, peer: bytes, records: list[bytes]) -> None:
        """Relay several answers, each packed by `answer_record`, to their host."""
        self.send(peer, headers.head(Op.RESULT, len(records)) + b"".join(records))

    def send_answer(self, call: model.Call, code: int, out_size: int, error_size: int, flags: int) -> None:
        """Relay a worker's answer to the call's host."""
        if call.session.id in self.correspondents:
            self.correspondents[call.session.id].on_result(call, code, out_size, error_size, flags == headers.SLOT_FREE)
            return
        message = _RESULT.pack(_RESULT_HEAD, call.header.call_id, code, out_size, error_size, flags)
        router, peer = self._router, call.session.id
        try:  # as `send`, without its frame: this is the hot path
            _send(router, peer, _SEND_FIRST)
            _send(router, message, _SEND_LAST)
        except zmq.ZMQError as error:
            self._not_sent(peer, error)

    def send_result(self, effect: model.SendResult) -> None:
        """Perform SendResult."""
        call, code, out_size, error_size, slot_free = effect
        self.send_answer(call, code, out_size, error_size, headers.SLOT_FREE if slot_free else 0)

    def send_failure(self, effect: SendFailure) -> None:
        """Perform SendFailure."""
        correspondent = self.correspondents.get(effect.session_id)
        if correspondent is not None:
            correspondent.on_failure(effect)
        else:
            self.tell_failure(effect)

    def tell_failure(self, effect: SendFailure) -> None:
        """Send a FAILURE as it is."""
        failure = messages.Failure(
            call_id=effect.call_id,
            code=int(effect.code),
            message=effect.message[: messages.REASON_MAX],
            kind=effect.kind,
            slot=effect.slot,
            began=effect.began,
            signal=effect.signal,
            exit_code=effect.exit_code,
            limit=effect.limit,
            queued=effect.queued,
            ran=effect.ran,
            cpu=effect.cpu,
            state=effect.state,
            wchan=effect.wchan,
            retry_after=effect.retry_after,
        )
        self.tell(effect.session_id, failure)

    def send_released(self, effect: model.SendReleased) -> None:
        """Perform SendReleased."""
        correspondent = self.correspondents.get(effect.session_id)
        if correspondent is not None:
            correspondent.on_released(effect.call_id)
            return
        self.send(effect.session_id, headers.encode_records(Op.RELEASED, [(effect.call_id,)]))

    def send_reply(self, effect: SendReply) -> None:
        """Perform SendReply."""
        reply = messages.Reply(
            request_id=effect.request.request_id,
            kind=effect.kind,
            code=int(effect.code),
            reason=effect.reason[: messages.REASON_MAX],
            body=dict(effect.body),
        )
        self.tell(effect.request.session_id, reply)

    def send_load(self, effect: model.LoadWorker) -> None:
        """Perform LoadWorker."""
        record = effect.record
        load = messages.Load(
            contract=messages.id_bytes(record.id),
            name=record.name,
            source=record.source,
            chunk_name=record.chunk_name,
            modules=record.modules,
            memory=record.settings.memory,
            sandbox=record.settings.sandbox,
            read=record.settings.read,
            write=record.settings.write,
            network=record.settings.network,
            workers=record.settings.workers,
            max_calls=record.settings.max_calls,
            max_rss=record.settings.rss_limit,
        )
        self.tell(effect.worker.routing_id, load)

    def send_save(self, effect: model.SaveState) -> None:
        """Perform SaveState."""
        self.tell(effect.worker.routing_id, messages.Save())

    def send_restore(self, effect: model.RestoreState) -> None:
        """Perform RestoreState."""
        self.tell(effect.worker.routing_id, messages.Restore(state=effect.state))

    def send_forget(self, worker: model.Worker, arena: int) -> None:
        """Tell a worker that an arena is gone."""
        self.tell(worker.routing_id, messages.Forget(arena=arena))

    def send_unmap(self, worker: model.Worker, pair: Pair) -> None:
        """Tell a worker that a pair of segments is gone."""
        self.tell(worker.routing_id, messages.Unmap(arena=pair.arena.id, index=pair.index))
