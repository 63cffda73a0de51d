"""Deployment units with real processes: replaced whole or not at all, removed whole, and watched by `luacell dev`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from luacell.client import (
    AsyncLuaHostBridge,
    DeploymentError,
    DuplicateContract,
    HostContractNotFound,
    LuaFunction,
    LuaHostBridge,
    NotDeployed,
    VmRegistrationFailed,
)
from tests.soak import reloads
from tests.support.command import Command
from tests.support.contracts import DOUBLE, HEALTHY, answers, function
from tests.support.pending import has_begun
from tests.support.serving import Serving
from tests.support.waiting import LIMIT_S, eventually

FIRST, SECOND = "host.first@1", "host.second@1"
LASTS_S = 2.0
BROKEN = "return function(\n"


class Directory:
    """A deployment directory whose contracts answer with a number.

    Args:
        path: where it is made.
        contracts: their names.
        head: lines of `luacell.toml` before the contracts.
    """

    def __init__(self, path: Path, *contracts: str, head: str = "") -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        self.describe(*contracts, head=head)
        for contract in contracts:
            self.write(contract, 1)

    def describe(self, *contracts: str, head: str = "") -> None:
        tables = [f'[contract."{name}"]\nsource = "{_file(name)}"\n' for name in contracts]
        (self.path / "luacell.toml").write_text(head + "\n" + "".join(tables))

    def write(self, contract: str, number: int) -> None:
        self.source(contract, function(f'ffi.cast("uint32_t *", out)[0] = {number}'))

    def source(self, contract: str, source: str) -> None:
        (self.path / _file(contract)).write_text(source)


def _file(contract: str) -> str:
    return contract.partition("@")[0].removeprefix("host.") + ".lua"


def number_of(bridge: LuaHostBridge, contract: str) -> int:
    return int.from_bytes(bridge.call(contract, 0, b"", 4), "little")


def units_of(bridge: LuaHostBridge) -> dict[str, str]:
    return {str(info): info.unit for info in bridge.contracts()}


# -- deploying again ----
def test_a_unit_deployed_again_and_again_under_calls_fails_none() -> None:
    reloads.run(lasts_s=LASTS_S).check()


def test_a_unit_is_replaced_by_its_successor(bridge: LuaHostBridge, tmp_path: Path) -> None:
    unit = Directory(tmp_path / "unit", FIRST, SECOND)
    assert bridge.deploy(unit.path) == [FIRST, SECOND]
    assert units_of(bridge) == {FIRST: "unit", SECOND: "unit"}
    unit.write(FIRST, 2)
    unit.describe("host.first@1.4", SECOND)
    unit.path.rename(tmp_path / "elsewhere")
    with pytest.raises(DuplicateContract):  # the same contracts under another name
        bridge.deploy(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(unit.path)
    bridge.deploy(unit.path)
    assert (number_of(bridge, FIRST), number_of(bridge, SECOND)) == (2, 1)
    assert {info.name: info.version for info in bridge.contracts()}["host.first"] == "1.4.0"


def test_a_replacement_that_fails_in_part_changes_nothing(bridge: LuaHostBridge, tmp_path: Path) -> None:
    unit = Directory(tmp_path / "unit", FIRST, SECOND)
    bridge.deploy(unit.path)
    unit.write(FIRST, 2)
    unit.source(SECOND, BROKEN)
    unit.describe(FIRST, "host.third@1", SECOND)
    unit.write("host.third@1", 2)
    with pytest.raises(VmRegistrationFailed, match=r"second\.lua:2:"):
        bridge.deploy(unit.path)
    assert (number_of(bridge, FIRST), number_of(bridge, SECOND)) == (1, 1)
    assert list(units_of(bridge)) == [str(info) for info in bridge.contracts() if info.name != "host.third"]
    unit.write(SECOND, 2)
    assert bridge.deploy(unit.path) == [FIRST, "host.third@1", SECOND]  # nothing is held any longer
    assert (number_of(bridge, FIRST), number_of(bridge, SECOND)) == (2, 2)


def test_calls_in_flight_end_on_what_they_began_on(bridge: LuaHostBridge, tmp_path: Path) -> None:
    unit = Directory(tmp_path / "unit", FIRST)
    endless_for_a_while = 'for step = 1, 4e8 do ffi.cast("uint32_t *", out)[0] = step % 2 end\n'
    unit.source(FIRST, function(endless_for_a_while + 'ffi.cast("uint32_t *", out)[0] = 1'))
    bridge.deploy(unit.path)
    numbers: list[int] = []
    caller = threading.Thread(target=lambda: numbers.append(number_of(bridge, FIRST)))
    caller.start()
    eventually(lambda: has_begun(bridge), "the call has begun")
    unit.write(FIRST, 2)
    bridge.deploy(unit.path)
    assert number_of(bridge, FIRST) == 2
    caller.join(LIMIT_S)
    assert numbers == [1]


@pytest.mark.parametrize(
    ("contracts", "told"),
    [
        (["host.first@1.2", SECOND], r"host\.first@1 1\.2\.0 cannot replace 1\.3\.0.*'unit'"),
        ([SECOND], r"lacks host\.first@1.*'unit'"),
        (["host.first@2", SECOND], r"lacks host\.first@1"),
    ],
)
def test_what_is_no_successor_is_refused(
    bridge: LuaHostBridge, tmp_path: Path, contracts: list[str], told: str
) -> None:
    unit = Directory(tmp_path / "unit", "host.first@1.3", SECOND)
    bridge.deploy(unit.path)
    unit.describe(*contracts)
    with pytest.raises(DeploymentError, match=told):
        bridge.deploy(unit.path)
    bridge.undeploy(unit.path)
    assert len(bridge.deploy(unit.path)) == len(contracts)


def test_a_contract_registered_by_other_means_is_not_replaced(bridge: LuaHostBridge, tmp_path: Path) -> None:
    unit = Directory(tmp_path / "unit", FIRST, HEALTHY)
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
    with pytest.raises(DuplicateContract):
        bridge.deploy(unit.path)
    assert answers(bridge, HEALTHY)
    assert units_of(bridge) == {HEALTHY: ""}


API = """
[[host_contract]]
name = "host.first"
version = "1.0"
functions = [{{ name = "double", params = [{{ name = "number", type = "{}" }}], return = "u32" }}]
"""


def test_functions_that_hosts_would_misread_are_refused(bridge: LuaHostBridge, tmp_path: Path) -> None:
    unit = Directory(tmp_path / "unit", FIRST, head='api = "api.toml"')
    unit.source(FIRST, "local First = {}\nfunction First:double(n) return 2 * n end\nreturn First")
    (unit.path / "api.toml").write_text(API.format("u32"))
    bridge.deploy(unit.path)
    (unit.path / "api.toml").write_text(API.format("f32"))
    with pytest.raises(DeploymentError, match=r"function 0 'double' has other parameters"):
        bridge.deploy(unit.path)
    assert bridge.contract("host.first").double(21) == 42


# -- what a unit requires ----
def test_requirements_hold_at_deployment_and_removal(bridge: LuaHostBridge, tmp_path: Path) -> None:
    base = Directory(tmp_path / "base", "host.first@1.1")
    user = Directory(tmp_path / "user", SECOND, head='requires = ["host.first@1.2"]')
    with pytest.raises(DeploymentError, match=r"'user' requires host\.first 1\.2\.0, and nothing"):
        bridge.deploy(user.path)
    bridge.deploy(base.path)
    with pytest.raises(DeploymentError, match=r"'user' requires host\.first 1\.2\.0, and host\.first 1\.1\.0 is"):
        bridge.deploy(user.path)
    other_major = Directory(tmp_path / "major", SECOND, head='requires = ["host.first@2"]')
    with pytest.raises(DeploymentError, match=r"'major' requires host\.first 2\.0\.0, and host\.first 1\.1\.0 is"):
        bridge.deploy(other_major.path)
    assert units_of(bridge) == {FIRST: "base"}
    base.describe("host.first@1.2.3")
    bridge.deploy(base.path)
    bridge.deploy(user.path)
    with pytest.raises(DeploymentError, match=r"'base'.*'user' requires host\.first@1\.2\.0"):
        bridge.undeploy("base")
    assert units_of(bridge) == {FIRST: "base", SECOND: "user"}
    assert bridge.undeploy("user") == [SECOND]
    assert bridge.undeploy(base.path) == [FIRST]


def test_a_unit_that_is_not_there_is_told_with_those_that_are(bridge: LuaHostBridge, tmp_path: Path) -> None:
    unit = Directory(tmp_path / "unit", FIRST, head='name = "numbers"')
    with pytest.raises(NotDeployed, match="'numbers' is deployed; deployed are: none"):
        bridge.undeploy(unit.path)
    bridge.deploy(unit.path)
    with pytest.raises(NotDeployed, match="'unit' is deployed; deployed are: numbers"):
        bridge.undeploy("unit")
    bridge.undeploy("numbers")
    with pytest.raises(HostContractNotFound):
        bridge.call(FIRST, 0)


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ('name = ""', "name = '' is not a text of 1..128"),
        ("name = 5", "name = 5 is not a text"),
        ('requires = "host.first@1"', "is not a list of at most 256"),
        ('requires = ["host.first"]', "requires: .*lacks its version"),
        ("name = ", r"luacell\.toml:1:8: "),
    ],
)
def test_what_is_wrong_in_the_file_is_told(tmp_path: Path, bridge: LuaHostBridge, head: str, told: str) -> None:
    with pytest.raises(DeploymentError, match=told):
        bridge.deploy(Directory(tmp_path / "unit", FIRST, head=head).path)


# -- the other bridge, and a host that leaves ----
def test_units_are_deployed_and_removed_on_an_event_loop(tmp_path: Path) -> None:
    unit = Directory(tmp_path / "unit", FIRST, SECOND)

    async def main() -> None:
        async with AsyncLuaHostBridge() as bridge:
            await bridge.deploy(unit.path)
            unit.write(FIRST, 2)
            unit.source(SECOND, BROKEN)
            with pytest.raises(VmRegistrationFailed):
                await bridge.deploy(unit.path)
            assert await bridge.call(FIRST, 0, b"", 4) == b"\1\0\0\0"
            unit.write(SECOND, 2)
            assert await bridge.deploy(unit.path) == [FIRST, SECOND]
            assert await bridge.call(SECOND, 0, b"", 4) == b"\2\0\0\0"
            assert sorted(await bridge.undeploy("unit")) == [FIRST, SECOND]
            assert await bridge.contracts() == []

    asyncio.run(main())


def test_a_deployment_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    unit = Directory(tmp_path / "unit", FIRST, SECOND)
    unit.source(SECOND, "while true do end")

    async def main() -> None:
        async with AsyncLuaHostBridge() as bridge:
            deploying = asyncio.create_task(bridge.deploy(unit.path))
            while not any(each["state"] == "loading" for each in (await bridge.health())["workers"]):
                await asyncio.sleep(0)
            deploying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await deploying
            assert await bridge.contracts() == []
            await bridge.register_host_contract(FIRST, LuaFunction(DOUBLE))  # its id is free

    asyncio.run(main())


# -- the command, and a host without shared memory ----
@pytest.fixture
def endpoint() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dev-") as directory:
        path = Path(directory) / "run"
        path.mkdir(mode=0o700)
        with Serving(path):
            yield path


def test_a_host_without_shared_memory_deploys_and_removes(endpoint: Path, tmp_path: Path) -> None:
    unit = Directory(tmp_path / "unit", FIRST, SECOND)
    with LuaHostBridge.connect(f"ipc+inline://{endpoint}") as bridge:
        bridge.deploy(unit.path)
        unit.write(FIRST, 2)
        unit.source(SECOND, BROKEN)
        with pytest.raises(VmRegistrationFailed):
            bridge.deploy(unit.path)
        unit.write(SECOND, 2)
        bridge.deploy(unit.path)
        assert (number_of(bridge, FIRST), number_of(bridge, SECOND)) == (2, 2)
        assert sorted(bridge.undeploy("unit")) == [FIRST, SECOND]


def test_units_are_there_again_after_a_restart(tmp_path: Path) -> None:
    unit = Directory(tmp_path / "unit", FIRST, SECOND)
    with tempfile.TemporaryDirectory(prefix="again-") as directory:
        run_directory = Path(directory) / "run"
        run_directory.mkdir(mode=0o700)
        with Serving(run_directory), LuaHostBridge.connect(run_directory) as bridge:
            bridge.deploy(unit.path)
        with Serving(run_directory), LuaHostBridge.connect(run_directory) as bridge:
            assert units_of(bridge) == {FIRST: "unit", SECOND: "unit"}
            unit.write(FIRST, 2)
            bridge.deploy(unit.path)
            assert (number_of(bridge, FIRST), number_of(bridge, SECOND)) == (2, 1)


def test_a_host_that_leaves_in_the_middle_has_changed_nothing(endpoint: Path, tmp_path: Path) -> None:
    unit = Directory(tmp_path / "unit", FIRST, SECOND)
    with LuaHostBridge.connect(endpoint) as bridge:
        bridge.deploy(unit.path)
        unit.write(FIRST, 2)
        unit.source(SECOND, "while true do end")
        process = Command(endpoint).start("deploy", str(unit.path))
        eventually(lambda: any(each["state"] == "loading" for each in bridge.health()["workers"]), "it loads")
        process.kill()
        process.wait()
        assert (number_of(bridge, FIRST), number_of(bridge, SECOND)) == (1, 1)
        unit.write(SECOND, 2)

        def is_deployed() -> bool:
            with contextlib.suppress(DuplicateContract):  # until the broker has seen that the other host is gone
                return bool(bridge.deploy(unit.path))
            return False

        eventually(is_deployed, "nothing is held for a host that is gone")
        assert (number_of(bridge, FIRST), number_of(bridge, SECOND)) == (2, 2)


def test_deploy_and_undeploy_as_verbs(endpoint: Path, tmp_path: Path) -> None:
    luacell = Command(endpoint)
    unit = Directory(tmp_path / "unit", FIRST, SECOND)
    assert luacell("deploy", str(unit.path)).out.split() == [FIRST, SECOND]
    assert luacell("deploy", str(unit.path)).code == 0
    assert {row["unit"] for row in luacell("ls", "--output", "json").json} == {"unit"}
    unit.describe("host.first@1.0")
    refused = luacell("deploy", str(unit.path))
    assert (refused.code, "lacks host.second@1" in refused.errors) == (2, True)
    assert sorted(luacell("undeploy", "unit", "--output", "json").json["undeployed"]) == [FIRST, SECOND]
    gone = luacell("undeploy", str(unit.path))
    assert (gone.code, "no unit 'unit' is deployed" in gone.errors) == (3, True)


def test_dev_deploys_at_each_save_and_shows_errors_where_they_happened(endpoint: Path, tmp_path: Path) -> None:
    unit = Directory(tmp_path / "unit", FIRST)
    with tempfile.TemporaryFile() as output, LuaHostBridge.connect(endpoint) as bridge:
        process = Command(endpoint).start(
            "dev", str(unit.path), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _shows(output.fileno(), lambda text: text == f"deployed {FIRST}\n")
            unit.write(FIRST, 2)
            eventually(lambda: number_of(bridge, FIRST) == 2, "the new one is served")
            unit.source(FIRST, "\n\nlocal x = = 3\n")
            _shows(output.fileno(), lambda text: "first.lua:3:" in text)
            assert number_of(bridge, FIRST) == 2
            (unit.path / "luacell.toml").write_text('[contract."host.first@1"]\nsource = \n')
            _shows(output.fileno(), lambda text: f"{unit.path}/luacell.toml:2:" in text)
            unit.write(FIRST, 3)
            unit.describe(FIRST)
            eventually(lambda: number_of(bridge, FIRST) == 3, "what was put right is served")
            process.send_signal(signal.SIGINT)
            assert process.wait(LIMIT_S) == 130
        finally:
            process.kill()
            process.wait()
        assert "Traceback" not in _read(output.fileno())
        assert number_of(bridge, FIRST) == 3
        assert units_of(bridge) == {FIRST: "unit"}


def _read(descriptor: int) -> str:
    return os.pread(descriptor, 1 << 20, 0).decode()


def _shows(descriptor: int, is_shown: Callable[[str], bool]) -> None:
    eventually(lambda: is_shown(_read(descriptor)), "it is shown")
