"""Part C: a contract misbehaves."""

from __future__ import annotations

from typing import Final

from tests.faults.rows.row import Row

_SEGFAULT: Final = "WORKER_CRASHED, signal 11, began yes"
_PIDFD: Final = "the worker's pidfd; its cause comes from the worker host, which reaps it"
_LATE: Final = "DEADLINE_EXCEEDED, began yes, at most 250 ms after the deadline; the next call works"
_FREEZE: Final = "the worker is frozen, `begun` is read, then it is killed; a timer of the kernel as dead man's switch"
_NO_MEMORY: Final = "OUT_OF_MEMORY; the next call works"
_ERROR: Final = "102 with the text; the worker goes on"
_SECCOMP: Final = "seccomp"
_LANDLOCK: Final = "landlock"

ROWS: Final = (
    Row("C01", "reads through a null pointer", _SEGFAULT, _PIDFD),
    Row("C02", "writes through a null pointer", _SEGFAULT, _PIDFD),
    Row("C03", "calls a null function", _SEGFAULT, _PIDFD),
    Row("C04", "fills memory at a wild address", _SEGFAULT, _PIDFD),
    Row("C05", "overruns its heap by 2 GB", _SEGFAULT, _PIDFD),
    Row("C06", "makes a string of a bad pointer", _SEGFAULT, _PIDFD),
    Row("C07", "abort(), raise(SIGFPE)", "WORKER_CRASHED with the signal, began yes", _PIDFD),
    Row("C08", "os.exit(0)", "WORKER_CRASHED, exit code 0, began yes", _PIDFD),
    Row("C09", "os.exit(1), os.exit(true, true)", "WORKER_CRASHED with the exit code, began yes", _PIDFD),
    Row("C10", "exit(7) of C", "WORKER_CRASHED, exit code 7, began yes", _PIDFD),
    Row("C11", "_exit(0) of C", "WORKER_CRASHED, exit code 0, began yes", _PIDFD),
    Row("C15", "an empty loop for ever", _LATE, _FREEZE),
    Row("C16", "an arithmetic loop for ever", _LATE, _FREEZE),
    Row("C17", "a loop around pcall for ever", _LATE, _FREEZE),
    Row("C18", "sleep(60), pause()", _LATE, _FREEZE),
    Row("C19", "a read that blocks", _LATE, _FREEZE),
    Row("C21", "a pattern that backtracks exponentially", _LATE, _FREEZE + "; C code, where no hook fires"),
    Row("C22", "a pattern of lazy repetitions", _LATE, _FREEZE),
    Row("C23", "a slow gsub", _LATE, _FREEZE),
    Row("C24", "a slow gmatch", _LATE, _FREEZE),
    Row("C25", "doubles a string for ever", _NO_MEMORY, "the VM's own counter; the worker is not used again"),
    Row("C26", "fills a table for ever", _NO_MEMORY, "the VM's own counter; the worker is not used again"),
    Row("C28", "ffi.new until memory is out", _NO_MEMORY, "the VM's own counter"),
    Row("C29", "ffi.new of 2^40 bytes", "102 or OUT_OF_MEMORY; never a wrong size", "the VM's own counter"),
    Row(
        "C30",
        "malloc and memset until memory is out",
        "signal 11 where it does not look at what malloc gave, its own error where it does, OUT_OF_MEMORY where Lua "
        "gets none; the next call works",
        "RLIMIT_DATA at twice max_rss; seccomp for memory that it does not count",
    ),
    Row(
        "C32",
        "a chain of closures without end",
        _NO_MEMORY,
        "the VM's own counter; the worker is not used again",
    ),
    Row("C33", "coroutines without end", _NO_MEMORY, "the VM's own counter; the worker is not used again"),
    Row("C34", "recursion in Lua and through __index", "102 “stack overflow”; the worker goes on", "LuaJIT"),
    Row("C36", "recursion through gsub's callback", "102 “stack overflow”; the worker goes on", "64 MiB of stack"),
    Row("C38", "100,000 nested parentheses or tables", _ERROR, "LuaJIT's parser"),
    Row("C39", "unpack of 10,000,000 values", _ERROR, "LuaJIT"),
    Row("C40", "33 captures", _ERROR, "LuaJIT"),
    Row("C40b", "socket, connect to the broker or by TCP, bind", "EPERM", _SECCOMP),
    Row("C41", "fork, whose child would answer too", "EPERM; one answer", _SECCOMP),
    Row("C43", "fork, 40 times", "EPERM", _SECCOMP),
    Row("C44", "closes its descriptors 0 to 255", "its own call crashes or is answered", "EOF orders a kill; `done`"),
    Row("C45", "answers a call, begins the next and crashes at once", "each gets its own answer", "`done` in the slot"),
    Row("C46", "floods stdout by print, io.write and write(1)", "as without", "pipes that do not block; 64 KiB a call"),
    Row("C47", "floods stderr by io.stderr and write(2)", "as without", "pipes that do not block; 64 KiB a call"),
    Row("C48", "kill(getppid(), 9)", "EPERM", _SECCOMP),
    Row("C50", "os.execute", "refused", _SECCOMP),
    Row("C51", "io.popen", "refused", _SECCOMP),
    Row("C52", "execve", "EPERM", _SECCOMP),
    Row("C53", "posix_spawn", "EPERM", _SECCOMP),
    Row("C54", "reads a secret file, the registry, and other memory by /proc", "EACCES", _LANDLOCK),
    Row("C55", "writes files", "EACCES", _LANDLOCK),
    Row("C56", "changes its directory and opens the registry", "EACCES", _LANDLOCK),
    Row("C58", "python.eval", "nil", "lupa's module is taken away"),
    Row("C59", "python.builtins", "nil", "lupa's module is taken away"),
    Row("C60", "PyRun_SimpleString, which opens a secret file", "EACCES", _LANDLOCK),
    Row("C61", "PyRun_SimpleString, which starts a program", "EPERM", _SECCOMP),
    Row("C62", "error(“text”)", "102 with text and traceback; the worker goes on", "xpcall"),
    Row("C63", "error({…})", "102 with the type; the worker goes on", "xpcall"),
    Row("C70", "an error object whose __tostring raises", "102 “(error object …)”", "pcall in the handler"),
    Row("C71", "an error object whose __tostring returns 42", "102 “(error object …)”", "its type is checked"),
    Row("C74", "an error object whose __tostring loops for ever", _LATE, "the deadline covers the handler"),
    Row("C75", "an error message of 64 MB", "102, cut to 4 KiB, “truncated”", "cut in Lua"),
    Row("C78", "an error in __gc", "as without; the worker goes on", "LuaJIT; told as a log record"),
    Row(
        "C79",
        "an error in a finalizer of ffi.gc",
        "as without; the worker goes on",
        "LuaJIT; told as a log record",
    ),
    Row("C83", "a typed result that is no UTF-8", "102 naming the value", "checked before it is written"),
    Row("C84", "a typed result that is a coroutine", "102 naming the type", "checked before it is written"),
    Row("C85", "a typed result of 64 MB", "TOO_LARGE, or the result", "the limit of payloads"),
    Row(
        "C86",
        "a typed function that returns 7,000 values",
        "102, or the first of them",
        "checked before it is written",
    ),
    Row(
        "C87",
        "a typed result of tables nested 100,000 deep",
        "102 naming the field",
        "the layout bounds the walk",
    ),
    Row(
        "C91",
        "poisons _G and the metatable of strings",
        "its own contract alone",
        "a process for each contract",
    ),
    Row(
        "C94",
        "collectgarbage(“stop”)",
        "OUT_OF_MEMORY when it is full; the next call works",
        "the VM's own counter",
    ),
    Row("C95", "jit.off()", "slower", "a process for each contract"),
    Row("C96", "bytecode", "VmRegistrationFailed", "chunks are loaded as text only"),
    Row("C97", "bytecode, cut", "VmRegistrationFailed", "chunks are loaded as text only"),
    Row("C98", "leaks 10 KB a call", "no call fails", "recycled at max_rss and max_calls"),
    Row(
        "C99",
        "answers, then dies while it is idle",
        "nobody sees it",
        "its pidfd; the next call goes to another worker",
    ),
    Row("C100", "answers for another call; answers twice", "its own call fails", "call numbers; the forger is killed"),
)
