"""Seats: how the instances of a typed contract are spread over its workers, and stay where they are.

A contract that keeps instances and has several workers has a seat for each of them. A seat is served like a contract
with one worker: it has a queue, a worker, a back-off of its own. Every call belongs to one seat: that of the instance
which it names, else the one that a host's default instance has. What lived in a seat's worker is gone with it; its next
worker says so when it is asked for an instance that it does not know.

It picks seats and moves queued calls between contracts; it hands nothing over and looks at no clock.
"""

from __future__ import annotations

from luacell.broker.model import Contract
from luacell.protocol.messages import IN_INSTANCE, OF_NO_SEAT, SEAT_MASK, SEAT_SHIFT


def seat_of(contract: Contract, session_id: bytes, fn_id: int) -> Contract:
    """Return the seat that a call belongs to; the contract itself where it has none.

    A host picks the seats of its instances. Its default instance has one that follows from its session, so that those
    of many hosts are spread.
    """
    seats = contract.seats
    if not seats:
        return contract
    if IN_INSTANCE <= fn_id < OF_NO_SEAT:
        return seats[(fn_id >> SEAT_SHIFT & SEAT_MASK) % len(seats)]
    return seats[int.from_bytes(session_id[-4:], "little") % len(seats)]


def seats_beside(seat: Contract, served: Contract | None) -> tuple[Contract, ...]:
    """Return all that rest together with a contract, it among them: the seats of which it is one, or it alone.

    Args:
        seat: a seat, or a contract that has none.
        served: what is served under its id now, which may be its successor.
    """
    return served.places if served is not None and served.quarantine is seat.quarantine else (seat,)


def move_calls(old: Contract, new: Contract) -> None:
    """Let the calls that wait for a contract wait for its successor, in the same order."""
    if not old.seats and not new.seats:
        for call in old.queue:
            call.contract = new
        new.queue, old.queue = old.queue, new.queue
        new.queue.bound, old.queue.bound = old.queue.bound, new.queue.bound
        return
    calls = [call for place in old.places for call in place.queue.drain()]
    for call in reversed(calls):
        call.contract = seat_of(new, call.session.id, call.header.fn_id)
        call.contract.queue.push_front(call.owner, call)
