"""A host in a container of its own: registers a contract, calls it, crashes it, and calls it again."""

import struct
import time

from luacell.client import LuacellError, LuaFunction, LuaHostBridge

CONTRACT = "host.sum@1"
ADD, CRASH = 1, 2
SUM = LuaFunction("""
local ffi = require("ffi")
return function(fn_id, args, out)
    if fn_id == 2 then
        return ffi.cast("int32_t *", 0)[0]
    end
    local terms = ffi.cast("const int32_t *", args)
    ffi.cast("int32_t *", out)[0] = terms[0] + terms[1]
end
""")
PATIENCE_S = 30.0


def connect() -> LuaHostBridge:
    # Compose starts the services together: the broker may not listen yet.
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            return LuaHostBridge.connect()
        except LuacellError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.2)


def add(bridge: LuaHostBridge, a: int, b: int) -> int:
    (total,) = struct.unpack("=i", bridge.call(CONTRACT, ADD, struct.pack("=ii", a, b), out_size=4))
    assert isinstance(total, int)
    return total


def main() -> None:
    with connect() as bridge:
        bridge.register_host_contract(CONTRACT, SUM, replace=True)
        print(f"40 + 2 = {add(bridge, 40, 2)}")
        answer = bridge.call_host_contract(CONTRACT, CRASH, None, None)
        print(f"a read through a null pointer: {answer.code.name}: {answer.message}")
        print(f"and the host goes on: 1 + 2 = {add(bridge, 1, 2)}")


if __name__ == "__main__":
    main()
