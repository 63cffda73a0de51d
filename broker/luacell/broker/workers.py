"""The worker processes behind the workforce: their descriptors, their deaths, and the worker host that has them.

It hears of starts and exits from the worker host, of deaths from pidfds, and gives its orders. What follows from a
death is the dispatcher's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from luacell.broker import model
from luacell.broker.books import Pair
from luacell.broker.causes import UNKNOWN, Cause, Vitals
from luacell.broker.contract_log import Line, LineFinder, readable
from luacell.broker.dispatcher import Dispatcher
from luacell.broker.model import Effect, Worker
from luacell.broker.outputs import OutputBudget
from luacell.broker.store import SegmentStore
from luacell.broker.watcher import Watcher
from luacell.protocol import headers, messages
from luacell.protocol.confinement import read as read_layers
from luacell.protocol.errors import ProtocolError
from luacell.protocol.headers import Op
from luacell.protocol.limits import NS_PER_MS, NS_PER_S, OUTPUT_PER_CALL_MAX
from luacell.protocol.memory.channel import ChannelClosed, peer_pid, peer_pidfd, send_message
from luacell.protocol.messages import decode, encode

log = logging.getLogger("luacell.broker")

CLOSING_WAIT_NS: Final = 20 * NS_PER_MS  # a dying process closes its descriptors just before its pidfd tells
EXITING_WAIT_NS: Final = NS_PER_S  # and on a busy machine a while before, as its flags show
_PF_EXITING: Final = 4  # linux/sched.h
_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
SILENCE_NS: Final = 500 * NS_PER_MS  # a worker host that owes a report for so long is looked at
CAUSE_WAIT_NS: Final = 250 * NS_PER_MS  # a pidfd may be faster than the worker host's report of the cause


@dataclass(slots=True, eq=False)
class WorkerLink:
    """What the broker holds of a worker process: a pidfd and one end of its socketpair."""

    worker: Worker
    pidfd: int
    channel: socket.socket
    closed_ns: int = 0  # when the socketpair was found closed
    died_ns: int = 0  # when the pidfd reported its death, while the cause is awaited
    output: OutputBudget = field(default_factory=OutputBudget)
    stream: str = "stdout"  # where its last output came from
    lines: LineFinder = field(default_factory=LineFinder)  # in its stderr
    last_words: str = ""  # the end of its stderr, when it is dead


class Workers:
    """All worker processes of one broker.

    Args:
        dispatcher: is told what happens to workers.
        store: has the descriptors of segments.
        watcher: reports deaths.
        perform: performs effects.
        on_answers: acts on the DONE records of a worker.
        on_end: called with a worker that is dead and the end of its stderr, before anything else follows from that.
        parent: pid of the process whose child the worker host must be, as this broker is; None takes any.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        store: SegmentStore,
        watcher: Watcher,
        perform: Callable[[Iterable[Effect]], None],
        on_answers: Callable[[Worker, Iterable[tuple[int, ...]], int], None],
        on_end: Callable[[Worker, str], None],
        parent: int | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._workforce = dispatcher.workforce
        self._store = store
        self._watcher = watcher
        self._perform = perform
        self._on_answers = on_answers
        self._on_end = on_end
        self._parent = parent
        self._host: socket.socket | None = None
        self._host_leaves = False
        self._ordered_ns = 0  # when the worker host was given an order, while nothing has been heard of it since
        self._links: dict[int, WorkerLink] = {}
        self._ready_early: set[Worker] = set()
        self._closing: dict[int, WorkerLink] = {}
        self._dying: dict[int, WorkerLink] = {}
        self._untold: dict[int, WorkerLink] = {}  # whose output was cut, which no record has told yet

    @property
    def awaits(self) -> bool:
        """Whether something is to be looked at again soon."""
        return bool(self._ordered_ns or self._dying or self._closing or self._untold)

    def time_passed(self, now_ns: int) -> None:
        """Give up waiting for a death that was announced, or for the cause of one."""
        for link in [link for link in self._closing.values() if now_ns - link.closed_ns >= CLOSING_WAIT_NS]:
            if now_ns - link.closed_ns >= EXITING_WAIT_NS or not _is_exiting(link.worker.pid):
                del self._closing[link.worker.id]
                self._dismiss(link.worker)
        for link in [link for link in self._dying.values() if now_ns - link.died_ns >= CAUSE_WAIT_NS]:
            self._died(link.worker, UNKNOWN)
        for link in [link for link in self._untold.values() if link.output.is_due(now_ns)]:
            self._tell_output(link, "", link.output.tell(now_ns))
        if self._ordered_ns and now_ns - self._ordered_ns >= SILENCE_NS:
            self._ordered_ns = 0
            self._end_stopped_host()

    def lost(self, worker: Worker) -> None:
        """A worker cannot be trusted or reached any more: it must die, unless it is dying by itself."""
        link = self._links.get(worker.id)
        if link is not None and _is_exiting(worker.pid):
            self.closed(link)
        else:
            self._dismiss(worker)

    def _dismiss(self, worker: Worker) -> None:
        self._perform(self._dispatcher.worker_lost(worker, time.monotonic_ns()))

    def close(self) -> None:
        """Close what belongs to workers and their host."""
        for link in list(self._links.values()):
            self._close(link)
        if self._host is not None:
            with contextlib.suppress(ChannelClosed, OSError):  # it hears of the end in any case; this calls it orderly
                send_message(self._host, encode(messages.End()))
            self._host.close()

    # -- the worker host ------------------------------------------------------------------------------------------
    def host_joined(self, channel: socket.socket) -> None:
        """A worker host has said hello.

        Raises:
            ProtocolError: there is one already, or it is another service's: it has not the parent of this broker.
        """
        pid = peer_pid(channel)
        if self._parent is not None and _parent_of(pid) not in (self._parent, None):
            raise ProtocolError(f"worker host {pid} is no child of process {self._parent}, which started this broker")
        if self._host is not None and _is_at_end(self._host):  # the watcher has not come to telling yet
            self._watcher.forget_channel(self._host)
            self.host_left("its channel is at its end")
        if self._host is not None:
            raise ProtocolError("this broker has a worker host already")
        self._host = channel
        log.info("worker host joined", extra={"fields": {"pid": pid}})

    def start(self) -> None:
        """Order the first workers, now that the worker host has been welcomed."""
        effects: list[Effect] = []
        self._workforce.host_joined(time.monotonic_ns(), effects)
        self._perform(effects)

    def is_host(self, channel: socket.socket) -> bool:
        """Tell whether a descriptor channel is the worker host's."""
        return channel is self._host

    def host_left(self, reason: str) -> None:
        """Its workers die with it, by the kernel's hand; their pidfds will tell."""
        level = logging.INFO if self._host_leaves else logging.ERROR
        log.log(level, "worker host left", extra={"fields": {"reason": reason}})
        channel, self._host = self._host, None
        self._host_leaves = False
        self._ordered_ns = 0
        self._perform(self._dispatcher.worker_host_left(time.monotonic_ns()))
        if channel is not None:
            channel.close()
        for link in list(self._dying.values()):
            self._died(link.worker, UNKNOWN)
        for worker in [w for w in self._workforce.by_id.values() if w.id not in self._links]:
            self._died(worker, Cause(problem="the worker host died while starting it"))

    def _end_stopped_host(self) -> None:
        """Kill a worker host that somebody has stopped (SIGSTOP): without it nothing starts and nothing is killed.

        One that is merely slow is left alone, and so is one that cannot be seen or reached, in another namespace.
        """
        if self._host is None or not _is_stopped(peer_pid(self._host)):
            return
        log.error("worker host is stopped and will be killed", extra={"fields": {"pid": peer_pid(self._host)}})
        with contextlib.suppress(OSError):
            pidfd = peer_pidfd(self._host)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

    def on_report(self, op: Op, message: bytes, descriptors: list[int]) -> bool:
        """Act on a message of the worker host; tell whether the descriptors were taken over.

        Raises:
            ProtocolError: it is not one that a worker host may send.
        """
        handler = REPORTS.get(op)
        if handler is None or len(descriptors) != (2 if op is Op.STARTED else 0):
            raise ProtocolError(f"operation {op.name} with {len(descriptors)} descriptors is not for worker hosts")
        self._ordered_ns = 0
        handler(self, message, descriptors)
        return op is Op.STARTED

    def _on_exited(self, message: bytes, descriptors: list[int]) -> None:
        exited = decode(messages.Exited, message)
        worker = self._workforce.by_id.get(exited.worker)
        if worker is not None:
            vitals = Vitals(exited.cpu_us, exited.memory, exited.state, exited.wchan)
            self._died(worker, Cause(exited.signal, exited.exit_code, exited.problem, vitals=vitals))

    def _on_leaving(self, message: bytes, descriptors: list[int]) -> None:
        decode(messages.Leaving, message)
        self._host_leaves = True
        log.info("worker host leaves")
        self._perform(self._dispatcher.worker_host_leaves(time.monotonic_ns()))

    def _on_inspected(self, message: bytes, descriptors: list[int]) -> None:
        seen = decode(messages.Inspected, message)
        worker = self._workforce.by_id.get(seen.worker)
        if worker is not None:
            vitals = Vitals(seen.cpu_us, seen.memory, seen.state, seen.wchan)
            self._perform(self._dispatcher.worker_inspected(worker, seen.sequence, vitals, time.monotonic_ns()))

    def _on_output(self, message: bytes, descriptors: list[int]) -> None:
        """Make records of what a contract has printed."""
        output = decode(messages.Output, message)
        link = self._links.get(output.worker)
        if link is None:
            return
        if output.stream == "tail":
            link.last_words = readable(output.data).decode("utf-8", "replace")
            return
        link.stream = output.stream
        parts = link.lines.feed(output.data) if output.stream == "stderr" else [output.data]
        cut, now_ns = output.cut, time.monotonic_ns()
        for part in parts or [b""]:
            if isinstance(part, bytes):
                self._bound(link, part, cut, now_ns)
            elif log.isEnabledFor(_LEVELS[part.level]):
                self._bound(link, part.text, cut, now_ns, part)
            else:
                continue
            cut = 0

    def _bound(self, link: WorkerLink, data: bytes, cut: int, now_ns: int, line: Line | None = None) -> None:
        """Make a record of a piece of output, or of a line of the contract's log, within the bounds on both."""
        contract = link.worker.contract
        size, size_max = len(data) + (line is not None), OUTPUT_PER_CALL_MAX  # an empty line is one, too
        if contract is not None:
            size_max = contract.record.settings.max_output
            if size and not contract.record_rate.take(now_ns):
                size, cut = 0, cut + size
        kept = link.output.take(link.worker.served, size, cut, now_ns, size_max)
        if kept.is_worth_a_record:
            text = data[: kept.size].decode("utf-8", "replace")
            self._tell_output(link, text, kept.cut, line if kept.size else None)
        elif link.output.has_untold:
            self._untold[link.worker.id] = link

    def _tell_output(self, link: WorkerLink, text: str, cut: int, line: Line | None = None) -> None:
        self._untold.pop(link.worker.id, None)
        worker = link.worker
        fields: dict[str, object] = {
            "contract": worker.contract.record.title if worker.contract else None,
            "worker": worker.id,
        }
        if line is None:
            fields["stream"] = link.stream
        elif line.function is not None:
            fields["function"] = line.function
        fields["text"] = text
        if cut:
            fields["cut"] = cut
        level, event = (logging.INFO, "contract output") if line is None else (_LEVELS[line.level], "contract log")
        log.log(level, event, extra={"fields": fields})

    def _on_started(self, message: bytes, descriptors: list[int]) -> None:
        started = decode(messages.Started, message)
        pidfd, channel_fd = descriptors
        channel = socket.socket(fileno=channel_fd)
        channel.setblocking(False)
        worker = self._workforce.by_id.get(started.worker)
        if worker is None or worker.id in self._links:
            channel.close()
            os.close(pidfd)
            return
        worker.pid = started.pid
        link = self._links[worker.id] = WorkerLink(worker, pidfd, channel)
        try:
            self._watcher.watch_end(pidfd, "worker", link)
            self._watcher.watch_end(channel.fileno(), "socketpair", link)
        except OSError as error:  # the kernel can watch no more; its end will come from the worker host
            log.error("worker cannot be watched", extra={"fields": {"worker": worker.id, "reason": str(error)}})
            self.lost(worker)
            return
        if worker in self._ready_early:
            self._ready_early.discard(worker)
            self._perform(self._dispatcher.worker_ready(worker, time.monotonic_ns()))

    def order_start(self, effect: model.StartWorker) -> None:
        """Perform StartWorker."""
        worker = effect.worker
        level, read, write, network = worker.confinement
        self._order(
            messages.Start(
                worker=worker.id,
                routing_id=worker.routing_id,
                sandbox=level,
                read=read,
                write=write,
                network=network,
            )
        )

    def order_kill(self, effect: model.KillWorker) -> None:
        """Perform KillWorker."""
        self._order(messages.Kill(worker=effect.worker.id))

    def order_inspection(self, effect: model.InspectWorker) -> None:
        """Perform InspectWorker."""
        self._order(messages.Inspect(worker=effect.worker.id, sequence=effect.sequence))

    def _order(self, order: messages.Start | messages.Kill | messages.Inspect) -> None:
        channel = self._host
        if channel is None:
            return
        try:
            send_message(channel, encode(order))
            self._ordered_ns = self._ordered_ns or time.monotonic_ns()
        except (ChannelClosed, OSError) as error:
            self._watcher.forget_channel(channel)
            self.host_left(f"it takes no orders: {error}")

    # -- workers --------------------------------------------------------------------------------------------------
    def on_message(self, worker: Worker, op: Op, count: int, message: bytes) -> None:
        """Act on a message of a worker.

        Raises:
            ProtocolError: it is not one that a worker may send.
        """
        handler = HANDLERS.get(op)
        if handler is None:
            raise ProtocolError(f"operation {op.name} is not for workers")
        handler(self, worker, count, message)

    def _on_done(self, worker: Worker, count: int, message: bytes) -> None:
        self._on_answers(worker, headers.parse_records(Op.DONE, count, message), time.monotonic_ns())

    def _on_loaded(self, worker: Worker, count: int, message: bytes) -> None:
        loaded = decode(messages.Loaded, message)
        now_ns = time.monotonic_ns()
        effects = self._dispatcher.worker_loaded(
            worker, loaded.problem, loaded.reason, now_ns, saves=loaded.saves, restores=loaded.restores
        )
        self._perform(effects)

    def _on_saved(self, worker: Worker, count: int, message: bytes) -> None:
        saved = decode(messages.Saved, message)
        self._perform(self._dispatcher.worker_saved(worker, saved.state, saved.problem, time.monotonic_ns()))

    def _on_restored(self, worker: Worker, count: int, message: bytes) -> None:
        restored = decode(messages.Restored, message)
        self._perform(self._dispatcher.worker_restored(worker, restored.problem, time.monotonic_ns()))

    def _on_ready(self, worker: Worker, count: int, message: bytes) -> None:
        ready = decode(messages.Ready, message)
        self._workforce.confined(worker, ready.sandbox, read_layers(ready.posture), ready.c_modules)
        if worker.id in self._links:
            self._perform(self._dispatcher.worker_ready(worker, time.monotonic_ns()))
        else:  # the worker host's report of its descriptors is on the other channel, still on its way
            self._ready_early.add(worker)

    def ended(self, link: WorkerLink) -> None:
        """A worker's pidfd reports its death; the cause comes from the worker host, where there is one."""
        if self._links.get(link.worker.id) is not link:
            return
        if self._host is None:
            self._died(link.worker, UNKNOWN)
        else:
            self._closing.pop(link.worker.id, None)
            link.died_ns = time.monotonic_ns()
            self._dying[link.worker.id] = link

    def closed(self, link: WorkerLink) -> None:
        """A worker's socketpair is closed: it is dying, or has closed its descriptors."""
        worker_id = link.worker.id
        if self._links.get(worker_id) is link and worker_id not in self._closing and worker_id not in self._dying:
            link.closed_ns = time.monotonic_ns()
            self._closing[worker_id] = link

    def send_map(self, worker: Worker, pair: Pair) -> bool:
        """Give a worker a pair of segments; tell whether it could be sent."""
        stored = self._store.get(pair)
        shape = pair.shape
        message = messages.Map(
            arena=pair.arena.id,
            index=pair.index,
            count=shape.count,
            args_stride=shape.args_stride,
            out_stride=shape.out_stride,
        )
        link = self._links.get(worker.id)
        if link is None:
            return False
        try:
            send_message(link.channel, encode(message), [stored.args_fd, stored.out_fd])
        except (ChannelClosed, OSError):
            return False
        worker.mapped.add(pair)
        worker.arenas.add(pair.arena.id)
        return True

    def _died(self, worker: Worker, cause: Cause) -> None:
        self._ready_early.discard(worker)
        self._closing.pop(worker.id, None)
        self._dying.pop(worker.id, None)
        now_ns = time.monotonic_ns()
        link = self._links.pop(worker.id, None)
        if link is not None:
            cause = replace(cause, last_words=link.last_words)
            if begun := link.lines.end():
                self._bound(link, begun, 0, now_ns)
            if link.output.has_untold:
                self._tell_output(link, "", link.output.tell(now_ns))
        self._on_end(worker, cause.last_words)
        self._perform(self._dispatcher.worker_died(worker, cause, now_ns))
        if link is not None:
            self._close(link)

    def _close(self, link: WorkerLink) -> None:
        self._watcher.forget_end(link.pidfd)
        self._watcher.forget_end(link.channel.fileno())
        os.close(link.pidfd)
        link.channel.close()


HANDLERS: Final[dict[Op, Callable[[Workers, Worker, int, bytes], None]]] = {
    Op.READY: Workers._on_ready,
    Op.LOADED: Workers._on_loaded,
    Op.DONE: Workers._on_done,
    Op.SAVED: Workers._on_saved,
    Op.RESTORED: Workers._on_restored,
}
REPORTS: Final[dict[Op, Callable[[Workers, bytes, list[int]], None]]] = {
    Op.STARTED: Workers._on_started,
    Op.EXITED: Workers._on_exited,
    Op.INSPECTED: Workers._on_inspected,
    Op.OUTPUT: Workers._on_output,
    Op.LEAVING: Workers._on_leaving,
}


def _is_at_end(channel: socket.socket) -> bool:
    """Tell whether the other side of a channel is closed, whatever may still be read from it."""
    poll = select.poll()
    poll.register(channel, select.POLLRDHUP)
    return bool(poll.poll(0))


def _parent_of(pid: int) -> int | None:
    """Return the pid of a process's parent, or None where that cannot be seen: in another namespace, or it is gone."""
    fields = _stat_of(pid)
    return int(fields[1]) if fields else None


def _is_exiting(pid: int) -> bool:
    """Whether a worker is on its way out, or dead and not yet reaped; False where that cannot be seen."""
    fields = _stat_of(pid)
    return bool(fields) and bool(int(fields[6]) & _PF_EXITING)


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal; False where that cannot be seen."""
    return _stat_of(pid)[:1] == ["T"]


def _stat_of(pid: int) -> list[str]:
    """Return the fields behind the name in a process's /proc/PID/stat, from its state on; none where it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return []
    return stat.rpartition(")")[2].split()  # proc_pid_stat(5): the name may hold anything
