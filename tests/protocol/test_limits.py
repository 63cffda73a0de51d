"""Limits that must hang together."""

from luacell.protocol import limits
from luacell.protocol.headers import CALL, EXECUTE, PIECE, PREAMBLE_SIZE
from luacell.protocol.slots import SlotShape


def test_limits_are_positive_integers() -> None:
    values = {name: value for name, value in vars(limits).items() if name.isupper()}
    assert values
    for name, value in values.items():
        assert type(value) is int, name
        assert value > 0, name


def test_longest_deadline_fits_the_microseconds_of_a_record() -> None:
    assert 0 < limits.DEADLINE_DEFAULT_US <= limits.DEADLINE_MAX_US < 1 << 32


def test_fullest_messages_of_records_fit_a_message() -> None:
    for record in (CALL, EXECUTE):
        assert PREAMBLE_SIZE + limits.CALLS_PER_MESSAGE_MAX * record.size <= limits.MESSAGE_MAX


def test_a_message_may_carry_every_call_that_a_host_may_have_in_flight() -> None:
    assert limits.CALLS_PER_MESSAGE_MAX >= limits.CALLS_IN_FLIGHT_MAX


def test_a_host_can_have_several_calls_of_the_largest_payloads() -> None:
    largest = SlotShape.for_payloads(limits.PAYLOAD_MAX, limits.PAYLOAD_MAX, 1)
    assert limits.HOST_MEMORY_MAX // largest.total_bytes == 7
    assert limits.TOTAL_MEMORY_MAX >= limits.HOST_MEMORY_MAX


def test_an_arena_has_slots_for_every_call_that_its_host_may_have_in_flight() -> None:
    assert limits.SEGMENTS_PER_ARENA_MAX * limits.SLOTS_PER_SEGMENT_MAX >= limits.CALLS_IN_FLIGHT_MAX
    assert limits.SLOTS_PER_SEGMENT_MAX <= 1 << 16
    assert limits.SEGMENTS_PER_ARENA_MAX <= 1 << 16


def test_a_request_is_waited_for_longer_than_a_start_and_a_load_take() -> None:
    assert limits.REQUEST_LIMIT_NS > limits.START_LIMIT_NS + limits.LOAD_LIMIT_NS


def test_default_memory_lies_within_its_bounds() -> None:
    assert limits.MEMORY_MIN <= limits.MEMORY_DEFAULT <= limits.MEMORY_MAX


def test_pieces_and_windows_hang_together() -> None:
    assert PREAMBLE_SIZE + PIECE.size + limits.INLINE_PIECE <= limits.MESSAGE_MAX
    assert limits.INLINE_SMALL_MAX < limits.INLINE_PIECE
    assert limits.ERROR_TEXT_MAX <= limits.INLINE_SMALL_MAX
    assert 1 <= limits.INLINE_WINDOW <= limits.INLINE_HOST_WINDOW
