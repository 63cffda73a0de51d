"""A service one of whose broker's handlers raises: `python breaking.py CONTROL MODULE OPTIONS…`, and who controls it.

The program wraps every handler of the broker's loop and every thread of the broker, and then runs the parent or the
broker as they are. What there is to wrap is read from the broker's own tables and types, so that a
handler which is added is there as well (`HANDLERS`). Which one raises, once, is told by a file that the processes have
mapped; it says afterwards when that was.
"""

from __future__ import annotations

import mmap
import re
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, get_args

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))  # it is run by its path

from luacell.broker import gate, hosts, inline, keeper, model, server, watcher, workers
from luacell.broker.crash_keeper import CrashKeeper
from luacell.broker.dispatcher import Dispatcher
from luacell.broker.timers import TimerWheel

_BROKER: Final = Path(server.__file__).parent
_ARMED, _RAISED_NS = range(2)  # the words of the file
_SIZE: Final = 2 * 8

# What has a table of its own, by the word before its operation.
TABLES: Final[dict[str, dict[Any, Callable[..., Any]]]] = {
    "host": hosts.HANDLERS,
    "inline": inline.HANDLERS,
    "worker": workers.HANDLERS,
    "report": workers.REPORTS,
}
# Where the loop goes by itself: on the hot path, for several calls in one message, and as time passes.
METHODS: Final[tuple[tuple[type, str], ...]] = (
    (Dispatcher, "quick_call"),
    (Dispatcher, "quick_done"),
    (Dispatcher, "call_arrived"),
    (Dispatcher, "worker_done"),
    (Dispatcher, "refill"),
    (server.Server, "_on_nested"),
    (server.Server, "_greet_inline"),
    (server.Server, "_greet"),
    (server.Server, "_find_step"),
    (server.Server, "_pass_time"),
    (server.Server, "_choose_tick"),
    (server.Server, "_tell_forgotten"),
    (workers.Workers, "time_passed"),
    (workers.Workers, "send_map"),
    (inline.InlineHosts, "time_passed"),
    (inline.InlineHosts, "step"),
)
# What each thread does again and again, by its name.
THREADS: Final[dict[str, tuple[Any, str]]] = {
    "luacell-watcher": (watcher.Watcher, "_turn"),
    "luacell-keeper": (keeper, "_done"),
    "luacell-crashes": (CrashKeeper, "_write"),
    "luacell-gate": (gate.Gate, "_look"),
}
# Waits for one thing and ends the broker then.
ENDING_THREADS: Final = ("luacell-parent",)


def threads_of_the_broker() -> set[str]:
    """Return the names of all threads that the broker's code starts."""
    sources = "".join(path.read_text() for path in _BROKER.glob("*.py"))
    names = re.findall(r'Thread\(.*name="([^"]+)"', sources)
    assert len(names) == len(re.findall(r"\bThread\(", sources)), "every thread has a name, on its own line"
    return set(names)


def _all_handlers() -> tuple[str, ...]:
    return (
        *(f"{table} {op.name}" for table, handlers in TABLES.items() for op in handlers),
        *(f"heard {item.__name__}" for item in get_args(watcher.Item)),
        *(f"timer {subject.__name__}" for subject in get_args(model.Subject)),
        *(f"effect {effect.__name__}" for effect in get_args(model.Effect)),
        *(f"{owner.__name__} {name}" for owner, name in METHODS),
        *(f"thread {name}" for name in THREADS),
    )


HANDLERS: Final = _all_handlers()


class Control:
    """What is to raise, as the test sees it.

    Args:
        path: of the file; made anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(_SIZE))
        self._words = _map(path)

    def arm(self, handler: str) -> None:
        """Let a handler raise the next time it is called, once."""
        self._words[_RAISED_NS] = 0
        self._words[_ARMED] = 1 + HANDLERS.index(handler)

    @property
    def raised_ns(self) -> int:
        """When it has raised (CLOCK_MONOTONIC), or 0."""
        return self._words[_RAISED_NS]

    @property
    def program(self) -> list[str]:
        """What to give Python instead of "-m luacell.cli.serve"."""
        return [__file__, str(self.path), "luacell.cli.serve"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._words.release()


def _map(path: Path) -> memoryview:
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("Q")


# -- in the broker --------------------------------------------------------------------------------------------
class Breaker:
    """Wraps handlers so that the one that is armed raises."""

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def check(self, handler: str) -> None:
        """Raise where it is this handler's turn.

        Raises:
            KeyError: it is.
        """
        words = self._words
        if words[_ARMED] and HANDLERS[words[_ARMED] - 1] == handler:
            words[_ARMED] = 0
            words[_RAISED_NS] = time.monotonic_ns()
            raise KeyError(f"made to fail: {handler}")

    def wrapped(self, handler: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function like another, under the same name, that may raise."""

        def call(*args: Any, **options: Any) -> Any:
            self.check(handler)
            return real(*args, **options)

        name = getattr(real, "__qualname__", "")
        call.__code__ = call.__code__.replace(co_qualname=name, co_name=name.rpartition(".")[2] or "call")
        return call

    def install(self) -> None:
        for word, table in TABLES.items():
            for op, real in table.items():
                table[op] = self.wrapped(f"{word} {op.name}", real)
        for owner, name in METHODS:
            setattr(owner, name, self.wrapped(f"{owner.__name__} {name}", getattr(owner, name)))
        for thread, (place, name) in THREADS.items():
            setattr(place, name, self.wrapped(f"thread {thread}", getattr(place, name)))
        self._wrap_items()
        self._wrap_timers()
        self._wrap_effects()

    def _wrap_items(self) -> None:
        real = server.Server._on_item

        def on_item(self_: server.Server, item: object) -> None:
            self.check(f"heard {type(item).__name__}")
            real(self_, item)

        server.Server._on_item = on_item  # type: ignore[method-assign, assignment]

    def _wrap_timers(self) -> None:
        real = TimerWheel.expired
        known = {subject.__name__ for subject in get_args(model.Subject)}

        def expired(wheel: TimerWheel[Any], now_ns: int) -> Any:
            for subject in real(wheel, now_ns):
                name = type(subject).__name__
                self.check(f"timer {name if name in known else model.Waiter.__name__}")
                yield subject

        TimerWheel.expired = expired  # type: ignore[method-assign, assignment]

    def _wrap_effects(self) -> None:
        real = server.Server.__init__

        def __init__(self_: server.Server, *args: Any, **options: Any) -> None:
            real(self_, *args, **options)
            performers = self_._performers
            assert performers.keys() == set(get_args(model.Effect))
            for effect, perform in performers.items():
                performers[effect] = self.wrapped(f"effect {effect.__name__}", perform)

        server.Server.__init__ = __init__  # type: ignore[method-assign, assignment]


def main() -> None:
    _, control, module, *options = sys.argv
    sys.argv = [module, *options]
    if module == "luacell.cli.serve":
        from tests.support.failing import run_parent

        sys.exit(run_parent(__file__, control, ["luacell.broker"]))
    Breaker(_map(Path(control))).install()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
