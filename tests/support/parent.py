"""A parent of made-up children, for the order of things at its end: `python -m tests.support.parent FILE OPTIONS…`.

It is the real parent; the children append to FILE what they hear, and end as told by the first option:

    drains    the broker needs another line in FILE, "go on", before it ends at SIGTERM; at a second signal it ends
    hangs     the broker hears signals and does not end
    stubborn  neither of them ends by itself
"""

from __future__ import annotations

import sys

from luacell.cli.serve import Parent, _parse
from luacell.protocol.logs import configure_logging

CHILD = """
import os, select, signal, sys, time
name, mode, path, ready, parent = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
signal.set_wakeup_fd(writer)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)
log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def say(text): os.write(log, f"{name} {text}\\n".encode())
def end(why): say(why); os._exit(0)
say("starts")
if ready >= 0: os.write(ready, b"1")
poll = select.poll()
poll.register(reader, select.POLLIN)
heard = 0
while os.getppid() == parent:
    poll.poll(5)
    try: numbers = os.read(reader, 64)
    except BlockingIOError: numbers = b""
    for number in numbers:
        heard += 1
        say(signal.Signals(number).name)
    if mode == "drains" and name == "broker" and heard and (heard > 1 or "go on" in open(path).read()): end("ends")
    if mode != "stubborn" and name == "worker" and heard: end("ends")
"""


class MadeUpParent(Parent):
    """The parent, whose children are made up."""

    mode = ""
    path = ""

    def _command(self, module: str) -> list[str]:
        name = module.removeprefix("luacell.")
        return [*self._child(name), "-1", *super()._command(module)[-1:]]

    def _broker_command(self, report: int) -> list[str]:
        return [*self._child("broker"), str(report), *super()._command("luacell.broker")[-1:]]

    def _child(self, name: str) -> list[str]:
        return [sys.executable, "-c", CHILD, name, self.mode, self.path]


def main() -> int:
    MadeUpParent.path, MadeUpParent.mode, *arguments = sys.argv[1:]
    options = _parse(arguments)
    configure_logging(options.log_level)
    return MadeUpParent(options).run()


if __name__ == "__main__":
    sys.exit(main())
