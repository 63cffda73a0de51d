"""A host without shared memory that is to be killed: `python -m tests.support.vanishing ADDRESS CONTRACT_ID MODE`.

It writes a line when it is where it is to die, by mode:

    arguments  in the middle of the pieces of its arguments
    results    with results under way that it has not acknowledged
    running    in a call that never returns
    idle       without a call
    forked     without a call, with a child that has inherited everything; the second word of the line is its pid
"""

from __future__ import annotations

import os
import signal
import sys

from luacell.client import LuaHostBridge
from luacell.protocol.limits import INLINE_PIECE, MIB
from tests.support.peers import InlinePeer


def main(address: str, contract_id: int, mode: str) -> None:
    if mode == "forked":
        fork(address)
    peer = InlinePeer(address)
    if mode == "arguments":
        peer.call(contract_id, 1, bytes(INLINE_PIECE), args_size=16 * MIB)
        for number in range(1, 5):
            assert peer.credit().offset == number * INLINE_PIECE
            peer.piece(1, number * INLINE_PIECE, bytes(INLINE_PIECE))
        peer.credit()
    elif mode == "results":
        peer.call(contract_id, 1, out_size=16 * MIB)
        peer.result()
    elif mode == "running":
        peer.call(contract_id, 1, b"1", out_size=1, fn_id=1)
        assert peer.is_served()
    print("ready", flush=True)
    signal.pause()


def fork(address: str) -> None:
    bridge = LuaHostBridge.connect(address)
    child = os.fork()
    if child:
        print("ready", child, flush=True)
    while True:
        signal.pause()
        bridge.runtime_type()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
