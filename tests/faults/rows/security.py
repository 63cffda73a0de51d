"""Part S: security."""

from __future__ import annotations

from typing import Final

from tests.faults.rows.row import Row

ROWS: Final = (
    Row(
        "S10",
        "another uid looks into the run and state directories, connects, opens a socket's or the registry's file",
        "EACCES (no key files to be read or refused: there are no keys before there is a listener beyond this machine)",
        "directories of mode 0700, sockets and files of mode 0600",
    ),
    Row(
        "S11",
        "secrets in the environment of the service",
        "a contract does not see them, nor are they in its memory",
        "the worker host gets a clean environment and wipes it",
    ),
    Row(
        "S12",
        "each way out of its process: by a function of the C library, a bare system call, Python through FFI",
        "EPERM, EACCES or ENOSYS; the worker goes on, and its modules load",
        "seccomp, landlock",
    ),
    Row(
        "S12u",
        "a typed contract at `untrusted` tries to get FFI, bytecode, files or our own functions back",
        "nil, false or an error",
        "Lua has a list of what is harmless; seccomp and landlock as at `hardened`",
    ),
    Row("S13", "a crash, for its core file", "none; signal 11", "RLIMIT_CORE 0, not dumpable"),
    Row(
        "S15",
        "a kernel without landlock, or without seccomp; a service that is not root's",
        "without landlock `default` serves and says so, `hardened` is refused, to start or to load, naming the layer; "
        "without seccomp no level is had; who is not root has every layer",
        "the worker host tries its floor; a worker refuses what it is not confined for",
    ),
)
