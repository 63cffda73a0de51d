"""Part M of the catalogue, as far as it is about memory that is refused, and one host's data in sight of another."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from luacell.client import AbiErrorCode, HostContractId, LuaFunction, LuaHostBridge
from luacell.protocol import messages
from luacell.protocol.messages import id_bytes
from tests.support.contracts import DOUBLE, HEALTHY, PROBE, answers, function
from tests.support.failing import OPERATIONS, Control, program
from tests.support.peers import Peer
from tests.support.serving import Serving

CANARY = b"canary of the first host "
LOOKS = 500


@pytest.mark.parametrize("operation", ["memfd_create", "fallocate", "mmap"])
def test_m10_no_memory_at_the_nth_allocation_is_busy(tmp_path: Path, operation: str) -> None:
    run_directory = tmp_path / "run"
    run_directory.mkdir(mode=0o700)
    with (
        Control(tmp_path / "control") as control,
        Serving(run_directory, program=program(control)),
        LuaHostBridge.connect(run_directory) as bridge,
        Peer(run_directory) as peer,
    ):
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        contract = id_bytes(int(HostContractId("host.healthy", 1)))
        for code in OPERATIONS[operation]:
            for number in (1, 2):  # args, and out
                control.arm(operation, "broker", code, number)
                request = messages.Lease(request_id=peer.new_id(), contract=contract, args_size=4, out_size=4, count=4)
                peer.tell(request)
                assert peer.reply().code == AbiErrorCode.BUSY, errno.errorcode[code]
                assert control.disarm()
        assert answers(bridge, HEALTHY)
        assert bridge.health()["hosts"] == 2


def test_m18_no_host_sees_what_another_has_sent_or_got(tmp_path: Path) -> None:
    run_directory = tmp_path / "run"
    run_directory.mkdir(mode=0o700)
    # fn 1 keeps nothing and echoes, fn 2 writes nothing, so that what lies in out is seen.
    source = function("if fn_id == 1 then ffi.copy(out, args, 1000) end")
    with (
        Serving(run_directory),
        LuaHostBridge.connect(run_directory) as one,
        LuaHostBridge.connect(run_directory) as other,
    ):
        one.register_host_contract(PROBE, LuaFunction(source))
        secret = (CANARY * 40)[:1000]
        for _ in range(LOOKS):
            assert one.call(PROBE, 1, secret, 1000) == secret
            assert other.call(PROBE, 2, None, 4000) == bytes(4000)
