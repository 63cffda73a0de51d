"""A host in a process of its own, to be interrupted and killed: `python -m tests.support.host MODE`.

It writes one JSON line when it is ready, with the pids of its service, and then, by mode:

    idle      waits for a line on stdin, calls once more and ends
    calling   makes a call that never returns, and writes how it ended
    carefree  like idle, without ever closing its bridge
    forked    forks; both write what a call gives them, the parent waits like idle, the child for ever
"""

from __future__ import annotations

import json
import os
import signal
import sys

from luacell.client import BridgeError, CallError, LuaFunction, LuaHostBridge
from tests.support.contracts import DOUBLE, HEALTHY, PROBE, answers, deploy, function
from tests.support.processes import broker_pid, status_of


def main(mode: str) -> None:
    bridge = LuaHostBridge()
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
    deploy(bridge, function("while true do end"), PROBE, deadline="30s")
    assert answers(bridge, HEALTHY)
    broker = broker_pid(bridge)
    status = status_of(broker)
    assert status is not None
    tell(broker=broker, parent=status.parent)
    if mode == "calling":
        tell(ended=outcome(bridge, PROBE))
    elif mode == "forked":
        fork(bridge)
    wait_for_line()
    tell(answers=answers(bridge, HEALTHY))
    if mode != "carefree":
        bridge.close()


def fork(bridge: LuaHostBridge) -> None:
    child = os.fork()
    if child == 0:
        tell(child=outcome(bridge, HEALTHY), pid=os.getpid())
        bridge.close()
        while True:
            signal.pause()
    tell(parent=outcome(bridge, HEALTHY))


def outcome(bridge: LuaHostBridge, contract: str) -> str:
    try:
        bridge.call(contract, 0, bytes(4), 4)
    except (CallError, BridgeError) as error:
        return type(error).__name__
    return "ok"


def wait_for_line() -> None:
    """Wait to be told to go on; Ctrl-C is no reason to end."""
    while True:
        try:
            sys.stdin.readline()
            return
        except KeyboardInterrupt:
            tell(interrupted=True)


def tell(**values: object) -> None:
    os.write(1, json.dumps(values).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
