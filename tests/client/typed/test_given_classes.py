"""Classes that a caller gives for structs and enums: used where they fit, refused where they do not."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

import pytest

from luacell.client.typed import HostTypes, compile_contract
from luacell.protocol.api import parse

API = parse(
    """
[[enum]]
name = "Mode"
repr = "u8"
variants = [{ name = "Off", value = "0" }, { name = "On", value = "1" }]
[[enum]]
name = "Access"
repr = "u8"
bitflag = true
variants = [{ name = "Read", value = "1" }, { name = "Write", value = "2" }]
[[types]]
name = "Point"
fields = [{ name = "mode", type = "Mode" }, { name = "access", type = "Access" }]
[[host_contract]]
name = "host.same"
version = "1"
[[host_contract.functions]]
name = "same"
params = [{ name = "point", type = "Point" }]
return = "Point"
""",
    "api.toml",
)


class Mode(IntEnum):
    Off = 0
    On = 1


class Access(IntFlag):
    Read = 1
    Write = 2


@dataclass(slots=True)
class Point:
    mode: Mode
    access: Access


def test_given_classes_are_taken_and_come_back() -> None:
    same = compile_contract(API, API.host_contracts[0], HostTypes(API, [Mode, Access, Point]))["same"]
    point = Point(Mode.On, Access.Read | Access.Write)
    made = same.unpack(same.pack((point,)))
    assert made == point
    assert (type(made), type(made.mode), type(made.access)) == (Point, Mode, Access)


def test_classes_that_are_not_given_are_made() -> None:
    types = HostTypes(API, [Mode])
    assert types.enums["Mode"] is Mode
    assert types.structs["Point"] is not Point


@pytest.mark.parametrize(
    "given",
    [
        IntEnum("Mode", [("Off", 0), ("On", 2)]),
        IntEnum("Mode", [("Off", 0)]),
        IntEnum("Access", [("Read", 1), ("Write", 2)]),
        type("Point", (), {}),
        dataclass(type("Point", (), {"__annotations__": {"access": int, "mode": int}})),
    ],
    ids=["other value", "variant lacks", "no flags", "no dataclass", "other order"],
)
def test_class_that_does_not_fit_is_refused(given: type) -> None:
    with pytest.raises(TypeError, match=f"{given.__name__} is not {given.__name__} as the api.toml declares it"):
        HostTypes(API, [given])
