"""What messages mean for those that wait: answers find their owner, slots come back exactly once, a loss tells all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from luacell.client.arena import Arena
from luacell.client.ledger import Ledger
from luacell.client.pending import Pending
from luacell.protocol import headers, messages
from luacell.protocol.errors import ProtocolError, Unavailable
from luacell.protocol.headers import SLOT_FREE, Op
from luacell.protocol.messages import encode

FREE, KEPT = SLOT_FREE, 0


@dataclass
class Home:
    is_retired: bool = False


@dataclass
class CountedSlot:
    """A slot that counts how often it was given back."""

    home: Home = field(default_factory=Home)
    given_back: int = 0
    has_begun: bool = False

    def give_back(self) -> None:
        self.given_back += 1


class Books:
    """A ledger, and what it has told."""

    def __init__(self) -> None:
        self.woken: list[Pending] = []
        self.drained: list[Arena] = []
        self.ledger = Ledger(self.woken.append, self.drained.append)

    def call(self, call_id: int) -> tuple[Pending, CountedSlot]:
        """Have a call under way."""
        pending, slot = Pending(), CountedSlot()
        pending.call_id = call_id
        pending.slot = cast(Any, slot)
        pending.is_sent = True
        self.ledger.calls[call_id] = pending
        return pending, slot

    def request(self, request_id: int) -> Pending:
        pending = Pending()
        pending.is_sent = True
        self.ledger.requests[request_id] = pending
        return pending


def result(call_id: int, flags: int = FREE, code: int = 0) -> headers.Result:
    return headers.Result(call_id, code, 4, 0, flags)


def results(*records: headers.Result) -> bytes:
    return headers.encode_records(Op.RESULT, list(records))


def released(*call_ids: int) -> bytes:
    return headers.encode_records(Op.RELEASED, [(call_id,) for call_id in call_ids])


def failure(call_id: int, slot: str = "free") -> bytes:
    return encode(messages.Failure(call_id=call_id, code=257, message="it died", slot=slot))


@pytest.fixture
def books() -> Books:
    return Books()


# -- answers ----
def test_answers_reach_their_owners_whichever_way_they_are_packed(books: Books) -> None:
    calls = [books.call(number)[0] for number in range(1, 5)]
    books.ledger.take(results(result(3)))
    books.ledger.take(results(result(1), result(4), result(2)))
    assert books.woken == [calls[2], calls[0], calls[3], calls[1]]
    assert [call.answer for call in calls] == [result(number) for number in range(1, 5)]
    assert all(call.is_done for call in calls)
    assert not books.ledger.calls


def test_second_answer_changes_nothing(books: Books) -> None:
    call, slot = books.call(1)
    books.ledger.take(results(result(1)))
    books.ledger.take(failure(1))
    assert call.answer == result(1)
    books.ledger.settle(call)
    books.ledger.take(results(result(1)))
    assert slot.given_back == 1


def test_reply_reaches_its_request_and_strays_are_dropped(books: Books) -> None:
    request = books.request(7)
    books.ledger.take(encode(messages.Reply(request_id=8)))
    assert not request.is_done
    books.ledger.take(encode(messages.Reply(request_id=7, reason="here")))
    assert isinstance(request.answer, messages.Reply)
    assert request.answer.reason == "here"
    assert not books.ledger.lost


# -- slots ----
def test_slot_of_an_answer_that_frees_it_comes_back_when_it_is_settled(books: Books) -> None:
    call, slot = books.call(1)
    books.ledger.take(results(result(1)))
    assert slot.given_back == 0
    books.ledger.settle(call)
    books.ledger.settle(call)
    assert slot.given_back == 1


@pytest.mark.parametrize("kept", [results(result(1, KEPT)), failure(1, "kept")], ids=["result", "failure"])
@pytest.mark.parametrize("is_settled_first", [True, False])
def test_slot_that_is_kept_comes_back_when_it_is_released_and_read(
    books: Books, kept: bytes, is_settled_first: bool
) -> None:
    call, slot = books.call(1)
    books.ledger.take(kept)
    if is_settled_first:
        books.ledger.settle(call)
    assert slot.given_back == 0
    books.ledger.take(released(1))
    assert slot.given_back == int(is_settled_first)
    books.ledger.settle(call)
    books.ledger.take(released(1))
    assert slot.given_back == 1
    assert not books.ledger.resting


@pytest.mark.parametrize("end", [results(result(1)), failure(1), released(1)], ids=["result", "failure", "released"])
def test_slot_of_a_call_that_was_given_up_rests_until_it_is_free(books: Books, end: bytes) -> None:
    call, slot = books.call(1)
    assert books.ledger.give_up(call)
    assert not books.ledger.calls
    books.ledger.take(failure(1, "kept"))
    assert slot.given_back == 0
    books.ledger.take(end)
    assert slot.given_back == 1
    assert not books.woken


def test_call_that_was_never_sent_has_its_slot_back_at_once(books: Books) -> None:
    call, slot = books.call(1)
    call.is_sent = False
    assert not books.ledger.give_up(call)
    assert slot.given_back == 1
    assert not books.ledger.calls


def test_call_that_is_given_up_with_its_answer_there_needs_no_withdrawal(books: Books) -> None:
    call, slot = books.call(1)
    books.ledger.take(results(result(1)))
    assert not books.ledger.give_up(call)
    assert slot.given_back == 1


def test_arena_of_a_contract_that_is_gone_is_drained(books: Books) -> None:
    call, slot = books.call(1)
    slot.home.is_retired = True
    books.ledger.take(results(result(1)))
    books.ledger.settle(call)
    assert [cast(object, arena) for arena in books.drained] == [slot.home]


# -- grants ----
SEGMENT = messages.Segment(
    request_id=5, arena=3, index=1, count=4, args_stride=4096, out_stride=8192, deadline_us=5_000_000
)


def test_grant_reaches_its_request_with_its_descriptors(books: Books) -> None:
    request = books.request(5)
    assert books.ledger.grant(encode(SEGMENT), [10, 11]) is None
    assert (request.answer, request.descriptors) == (SEGMENT, [10, 11])
    assert books.woken == [request]


def test_grant_that_nobody_wants_any_more_goes_back(books: Books) -> None:
    assert books.ledger.grant(encode(SEGMENT), [10, 11]) == messages.GiveBack(arena=3, index=1)
    books.request(5).is_done = True
    assert books.ledger.grant(encode(SEGMENT), [10, 11]) == messages.GiveBack(arena=3, index=1)


def test_grant_without_two_descriptors_is_none(books: Books) -> None:
    books.request(5)
    with pytest.raises(ProtocolError, match="1 descriptors, not 2"):
        books.ledger.grant(encode(SEGMENT), [10])


# -- the end ----
def test_loss_tells_all_that_wait_whether_their_calls_began(books: Books) -> None:
    sent, _ = books.call(1)
    unsent, _ = books.call(2)
    unsent.is_sent = False
    answered, slot = books.call(3)
    books.ledger.take(results(result(3)))
    request = books.request(4)
    done = books.request(6)
    done.is_done = True
    begun, begun_slot = books.call(7)
    begun_slot.has_begun = True
    books.ledger.lose("the broker is gone")
    books.ledger.lose("another reason")
    assert [each.failure and each.failure.began for each in (sent, unsent, request)] == ["unknown", "no", "unknown"]
    assert begun.failure is not None and begun.failure.began == "yes"
    assert answered.failure is None
    assert done.failure is None
    assert books.woken == [answered, sent, unsent, begun, request]
    with pytest.raises(Unavailable, match="the broker is gone") as caught:
        books.ledger.check()
    assert caught.value.began == "no"
    books.ledger.settle(answered)
    assert slot.given_back == 1


def test_after_a_loss_no_slot_rests(books: Books) -> None:
    given_up, left = books.call(1)
    assert books.ledger.give_up(given_up)
    _, being_read = books.call(2)
    books.ledger.take(results(result(2, KEPT)))
    late, late_slot = books.call(3)
    books.ledger.lose("the broker is gone")
    books.ledger.let_go()
    assert (left.given_back, being_read.given_back) == (1, 0)
    assert not books.ledger.give_up(late)
    assert late_slot.given_back == 1
    books.ledger.take(released(1, 2))
    assert (left.given_back, being_read.given_back) == (1, 0)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"LC",
        results(result(1))[:-1],
        encode(messages.Hello(role="host")),
        failure(0),
        headers.head(Op.REPLY) + b"\xc1",
    ],
    ids=["empty", "cut off", "short", "not for hosts", "refused", "no map"],
)
def test_message_that_is_none_is_the_end(books: Books, message: bytes) -> None:
    call, _ = books.call(1)
    books.ledger.check()
    books.ledger.take(message)
    assert "not of this protocol" in books.ledger.lost
    assert isinstance(call.failure, Unavailable)
