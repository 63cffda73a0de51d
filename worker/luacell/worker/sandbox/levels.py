"""Which layers a level of the sandbox has, the order in which a worker takes them on, and what is said of them.

    worker host:  prepare (a ruleset)                       ─┐ fork
    worker:       die_with_parent, quiet                     │
                  begin: not dumpable, no environment, limits, no privileges, landlock
                  connect to the broker                      │
                  finish: no growth, seccomp on every thread │
                  READY, LOAD, Lua                          ─┘

A level that was asked for and cannot be had is refused, with the layer's name; but `default` does without landlock
where the kernel has none, and says so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Final, Self

from luacell.protocol.confinement import DEFAULT, UNTRUSTED, Confinement, Layer, read, written
from luacell.worker.sandbox import attributes, landlock, seccomp
from luacell.worker.sandbox.attributes import SandboxUnavailable
from luacell.worker.sandbox.bpf import Template
from luacell.worker.sandbox.calls import DEFAULT_FILTER, HARDENED_FILTER, NETWORK_FILTER

STACK_SIZE: Final = 64 << 20  # bytes; recursion through C (gsub callbacks) overruns the usual 8 MiB
_REPORT_SIZE: Final = 1 << 14  # bytes

_NEVER_GRANTED: Final = ("/proc",)
_WRITE_XOR_EXECUTE: Final = Layer(
    "W^X", False, "impossible: LuaJIT writes the code that it runs, so memory may be made executable at every level"
)
_ONLY_LUA: Final = Layer("no FFI", True, "no ffi, io, debug, jit, bytecode or C modules; of os only the time")
_BARE: Final = (
    Layer("death with its worker host", True, "PDEATHSIG; the filter keeps it from being taken back"),
    Layer("not dumpable", True, "no other process of its user may look into it"),
    Layer("clean environment", True, "time zone and language only"),
    Layer("limits", True, "no core files; a stack of 64 MiB; memory as the contract says"),
    Layer("no privileges", True, "no_new_privs, and no capabilities"),
)


class Preparation:
    """What a worker host prepares for a worker before it forks it; closed by the worker host afterwards.

    Args:
        confinement: how the worker will be confined.
        forbidden: directories that no grant may reach, or reach into: the run and the state directory.

    Attributes:
        objection: why a worker that is confined like this must not load anything, or "".
        layers: what was found out so far.

    Raises:
        OSError: something that is there cannot be had now, such as a descriptor; the worker cannot be started.
    """

    def __init__(self, confinement: Confinement, forbidden: Iterable[str] = ()) -> None:
        self.confinement = confinement
        self.objection = confinement.objection()
        self.ruleset: landlock.Ruleset | None = None
        self.layers: list[Layer] = []
        if self.objection:
            return
        try:
            self.ruleset = landlock.Ruleset(network=confinement.network)
            self._fill(self.ruleset, [os.path.realpath(each) for each in (*_NEVER_GRANTED, *forbidden)])
        except SandboxUnavailable as error:
            self.layers.append(Layer(landlock.LAYER, False, error.reason))
            if confinement.level != DEFAULT:
                self.objection = str(error)
        except landlock.GrantUnavailable as error:
            self.objection = str(error)
        except OSError:
            self.close()
            raise

    @property
    def template(self) -> Template:
        """The filter of this confinement."""
        if self.confinement.level != DEFAULT:
            return HARDENED_FILTER
        return NETWORK_FILTER if self.confinement.network else DEFAULT_FILTER

    def _fill(self, ruleset: landlock.Ruleset, forbidden: Iterable[str]) -> None:
        what = "no files at all"
        if self.confinement.level == DEFAULT:
            ruleset.allow_reading(landlock.SYSTEM_PATHS)
            ruleset.allow_sinks(landlock.SINK_PATHS)
            what = "the system's libraries, read-only"
            if self.confinement.network:
                ruleset.allow_reading(landlock.NETWORK_PATHS)
            for text, write in ((self.confinement.read, False), (self.confinement.write, True)):
                for path in filter(None, text.split("\n")):
                    _refuse_overlap(path, forbidden, write=write)
                    ruleset.grant(path, write=write)
                    what += f", {path} to {'write' if write else 'read'}"
        version = landlock.abi_version()
        lacks = landlock.what_it_lacks(version)
        self.layers.append(Layer(landlock.LAYER, True, f"{what} (version {version}{', ' + lacks if lacks else ''})"))

    def close(self) -> None:
        """Give the ruleset back."""
        if self.ruleset is not None:
            self.ruleset.close()
            self.ruleset = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_overlap(path: str, forbidden: Iterable[str], *, write: bool) -> None:
    """Refuse a grant that would open what no contract may have.

    Raises:
        GrantUnavailable: it lies within a forbidden directory, or holds one.
    """
    real = os.path.realpath(path)
    for each in forbidden:
        if os.path.commonpath((real, each)) in (real, each):
            kind = "write" if write else "read"
            raise landlock.GrantUnavailable(f"{kind} = {path!r} cannot be granted: {each} must stay out of reach")


class Sandbox:
    """What a worker takes on between its fork and its first line of Lua.

    Args:
        preparation: its worker host's.

    Attributes:
        layers: those in force, and those that are not with the reason.
    """

    def __init__(self, preparation: Preparation) -> None:
        self._preparation = preparation
        self._witness = seccomp.Witness()
        self.confinement = preparation.confinement
        self.objection = preparation.objection
        self.layers: list[Layer] = []

    def begin(self) -> None:
        """Take on what later threads inherit; before there are any.

        Raises:
            SandboxUnavailable: a layer cannot be had that no level does without.
        """
        attributes.hide_memory()
        attributes.forget_environment()
        attributes.set_limits(STACK_SIZE)
        attributes.forgo_privileges()
        attributes.drop_capabilities()
        if self._preparation.ruleset is not None:
            self._preparation.ruleset.restrict()
        self.layers += [*_BARE, *self._preparation.layers]

    def finish(self) -> None:
        """Take on the rest, once all threads are there and all connections made.

        Raises:
            SandboxUnavailable: the filter cannot be had.
        """
        confinement = self.confinement
        attributes.forbid_growth(may_write=bool(confinement.write))
        seccomp.confine(self._preparation.template, self._witness)
        what = "no processes, threads, signals to others, tracing, mounts, keys"
        if confinement.level != DEFAULT:
            what = f"only {len(HARDENED_FILTER.rules)} system calls are known; {what}, sockets or opening of files"
        elif confinement.network:
            what += "; sockets of the internet only"
        else:
            what += " or sockets"
        growth = "no more processes or threads" + ("" if confinement.write else ", no bytes in files or memfds")
        self.layers += [Layer(seccomp.LAYER, True, what), Layer("no growth", True, growth)]
        if confinement.level == UNTRUSTED:
            self.layers.append(_ONLY_LUA)
        self.layers.append(_WRITE_XOR_EXECUTE)


def trial(level: str) -> tuple[tuple[Layer, ...], str]:
    """Confine a throwaway process as a worker of a level is; return its layers, and why it could not be or "".

    For a process with one thread.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with Preparation(Confinement(level)) as preparation:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _confine_and_tell(preparation, parent, writing)
    os.close(writing)
    report = b""
    while piece := os.read(reading, _REPORT_SIZE):
        report += piece
    os.close(reading)
    os.waitpid(child, 0)
    problem, _, posture = report.decode("utf-8", "replace").partition("\n")
    if not report:
        problem = "the process that tried it died"
    return read(posture), problem


def _confine_and_tell(preparation: Preparation, parent: int, report: int) -> None:
    """Be the throwaway process; never returns."""
    sandbox, problem = None, ""
    with contextlib.suppress(BaseException):
        try:
            attributes.die_with_parent(parent)
            sandbox = Sandbox(preparation)
            sandbox.begin()
            sandbox.finish()
            problem = sandbox.objection
        except (SandboxUnavailable, OSError, ValueError) as error:
            problem = str(error)
        layers = sandbox.layers if sandbox is not None else []
        if problem and not layers:
            layers = preparation.layers
        os.write(report, (problem.replace("\n", " ") + "\n" + written(layers)).encode())
    os._exit(0)
