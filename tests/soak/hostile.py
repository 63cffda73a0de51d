"""The contracts of `chaos`: healthy ones, and one for each way to misbehave, with what callers are then told.

All double an i32, so that a value is always the call's own; what is hostile is done before.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tests.soak.history import VALUE
from tests.support.contracts import function

HEALTHY_NAMES: Final = tuple(f"host.healthy{number}@1" for number in range(4))
DOUBLED: Final = "ffi.cast('int32_t *', out)[0] = 2 * ffi.cast('int32_t *', args)[0]"
DECLARED: Final = """
require("ffi").cdef[[
  void abort(void); void _exit(int); int raise(int); int pause(void); int fork(void); int close(int);
  int kill(int, int); int getppid(void);
]]
"""
FAILED: Final = "HostContractCallFailed"
# What may come of any call here: its worker, worker host or broker was killed or stopped.
FROM_OUTSIDE: Final = frozenset({"WorkerCrashed", "Unavailable"})
# A contract whose calls crash rests; and these calls have less time than a broker needs to be back.
OF_HOSTILE: Final = FROM_OUTSIDE | {"Quarantined", "DeadlineExceeded", "Busy"}


class Misdeed(NamedTuple):
    """What is done, and the answers that are right for it beside those of all hostile calls."""

    body: str
    outcomes: frozenset[str]


HOSTILE: Final = {
    name: Misdeed(body, frozenset(outcomes))
    for name, body, *outcomes in (
        ("segfault", "ffi.cast('volatile int *', 0)[0] = 1"),
        ("wildfill", "ffi.fill(ffi.cast('char *', 0x10000), 1e9, 65)"),
        ("abort", "ffi.C.abort()"),
        ("raise", "ffi.C.raise(8)"),
        ("exit", "os.exit(0)"),
        ("exitnow", "ffi.C._exit(0)"),
        ("loop", "while true do end"),
        ("pcalls", "while true do pcall(error, 'x') end"),
        ("pause", "ffi.C.pause()"),
        ("pattern", "string.find(('a'):rep(30), ('a?'):rep(30) .. ('a'):rep(30))"),
        ("stringbomb", "local s = 'x' while true do s = s .. s end", "OutOfMemory"),
        ("tablebomb", "local t = {} while true do t[#t + 1] = {} end", "OutOfMemory"),
        ("error", "error('text')", FAILED),
        ("errortable", "error({ code = 7 })", FAILED),
        ("errorloop", "error(setmetatable({}, { __tostring = function() while true do end end }))"),
        ("overflow", "local function f() return f() + 1 end f()", FAILED),
        ("flood", "for _ = 1, 200 do print(('x'):rep(9999)) io.stderr:write(('y'):rep(9999)) end", VALUE),
        ("close", "for number = 0, 255 do ffi.C.close(number) end", VALUE),
        ("fork", "for _ = 1, 40 do if ffi.C.fork() ~= -1 then error('forked') end end", VALUE),
        ("kill", "assert(ffi.C.kill(ffi.C.getppid(), 9) == -1)", VALUE),
        ("execute", "assert(os.execute('exit 0') ~= 0)", VALUE),
        ("poison", "getmetatable('').__index = function() error('poisoned') end", VALUE),
    )
}


def name_of(misdeed: str, copy: int) -> str:
    """Return the name of a contract; several do the same, since those that crash are soon made to rest."""
    return f"host.{misdeed}{copy}@1"


def source_of(misdeed: str) -> str:
    return DECLARED + function(f"do {HOSTILE[misdeed].body} end {DOUBLED}")


def outcomes_of(contract: str) -> frozenset[str]:
    """Return all answers that are right for a call."""
    if contract in HEALTHY_NAMES:
        return FROM_OUTSIDE | {VALUE}
    misdeed = contract.removeprefix("host.").partition("@")[0].rstrip("0123456789")
    return OF_HOSTILE | HOSTILE[misdeed].outcomes
