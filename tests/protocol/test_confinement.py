"""How strictly a worker is to be confined, and how layers travel."""

import pytest

from luacell.protocol.confinement import (
    POSTURE_MAX,
    SANDBOX_LEVELS,
    UNGRANTED,
    Confinement,
    Layer,
    read,
    stricter,
    written,
)


def test_levels_are_in_order() -> None:
    for low, level in enumerate(SANDBOX_LEVELS):
        for high, other in enumerate(SANDBOX_LEVELS):
            assert stricter(level, other) == SANDBOX_LEVELS[max(low, high)]


def test_floor_lifts_the_level_and_leaves_the_grants() -> None:
    assert Confinement("default", read="/srv").at_least("hardened") == Confinement("hardened", read="/srv")
    assert Confinement("untrusted").at_least("hardened") == Confinement("untrusted")


@pytest.mark.parametrize("granted", [{"read": "/a"}, {"write": "/a"}, {"network": True}])
def test_anything_granted_is_a_grant(granted: dict[str, str]) -> None:
    assert Confinement(**granted).has_grants  # type: ignore[arg-type]
    assert not UNGRANTED.has_grants


@pytest.mark.parametrize(
    ("confinement", "words"),
    [
        (UNGRANTED, ""),
        (Confinement("untrusted"), ""),
        (Confinement(read="/a\n/b", write="/c", network=True), ""),
        (Confinement("watertight"), "'watertight' is none of default, hardened, untrusted"),
        (Confinement("hardened", write="/a"), "level 'hardened' has none"),
        (Confinement(read="/a\nb"), "'b' is granted, and is no absolute path"),
        (Confinement(write="b"), "'b' is granted, and is no absolute path"),
    ],
)
def test_objection_names_what_is_wrong(confinement: Confinement, words: str) -> None:
    objection = confinement.objection()
    assert words in objection
    assert bool(words) == bool(objection)


def test_layers_arrive_as_they_were_written() -> None:
    layers = (
        Layer("seccomp", True, "no fork"),
        Layer("landlock", False, "this kernel has none"),
        Layer("bare", True, ""),
    )
    assert read(written(layers)) == layers
    assert read("") == ()


def test_layers_are_bounded_and_rubbish_is_not_in_force() -> None:
    assert len(written([Layer("x" * POSTURE_MAX, True, "y")])) == POSTURE_MAX
    assert read("rubbish\n\n?") == (Layer("ubbish", False, ""), Layer("", False, ""))
