"""What was acknowledged is there again, whatever was killed; what was refused is not; nothing is ever there by half."""

from __future__ import annotations

import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from luacell.client import (
    BridgeError,
    CallError,
    ContractLoadFailed,
    ContractNotFound,
    DuplicateContract,
    LuacellError,
    LuaFunction,
    LuaHostBridge,
    Unavailable,
    VmRegistrationFailed,
)
from luacell.protocol.paths import REGISTRY_FILE, STATE_LOCK_FILE
from tests.support.contracts import COUNTER, DOUBLE, HEALTHY, PROBE, answers, deploy, failure, function, refusal
from tests.support.processes import Process, Processes, broker_pid, workers_of
from tests.support.serving import AS_THE_FILES_SAY, Serving, run_broker
from tests.support.waiting import LIMIT_S, eventually, settles

NOBODY = 65534
BY_ID = 0xFEDCBA9876543210


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path, for sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="keep-") as directory:
        yield Path(directory)


@pytest.fixture
def run(home: Path) -> Path:
    return home / "run"


@pytest.fixture
def state(home: Path) -> Path:
    return home / "state"


def constant(number: int, padding: int = 0) -> str:
    """A contract that gives a number; the padding makes its source large."""
    return function(f'ffi.cast("uint32_t *", out)[0] = {number} --{"x" * padding}')


def number_of(bridge: LuaHostBridge, contract: str | int) -> int:
    return int.from_bytes(bridge.call(contract, 0, None, 4), "little")


def stored(state: Path) -> dict[str, bytes]:
    """Read name and source of every contract behind luacell's back."""
    with closing(sqlite3.connect(f"file:{state / REGISTRY_FILE}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT name, source FROM contracts JOIN sources USING (digest)")
        return dict(rows.fetchall())


# -- restarts ---------------------------------------------------------------------------------------------
def test_everything_about_a_contract_is_there_after_a_restart(run: Path, state: Path, home: Path) -> None:
    package = home / "package"
    package.mkdir()
    (package / "adder.lua").write_text("return 7\n")
    (package / "main.lua").write_text(
        function('ffi.cast("uint32_t *", out)[0] = require("adder") if fn_id == 1 then error("no") end')
    )
    (package / "luacell.toml").write_text(
        '[contract."host.sum@2.5.1"]\nsource = "main.lua"\ndeadline = "750ms"\nrun_limit = "900ms"\n'
        'memory = "8MiB"\nstateless = true\nworkers = 3\n'
    )
    with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
        bridge.deploy(package)
        bridge.register_host_contract(BY_ID, LuaFunction(constant(1)))
        before = bridge.contracts()
    shutil.rmtree(package)
    with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
        assert bridge.contracts() == before
        assert [info.version for info in before if info.name] == ["2.5.1"]
        assert workers_of(bridge, "host.sum@2") == [], "nothing is loaded before it is called"
        assert number_of(bridge, "host.sum@2") == 7
        assert "main.lua:" in failure(bridge, "host.sum@2", 1, out_size=4).message
        assert number_of(bridge, BY_ID) == 1


def test_replaced_and_removed_contracts_stay_so(run: Path, state: Path) -> None:
    with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
        for number in range(3):
            bridge.register_host_contract(f"host.n{number}@1", LuaFunction(constant(number)))
        bridge.register_host_contract("host.n1@1", LuaFunction(constant(11)), replace=True)
        bridge.unregister_host_contract("host.n2@1")
        with pytest.raises(DuplicateContract):
            bridge.register_host_contract("host.n0@1", LuaFunction(constant(100)))
    with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
        assert {str(info) for info in bridge.contracts()} == {"host.n0@1", "host.n1@1"}
        assert [number_of(bridge, f"host.n{number}@1") for number in range(2)] == [0, 11]


def test_refused_and_private_contracts_are_not_stored(run: Path, state: Path) -> None:
    with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
        assert isinstance(refusal(bridge, "this is no Lua"), VmRegistrationFailed)
        assert bridge.lua().eval("1 + 1") == 2
        assert stored(state) == {}
        bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
        assert stored(state) == {"host.probe": DOUBLE.encode()}


def test_state_of_a_vm_is_not_kept(run: Path) -> None:
    with Serving(run), LuaHostBridge.connect(run) as bridge:
        bridge.register_host_contract(PROBE, LuaFunction(COUNTER))
        assert [number_of(bridge, PROBE) for _ in range(3)] == [1, 2, 3]
    with Serving(run), LuaHostBridge.connect(run) as bridge:
        assert number_of(bridge, PROBE) == 1


def test_contract_that_no_longer_loads_fails_its_calls_and_can_be_replaced(run: Path, tmp_path: Path) -> None:
    needed = tmp_path / "needed.txt"
    needed.touch()
    source = f'assert(io.open("{needed}")) {DOUBLE}'
    with Serving(run), LuaHostBridge.connect(run) as bridge:
        deploy(bridge, source, read=[str(tmp_path)])
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
    needed.unlink()
    with Serving(run), LuaHostBridge.connect(run) as bridge:
        error = failure(bridge, PROBE, args=bytes(4), out_size=4)
        assert isinstance(error, ContractLoadFailed)
        assert "probe.lua" in error.message
        assert error.began == "no"
        assert answers(bridge, HEALTHY)
        bridge.register_host_contract(PROBE, LuaFunction(DOUBLE), replace=True)
        assert answers(bridge, PROBE)


def test_health_tells_version_epoch_and_state_directory(run: Path, state: Path) -> None:
    epochs = set()
    for _ in range(2):
        with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
            health = bridge.health()
        assert health["state_dir"] == str(state)
        assert health["version"].count(".") == 2
        assert len(bytes.fromhex(health["epoch"])) == 8
        epochs.add(health["epoch"])
    assert len(epochs) == 2


def test_state_lies_in_the_run_directory_where_no_other_was_named(run: Path) -> None:
    with Serving(run), LuaHostBridge.connect(run) as bridge:
        assert bridge.health()["state_dir"] == str(run / "state")
        bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    assert stored(run / "state") == {"host.probe": DOUBLE.encode()}
    assert (run / "state").stat().st_mode & 0o777 == 0o700


def test_embedded_service_leaves_no_state(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home))
    with LuaHostBridge() as bridge:
        bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
        (directory,) = home.iterdir()
        assert stored(directory / "state") == {"host.probe": DOUBLE.encode()}
        with Processes.of(bridge) as service:
            service.parent.kill()
            assert service.survivors(2.0) == []
        assert list(home.iterdir()) == [], "the broker cleans up for its parent"


# -- kill -9 ----------------------------------------------------------------------------------------------
class Registering:
    """A host that registers, replaces and removes without a pause, and keeps books of what was acknowledged."""

    def __init__(self, run: Path, number: int, seed: int) -> None:
        self.prefix = f"host.r{number}x"
        self.known: dict[str, str] = {}  # by name: the source that was acknowledged last
        self.unsure: dict[str, tuple[str, ...]] = {}  # by name: what an interrupted change may have made of it
        self.changes = 0
        self._run = run
        self._random = random.Random(seed)

    def work(self) -> None:
        """Change the registry until the service is gone."""
        with suppress(Unavailable), LuaHostBridge.connect(self._run) as bridge:
            while True:
                self._change(bridge)

    def _change(self, bridge: LuaHostBridge) -> None:
        name = f"{self.prefix}{self._random.randrange(6)}@1"
        before = self.known.get(name, "")
        size = self._random.choice((0, 0, 0, 5_000, 300_000))
        after = "" if before and self._random.random() < 0.3 else constant(self._random.randrange(1 << 30), size)
        self.unsure[name] = (before, after)
        try:
            if after:
                bridge.register_host_contract(name, LuaFunction(after), replace=True)
            else:
                bridge.unregister_host_contract(name)
        except BridgeError:  # it did not get a worker before the worker host was killed, for one
            after = before
        self.known[name] = after
        del self.unsure[name]
        self.changes += 1

    def check(self, found: dict[str, bytes]) -> None:
        """Compare with what is there; take over what an interrupted change has made of it."""
        for name in {*self.known, *self.unsure}:
            source = found.get(name.partition("@")[0], b"").decode()
            if name in self.unsure:
                assert source in self.unsure.pop(name), f"{name} is there by half"
                self.known[name] = source
            assert source == self.known[name], name
        mine = {f"{name}@1" for name in found if name.startswith(self.prefix)}
        assert mine == {name for name, source in self.known.items() if source}


VICTIMS: dict[str, Callable[[Processes], list[Process]]] = {
    "broker": lambda service: [service.broker],
    "worker host": lambda service: [service.worker_host],
    "everything": lambda service: [*service.look_again(), service.parent, service.broker, service.worker_host],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victims", VICTIMS.values(), ids=list(VICTIMS))
def test_what_was_acknowledged_is_there_after_kill_9(
    run: Path, state: Path, victims: Callable[[Processes], list[Process]]
) -> None:
    hosts = [Registering(run, number, seed=number) for number in range(3)]
    pauses = random.Random(7)
    for _ in range(5):
        wanted = sum(host.changes for host in hosts) + pauses.randrange(3, 25)

        def has_changed(wanted: int = wanted) -> bool:
            return sum(host.changes for host in hosts) >= wanted

        with Serving(run, state_directory=state) as serving:
            threads = [threading.Thread(target=host.work) for host in hosts]
            with LuaHostBridge.connect(run) as bridge, Processes.of(bridge) as service:
                for thread in threads:
                    thread.start()
                eventually(has_changed, "changes are made")
                for victim in victims(service):
                    victim.kill()
            serving.process.kill()
            serving.process.wait(LIMIT_S)
            for thread in threads:
                thread.join(LIMIT_S)
                assert not thread.is_alive()
            assert service_is_gone(run)
        found = stored(state)
        for host in hosts:
            host.check(found)
    with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
        listed = {str(info) for info in bridge.contracts()}
        assert listed == {name for host in hosts for name, source in host.known.items() if source}
        for host in hosts:
            for name, source in host.known.items():
                if source:
                    assert f"[0] = {number_of(bridge, name)} " in source
    assert sum(host.changes for host in hosts) > 50


def service_is_gone(run: Path) -> bool:
    """Wait until nobody holds the run directory any more."""

    def look() -> bool:
        with suppress(Unavailable):
            LuaHostBridge.connect(run).close()
            return False
        return True

    return eventually(look, "the service is gone")


# -- a registry that cannot be written ----------------------------------------------------------------------
def test_full_disk_refuses_the_registration_and_nothing_else(run: Path, state: Path) -> None:
    large = constant(2, padding=1 << 20)
    with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
        bridge.register_host_contract(PROBE, LuaFunction(constant(1)))
        assert number_of(bridge, PROBE) == 1
        pid = broker_pid(bridge)
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (500_000, before[1]))
        for _ in range(2):
            with pytest.raises(Unavailable, match=str(state / REGISTRY_FILE)) as caught:
                bridge.register_host_contract(PROBE, LuaFunction(large), replace=True)
            assert caught.value.began == "no"
            with pytest.raises(Unavailable, match="cannot write"):
                bridge.register_host_contract(HEALTHY, LuaFunction(large))
            assert number_of(bridge, PROBE) == 1
            with pytest.raises(ContractNotFound):
                bridge.call(HEALTHY, 0)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(Unavailable, match="cannot write"):
            bridge.unregister_host_contract(PROBE)
        assert [str(info) for info in bridge.contracts()] == [PROBE]
        assert number_of(bridge, PROBE) == 1
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        bridge.register_host_contract(PROBE, LuaFunction(large), replace=True)
        assert number_of(bridge, PROBE) == 2
        bridge.lua()
        settles(lambda: len(bridge.health()["workers"]), 3, "no worker of a refused contract is left")
    assert stored(state) == {"host.probe": large.encode()}


def test_calls_go_on_while_somebody_keeps_the_registry_from_being_written(run: Path, state: Path) -> None:
    with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge, LuaHostBridge.connect(run) as other:
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        with closing(sqlite3.connect(state / REGISTRY_FILE, isolation_level=None)) as shell:
            shell.execute("BEGIN IMMEDIATE")
            refused: list[LuacellError] = []

            def register() -> None:
                try:
                    other.register_host_contract(PROBE, LuaFunction(DOUBLE))
                except LuacellError as error:
                    refused.append(error)

            thread = threading.Thread(target=register)
            thread.start()
            calls = 0
            while thread.is_alive():
                assert answers(bridge, HEALTHY, calls)
                calls += 1
            thread.join()
            shell.execute("ROLLBACK")
        assert calls > 100, "the loop was not held up"
        assert [type(error) for error in refused] == [Unavailable]
        assert "locked" in str(refused[0])
        other.register_host_contract(PROBE, LuaFunction(DOUBLE))


def test_several_hosts_change_one_contract_at_once(run: Path, state: Path) -> None:
    """Whoever wins, what is served is what is stored."""
    with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
        bridges = [LuaHostBridge.connect(run) for _ in range(4)]

        def change(own: LuaHostBridge, seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(25):
                with suppress(BridgeError, CallError):
                    if chance.random() < 0.4:
                        own.unregister_host_contract(PROBE)
                    else:
                        own.register_host_contract(
                            PROBE, LuaFunction(constant(chance.randrange(1 << 30))), replace=True
                        )

        threads = [threading.Thread(target=change, args=(own, seed)) for seed, own in enumerate(bridges)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        for own in bridges:
            own.close()
        found = stored(state)
        assert len(bridge.contracts()) == len(found)
        if found:
            assert f"[0] = {number_of(bridge, PROBE)} ".encode() in found["host.probe"]


# -- directories and files that are refused -----------------------------------------------------------------
def open_to_all(state: Path) -> None:
    state.mkdir()
    state.chmod(0o755)


def symbolic_link(state: Path) -> None:
    (state.parent / "elsewhere").mkdir(mode=0o700)
    state.symlink_to("elsewhere")


def file_in_its_place(state: Path) -> None:
    state.touch()


def link_in_place_of_the_registry(state: Path) -> None:
    state.mkdir(mode=0o700)
    (state / REGISTRY_FILE).symlink_to("/etc/passwd")


def link_in_place_of_the_lock(state: Path) -> None:
    state.mkdir(mode=0o700)
    (state / STATE_LOCK_FILE).symlink_to("/etc/passwd")


def pipe_in_place_of_the_registry(state: Path) -> None:
    state.mkdir(mode=0o700)
    os.mkfifo(state / REGISTRY_FILE)


def directory_in_place_of_the_registry(state: Path) -> None:
    (state / REGISTRY_FILE).mkdir(parents=True)
    state.chmod(0o700)


def directory_of_another_user(state: Path) -> None:
    need_root()
    state.mkdir(mode=0o700)
    os.chown(state, NOBODY, NOBODY)


def registry_of_another_user(state: Path) -> None:
    need_root()
    state.mkdir(mode=0o700)
    (state / REGISTRY_FILE).touch()
    os.chown(state / REGISTRY_FILE, NOBODY, NOBODY)


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")


def damaged(state: Path) -> None:
    state.mkdir(mode=0o700)
    (state / REGISTRY_FILE).write_bytes(os.urandom(10_000))


def newer(state: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="keep-") as elsewhere,
        Serving(Path(elsewhere) / "run", state_directory=state),
    ):
        pass
    with closing(sqlite3.connect(state / REGISTRY_FILE)) as database:
        database.execute("PRAGMA user_version = 99")


def of_another_program(state: Path) -> None:
    state.mkdir(mode=0o700)
    with closing(sqlite3.connect(state / REGISTRY_FILE)) as database:
        database.execute("CREATE TABLE people (name TEXT)")


def with_a_sandbox_that_is_not_there(state: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="keep-") as elsewhere:
        run = Path(elsewhere) / "run"
        with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
            deploy(bridge, DOUBLE)
    with closing(sqlite3.connect(state / REGISTRY_FILE, isolation_level=None)) as database:
        database.execute("UPDATE settings SET value = 'watertight' WHERE name = 'sandbox'")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (open_to_all, "mode 0755"),
        (symbolic_link, "symbolic links are refused"),
        (file_in_its_place, "cannot make the state directory"),
        (link_in_place_of_the_registry, "symbolic links are refused"),
        (link_in_place_of_the_lock, "cannot open"),
        (pipe_in_place_of_the_registry, "no plain file"),
        (directory_in_place_of_the_registry, "no plain file"),
        (directory_of_another_user, "belongs to uid 65534"),
        (registry_of_another_user, "belongs to uid 65534"),
        (damaged, "is damaged"),
        (newer, "use the newer luacell"),
        (of_another_program, "no registry of luacell"),
        (with_a_sandbox_that_is_not_there, "'watertight' is none of"),
    ],
)
def test_state_that_cannot_be_served_is_refused_by_name(
    run: Path, state: Path, prepare: Callable[[Path], None], reason: str
) -> None:
    prepare(state)
    ended = run_broker(run, "--state-dir", str(state))
    assert ended.returncode == 78
    assert str(state) in ended.stderr
    assert reason in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("mode", [0o400, 0o600], ids=["read-only file", "read-only directory"])
def test_state_that_cannot_be_written_is_refused_by_name(run: Path, state: Path, mode: int) -> None:
    with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
        bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    (state / REGISTRY_FILE).chmod(mode)
    state.chmod(0o700 if mode == 0o400 else 0o500)
    ended = run_broker(run, "--state-dir", str(state), prefix=AS_THE_FILES_SAY)
    assert ended.returncode == 78
    assert f"cannot open {state / REGISTRY_FILE}: " in ended.stderr
    assert "Traceback" not in ended.stderr
    state.chmod(0o700)
    (state / REGISTRY_FILE).chmod(0o600)
    with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
        assert answers(bridge, PROBE)


def test_second_broker_on_a_state_directory_refuses_and_the_first_goes_on(run: Path, state: Path, home: Path) -> None:
    with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
        bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
        ended = run_broker(home / "other", "--state-dir", str(state))
        assert ended.returncode == 78
        assert f"another broker serves {state} (it holds {state / STATE_LOCK_FILE})" in ended.stderr
        assert answers(bridge, PROBE)
    with Serving(home / "other", state_directory=state), LuaHostBridge.connect(home / "other") as bridge:
        assert answers(bridge, PROBE)


@pytest.mark.timeout(240)
def test_full_registry_is_served_again_in_good_time(run: Path, state: Path) -> None:
    """Ten thousand contracts, written by the store itself; the service is up and lists and serves them."""
    subprocess.run([sys.executable, "-m", "tests.support.full_registry", str(state)], check=True, timeout=120)
    with Serving(run, state_directory=state), LuaHostBridge.connect(run) as bridge:
        assert len(bridge.contracts()) == 10_000
        assert number_of(bridge, "host.n9999@1") == 9999
        with pytest.raises(CallError, match="10000"):
            bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
        bridge.unregister_host_contract("host.n0@1")
        bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
