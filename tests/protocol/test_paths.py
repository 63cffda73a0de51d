"""Names of files, and the directory where a service is looked for."""

from pathlib import PurePath

import pytest

from luacell.protocol import paths
from luacell.protocol.paths import default_run_directory, default_state_directory


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_RUNTIME_DIR": "/run/user/1000"}, "/run/user/1000/luacell"),
        ({"XDG_RUNTIME_DIR": ""}, "/run/luacell"),
        ({}, "/run/luacell"),
        ({"HOME": "/root"}, "/run/luacell"),
    ],
)
def test_default_run_directory_is_the_users_or_the_machines(environment: dict[str, str], expected: str) -> None:
    assert default_run_directory(environment) == PurePath(expected)


@pytest.mark.parametrize(
    ("environment", "is_root", "expected"),
    [
        ({"XDG_STATE_HOME": "/state"}, False, "/state/luacell"),
        ({"XDG_STATE_HOME": "/state"}, True, "/state/luacell"),
        ({"XDG_STATE_HOME": ""}, True, "/var/lib/luacell"),
        ({}, False, "/home/ada/.local/state/luacell"),
    ],
)
def test_default_state_directory_is_the_users_or_the_machines(
    environment: dict[str, str], is_root: bool, expected: str
) -> None:
    assert default_state_directory(environment, "/home/ada", is_root=is_root) == PurePath(expected)


def test_files_of_a_state_directory_keep_their_names() -> None:
    assert paths.STATE_DIRECTORY == "state"
    assert paths.STATE_FILES == ("registry.db", "registry.db-wal", "registry.db-shm", "registry.lock")


def test_files_of_a_run_directory_keep_their_names() -> None:
    assert paths.BROKER_SOCKET == "broker.sock"
    assert paths.DESCRIPTOR_SOCKET == "fd.sock"
    assert paths.LOCK_FILE == "broker.lock"
    assert paths.ENDPOINT_VARIABLE == "LUACELL_ENDPOINT"
    assert paths.EMBEDDED_PREFIX == "luacell-"
