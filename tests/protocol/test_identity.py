"""Identity: polyplug's vectors, versions, and the ways to name a contract."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luacell.protocol.identity import (
    ID_MAX,
    NAME_LENGTH_MAX,
    VERSION_MINOR_MAX,
    VERSION_PART_MAX,
    ContractRef,
    GuestContractId,
    HostContractId,
    Version,
    fnv1a64,
    format_id,
)
from tests.protocol.support import steady

LOGGER = 0xF53EB5F2845853BB


@pytest.mark.parametrize(
    ("text", "digits"),
    [
        ("host_contract:host.logger@1", "F53EB5F2845853BB"),
        ("host_contract:host.kv@2", "49DDC995DF3F028B"),
        ("host_contract:host.svc@1", "79BD756C9CC4DE69"),
        ("guest_contract:pipeline.Decoder@1", "E1D7DE773BE6E7F7"),
        ("guest_contract:data.Reporter@3", "76BB4843A9F5B0CE"),
        ("host_contract:host.naïve@1", "D1FEBDA5F59ADD15"),
        ("", "CBF29CE484222325"),
        ("a", "AF63DC4C8601EC8C"),
        ("foobar", "85944171F73967E8"),
    ],
)
def test_fnv1a64_gives_polyplugs_vectors(text: str, digits: str) -> None:
    assert f"{fnv1a64(text):016X}" == digits


@pytest.mark.parametrize(
    ("name", "major", "expected"),
    [
        ("host.logger", 1, LOGGER),
        ("host.kv", 2, 0x49DDC995DF3F028B),
        ("host.svc", 1, 0x79BD756C9CC4DE69),
        ("host.naïve", 1, 0xD1FEBDA5F59ADD15),
    ],
)
def test_host_contract_id_is_the_hash_of_name_and_major_version(name: str, major: int, expected: int) -> None:
    identity = HostContractId(name, major)
    assert int(identity) == expected
    assert f"{identity:}" == f"{name}@{major}"
    assert [*range(3)][HostContractId(name, major) : 1] == []  # usable wherever an integer is


@pytest.mark.parametrize(
    ("name", "major", "expected"),
    [("pipeline.Decoder", 1, 0xE1D7DE773BE6E7F7), ("data.Reporter", 3, 0x76BB4843A9F5B0CE)],
)
def test_guest_contract_id_needs_no_prefix(name: str, major: int, expected: int) -> None:
    assert int(GuestContractId(name, major)) == expected


def test_contract_ids_are_equal_by_kind_name_and_major() -> None:
    assert HostContractId("host.kv", 2) == HostContractId("host.kv", 2)
    assert hash(HostContractId("host.kv", 2)) == hash(HostContractId("host.kv", 2))
    assert HostContractId("host.kv", 2) != HostContractId("host.kv", 1)
    assert HostContractId("host.kv", 2) != GuestContractId("host.kv", 2)
    assert HostContractId("host.logger", 1) != LOGGER
    assert repr(GuestContractId("host.kv", 2)) == "GuestContractId('host.kv', 2)"
    assert str(HostContractId("host.kv", 2)) == "host.kv@2"


def test_host_contract_name_without_its_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'logger' lacks the prefix 'host\.'"):
        HostContractId("logger", 1)


@pytest.mark.parametrize(
    "name", ["", "host.", ".host", "host..kv", "host.1kv", "host.k v", "host.kv\n", "host.kv@1", "host.k-v"]
)
def test_malformed_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not dotted identifiers such as 'host\.logger'"):
        HostContractId(name, 1)


def test_name_may_have_255_characters_and_no_more() -> None:
    name = "host." + "k" * (NAME_LENGTH_MAX - 5)
    assert HostContractId(name, 1).name == name
    with pytest.raises(ValueError, match="has 256 characters; the limit is 255"):
        HostContractId(name + "k", 1)


@pytest.mark.parametrize("major", [True, 1.0, "1", None])
def test_major_version_must_be_an_int_for_its_text_is_hashed(major: object) -> None:
    with pytest.raises(TypeError, match="is no int"):
        HostContractId("host.kv", major)  # type: ignore[arg-type]


@pytest.mark.parametrize("major", [-1, VERSION_PART_MAX + 1])
def test_major_version_out_of_range_is_refused(major: int) -> None:
    with pytest.raises(ValueError, match=f"version major {major} is outside 0..4294967295"):
        HostContractId("host.kv", major)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("1", Version(1, 0, 0)),
        ("1.2", Version(1, 2, 0)),
        ("1.2.3", Version(1, 2, 3)),
        ("0", Version(0)),
        ("4294967295.65535.65535", Version(VERSION_PART_MAX, VERSION_MINOR_MAX, VERSION_MINOR_MAX)),
    ],
)
def test_version_is_read_with_one_to_three_parts(text: str, version: Version) -> None:
    assert Version.parse(text) == version


@pytest.mark.parametrize(
    "text", ["", ".", "1.", ".1", "1.2.3.4", "v1", "-1", "+1", "1 ", "1\n", "1_0", "\u0661", "12345678901"]
)
def test_text_that_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not of the form MAJOR\[\.MINOR\[\.PATCH\]\]"):
        Version.parse(text)


@pytest.mark.parametrize("text", ["4294967296", "1.65536", "1.0.65536"])
def test_version_part_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is outside 0"):
        Version.parse(text)


@pytest.mark.parametrize(
    ("provided", "required", "served"),
    [
        ("1.3.0", "1.3.0", True),
        ("1.3.0", "1.2.9", True),
        ("1.3.0", "1.3.7", True),
        ("1.3.0", "1.4.0", False),
        ("2.0.0", "1.0.0", False),
        ("1.0.0", "2.0.0", False),
    ],
)
def test_version_satisfies_the_same_major_and_no_higher_minor(provided: str, required: str, served: bool) -> None:
    assert Version.parse(provided).satisfies(Version.parse(required)) is served


@steady
@given(st.integers(0, VERSION_PART_MAX), st.integers(0, VERSION_MINOR_MAX), st.integers(0, VERSION_MINOR_MAX))
def test_version_is_read_as_it_is_written(major: int, minor: int, patch: int) -> None:
    version = Version(major, minor, patch)
    assert Version.parse(str(version)) == version


def test_versions_are_ordered_by_their_parts() -> None:
    texts = ["1.10.0", "1.9.9", "2.0.0", "1.9.10"]
    assert [str(each) for each in sorted(map(Version.parse, texts))] == [
        "1.9.9",
        "1.9.10",
        "1.10.0",
        "2.0.0",
    ]


def test_contract_is_named_by_id_text_or_host_contract_id() -> None:
    assert ContractRef.of(LOGGER) == ContractRef(LOGGER, "", None)
    assert ContractRef.of("host.logger@1") == ContractRef(LOGGER, "host.logger", Version(1))
    assert ContractRef.of("host.logger@1.2.3") == ContractRef(LOGGER, "host.logger", Version(1, 2, 3))
    assert ContractRef.of(HostContractId("host.logger", 1)) == ContractRef(LOGGER, "host.logger", Version(1))
    assert ContractRef.of(0).id == 0
    assert ContractRef.of(ID_MAX).id == ID_MAX


def test_contract_ref_is_written_by_name_and_major_or_else_by_id() -> None:
    assert str(ContractRef.of("host.logger@1.2.3")) == "host.logger@1"
    assert str(ContractRef.of(0x1234)) == "0x0000000000001234"


def test_guest_contract_is_no_contract_to_call() -> None:
    with pytest.raises(TypeError, match=r"guest contract data\.Reporter@3 is offered by a plugin"):
        ContractRef.of(GuestContractId("data.Reporter", 3))


@pytest.mark.parametrize("contract", [True, 1.0, None, b"host.kv@1"])
def test_contract_of_another_type_is_refused(contract: object) -> None:
    with pytest.raises(TypeError, match="a contract is named by an int or a str, not"):
        ContractRef.of(contract)  # type: ignore[arg-type]


@pytest.mark.parametrize("contract", [-1, ID_MAX + 1])
def test_contract_id_out_of_range_is_refused(contract: int) -> None:
    with pytest.raises(ValueError, match=r"is outside 0\.\.2\*\*64-1"):
        ContractRef.of(contract)


@pytest.mark.parametrize("text", ["", "host.logger", "host.logger@", "host.logger@x", "logger@1", "@1"])
def test_malformed_contract_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        ContractRef.of(text)


def test_text_without_a_version_says_how_to_write_one() -> None:
    with pytest.raises(ValueError, match=r"lacks its version: write 'host\.name@1' or 'host\.name@1\.2\.0'"):
        ContractRef.of("host.logger")


def test_contract_ref_and_version_cannot_be_changed() -> None:
    for frozen, name in ((ContractRef(1), "id"), (Version(1), "major")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 2)


@steady
@given(st.integers(0, ID_MAX))
def test_id_is_written_with_sixteen_upper_case_digits(contract_id: int) -> None:
    text = format_id(contract_id)
    assert len(text) == 18
    assert text[:2] == "0x"
    assert text[2:] == text[2:].upper()
    assert int(text, 16) == contract_id
