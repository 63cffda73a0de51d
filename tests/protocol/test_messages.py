"""The control messages: bounds that hang together, and helpers around them."""

from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luacell.protocol import messages
from luacell.protocol.codec import pack
from luacell.protocol.fields import decode, encode
from luacell.protocol.headers import VERSION, Op
from luacell.protocol.limits import (
    DESCRIPTOR_MESSAGE_MAX,
    ERROR_TEXT_MAX,
    LISTED_CONTRACTS_MAX,
    MESSAGE_MAX,
    NODES_MAX,
    RSS_MARGIN,
    SOURCE_MAX,
)
from luacell.protocol.messages import Settings, id_bytes, id_of
from tests.protocol.golden import EXAMPLES
from tests.protocol.support import MESSAGES, edges, steady, wanted

OVER_DESCRIPTOR_CHANNEL = (
    Op.HELLO,
    Op.WELCOME,
    Op.SEGMENT,
    Op.MAP,
    Op.START,
    Op.KILL,
    Op.END,
    Op.STARTED,
    Op.EXITED,
    Op.LEAVING,
    Op.OUTPUT,
)


@steady
@given(st.integers(0, (1 << 64) - 1))
def test_contract_id_travels_as_eight_little_endian_bytes(contract_id: int) -> None:
    raw = id_bytes(contract_id)
    assert len(raw) == 8
    assert id_of(raw) == contract_id
    assert raw[0] == contract_id & 0xFF


def test_every_message_says_who_sends_it() -> None:
    for message in MESSAGES.values():
        assert message.__doc__
        assert message.__name__.upper() == message.OP.name.replace("_", "")


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        messages.Kill(worker=1).worker = 2  # type: ignore[misc]


def test_settings_travel_within_a_registration_and_come_out_the_same() -> None:
    settings = Settings(1, 2, 3 << 20, 4, True, True, "default")
    register = messages.Register(
        request_id=1,
        contract=bytes(8),
        name="",
        version=0,
        source=b"",
        chunk_name="=x",
        modules={},
        replace=False,
        private=False,
        **settings.as_fields(),
    )
    assert Settings.from_message(decode(messages.Register, encode(register))) == settings


def test_default_settings_are_a_valid_registration() -> None:
    register = EXAMPLES[Op.REGISTER]["by its id alone"]
    assert decode(messages.Register, encode(register)) == register
    assert Settings.from_message(register) == Settings()


def test_limit_of_resident_memory_follows_from_the_memory_where_it_is_not_given() -> None:
    assert Settings(memory=48 << 20).rss_limit == (48 << 20) + RSS_MARGIN
    assert Settings(memory=48 << 20, max_rss=100 << 20).rss_limit == 100 << 20


def test_messages_made_of_their_defaults_are_valid() -> None:
    assert decode(messages.Hello, encode(messages.Hello(role="host"))).version == VERSION
    reply = decode(messages.Reply, encode(messages.Reply(request_id=1)))
    assert (reply.kind, reply.code, reply.reason, reply.body) == ("", 0, "", {})
    failure = decode(messages.Failure, encode(messages.Failure(call_id=1, code=5, message="")))
    assert (failure.kind, failure.slot, failure.began, failure.limit) == ("", "free", "no", "")
    assert (failure.signal, failure.exit_code, failure.queued, failure.ran) == (None, None, None, None)
    exited = decode(messages.Exited, encode(messages.Exited(worker=1)))
    assert (exited.signal, exited.exit_code, exited.problem) == (None, None, "")


def test_two_replies_share_no_body() -> None:
    first, second = messages.Reply(request_id=1), messages.Reply(request_id=2)
    assert first.body is not second.body


@pytest.mark.parametrize("op", OVER_DESCRIPTOR_CHANNEL, ids=lambda op: op.name)
def test_largest_message_of_the_descriptor_channel_fits_one_packet(op: Op) -> None:
    values = {item.name: edges(wanted(op, item.name))[0] for item in fields(MESSAGES[op])}
    widest = {name: max(accepted, key=lambda value: len(pack(value))) for name, accepted in values.items()}
    widest = {name: "😀" * len(value) if type(value) is str else value for name, value in widest.items()}
    assert len(encode(MESSAGES[op](**widest))) <= DESCRIPTOR_MESSAGE_MAX


def test_largest_registration_fits_a_message_and_so_does_its_load() -> None:
    register = messages.Register(
        request_id=2**64 - 1,
        contract=b"\xff" * 8,
        name="😀" * 255,
        version=2**64 - 1,
        source=b"x" * (SOURCE_MAX // 2),
        chunk_name="😀" * 512,
        modules={f"{number:04}": b"x" * (SOURCE_MAX // 2 // 4096 - 4) for number in range(4096)},
        replace=True,
        private=True,
        **Settings(60_000_000, 60_000_000, 2 << 30, 64, True, True, "untrusted").as_fields(),
    )
    assert decode(messages.Register, encode(register)) == register
    load = messages.Load(
        contract=register.contract,
        name=register.name,
        source=register.source,
        chunk_name=register.chunk_name,
        modules=register.modules,
        memory=register.memory,
    )
    assert len(encode(load)) < len(encode(register)) <= MESSAGE_MAX


def test_longest_listing_and_the_longest_failure_fit_a_message() -> None:
    row = {
        "id": b"\xff" * 8,
        "name": "😀" * 255,
        "version": "4294967295.65535.65535",
        "deadline_us": 60_000_000,
        "stateless": True,
        "workers": 64,
    }
    listing = messages.Reply(request_id=1, body={"contracts": [row] * LISTED_CONTRACTS_MAX, "total": 10_000})
    assert LISTED_CONTRACTS_MAX * (len(row) + 2) < NODES_MAX
    assert decode(messages.Reply, encode(listing)) == listing
    text = "x" * messages.REASON_MAX
    assert len(text) >= ERROR_TEXT_MAX
    failure = messages.Failure(call_id=1, code=1, message=text, limit="x" * 200)
    assert decode(messages.Failure, encode(failure)) == failure


@pytest.mark.parametrize("fate", messages.SLOT_FATES)
def test_failure_knows_three_fates_of_a_slot(fate: str) -> None:
    failure = messages.Failure(call_id=1, code=1, message="", slot=fate)
    assert decode(messages.Failure, encode(failure)).slot == fate
