"""The quiet second thread: it waits for everything that is not a ZeroMQ message, and tells the loop.

It accepts descriptor channels and reads their messages, sees processes die by their pidfds, and runs work that would
stall the loop (allocating large segments); signals come by it as well. It decides nothing: each thing it hears becomes
an item in `inbox` and one empty inproc message, so that the loop has a single place to wait.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import zmq

from luacell.broker.signals import SignalPipe
from luacell.protocol.errors import ProtocolError
from luacell.protocol.memory.channel import ChannelClosed, close_all, receive_message

MESSAGES_PER_TURN: Final = 64  # from one channel before the others get theirs
INBOX_MAX: Final = 4096  # items the loop has not taken; beyond, the thread waits and the kernel's buffers fill
_INBOX_WAIT_S: Final = 0.1


class Connected(NamedTuple):
    """A descriptor channel was accepted."""

    channel: socket.socket


class Received(NamedTuple):
    """A message came over a descriptor channel; the descriptors are the loop's now."""

    channel: socket.socket
    message: bytes
    descriptors: list[int]


class Disconnected(NamedTuple):
    """A descriptor channel is at its end, or what came over it was no message."""

    channel: socket.socket
    reason: str


class Ended(NamedTuple):
    """A pidfd or a socketpair reports its end; it is no longer watched."""

    kind: str
    key: object


class WorkDone(NamedTuple):
    """Work that was ordered is done."""

    tell: Callable[[], None]


class Signalled(NamedTuple):
    """This process was sent a signal."""

    number: int


Item = Connected | Received | Disconnected | Ended | WorkDone | Signalled


class Watcher:
    """One thread on an epoll.

    Args:
        context: of the loop's socket.
        endpoint: inproc address the loop's socket is bound to.
        routing_id: under which the loop hears from this thread.
        listener: the descriptor socket, listening; stays the caller's.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, routing_id: bytes, listener: socket.socket
    ) -> None:
        self.inbox: deque[Item] = deque()
        self._context = context
        self._endpoint = endpoint
        self._routing_id = routing_id
        self._listener = listener
        self._epoll = select.epoll()
        self._channels: dict[int, socket.socket] = {}
        self._ends: dict[int, tuple[str, object]] = {}
        self._orders: deque[Callable[[], WorkDone]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._signals: SignalPipe | None = None
        self._stopping = False
        self._drained = threading.Event()
        self._thread = threading.Thread(target=self._run, name="luacell-watcher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._listener.setblocking(False)
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; watched descriptors stay their owners'. `close` comes last."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()

    def close(self) -> None:
        """Close what the thread used; nothing may be forgotten or watched afterwards."""
        self._epoll.close()
        os.close(self._wake)

    def order(self, work: Callable[[], WorkDone]) -> None:
        """Run `work` in the thread; what it returns reaches the inbox. Called by any thread."""
        self._orders.append(work)
        os.eventfd_write(self._wake, 1)

    def take(self) -> list[Item]:
        """Return and remove what was heard, oldest first. Called by the loop."""
        items = [self.inbox.popleft() for _ in range(len(self.inbox))]
        self._drained.set()
        return items

    def watch_channel(self, channel: socket.socket) -> None:
        """Read messages from a descriptor channel from now on. Called by the loop or the thread."""
        channel.setblocking(False)
        self._channels[channel.fileno()] = channel
        self._epoll.register(channel.fileno(), select.EPOLLIN)

    def forget_channel(self, channel: socket.socket) -> None:
        """Stop reading from a channel, before its owner closes it. Called by the loop."""
        descriptor = channel.fileno()
        if self._channels.pop(descriptor, None) is not None:
            with contextlib.suppress(OSError):  # the other thread has forgotten, or closed it, in this very moment
                self._epoll.unregister(descriptor)

    def watch_signals(self, signals: SignalPipe) -> None:
        """Report signals from now on. Called by the loop, once."""
        self._signals = signals
        self._epoll.register(signals.descriptor, select.EPOLLIN)

    def watch_end(self, descriptor: int, kind: str, key: object) -> None:
        """Report once when a pidfd or socketpair becomes readable. Called by the loop."""
        self._ends[descriptor] = (kind, key)
        self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLONESHOT)

    def forget_end(self, descriptor: int) -> None:
        """Stop watching, before its owner closes the descriptor. Called by the loop."""
        if self._ends.pop(descriptor, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(descriptor)

    # -- the thread -----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        speaker = self._context.socket(zmq.DEALER)
        speaker.setsockopt(zmq.ROUTING_ID, self._routing_id)
        speaker.setsockopt(zmq.LINGER, 0)
        speaker.connect(self._endpoint)
        try:
            while not self._stopping:
                self._turn(speaker)
        finally:
            speaker.close()

    def _turn(self, speaker: zmq.Socket[bytes]) -> None:
        if len(self.inbox) >= INBOX_MAX:
            self._drained.clear()
            self._drained.wait(_INBOX_WAIT_S)
            return
        for descriptor, _ in self._epoll.poll():
            self._handle(descriptor)
        if self.inbox:
            with contextlib.suppress(zmq.Again):  # full: the loop has enough wake-ups waiting
                speaker.send(b"", zmq.NOBLOCK)

    def _handle(self, descriptor: int) -> None:
        if descriptor == self._wake:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            while self._orders:
                self.inbox.append(self._orders.popleft()())
        elif descriptor == self._listener.fileno():
            self._accept()
        elif self._signals is not None and descriptor == self._signals.descriptor:
            self.inbox.extend(Signalled(number) for number in self._signals.take())
        elif descriptor in self._ends:
            self._end(descriptor)
        elif (channel := self._channels.get(descriptor)) is not None:
            self._read(channel)

    def _end(self, descriptor: int) -> None:
        """Believe an end only when the descriptor says so itself: its number may have been reused meanwhile."""
        probe = select.poll()
        probe.register(descriptor, select.POLLIN)
        try:
            if not probe.poll(0):
                self._epoll.modify(descriptor, select.EPOLLIN | select.EPOLLONESHOT)
                return
            end = self._ends.pop(descriptor)
            self._epoll.unregister(descriptor)
        except (KeyError, OSError):  # the loop has forgotten it in this very moment
            return
        self.inbox.append(Ended(*end))

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except OSError:  # the peer is gone again, or descriptors are short: the next event tries anew
            return
        try:
            self.watch_channel(channel)  # first: the loop may close it as soon as it hears of it
        except OSError:  # the kernel can watch no more
            self._channels.pop(channel.fileno(), None)
            channel.close()
            return
        self.inbox.append(Connected(channel))

    def _read(self, channel: socket.socket) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                message, descriptors = receive_message(channel)
            except BlockingIOError:
                return
            except (ChannelClosed, ProtocolError, OSError) as error:
                self.forget_channel(channel)
                self.inbox.append(Disconnected(channel, str(error)))
                return
            if not message:
                close_all(descriptors)
                continue
            self.inbox.append(Received(channel, message, descriptors))
