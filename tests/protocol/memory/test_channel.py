"""The descriptor channel: messages with descriptors, and nothing left open by those that are refused."""

import array
import errno
import fcntl
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from luacell.protocol.errors import ProtocolError
from luacell.protocol.limits import DESCRIPTOR_MESSAGE_MAX
from luacell.protocol.memory.channel import (
    DESCRIPTORS_MAX,
    SOCKET_PATH_MAX,
    ChannelClosed,
    close_all,
    connect_channel,
    peer_pid,
    peer_pidfd,
    receive_message,
    send_message,
)
from tests.protocol.support import no_descriptor_left

TIME_LIMIT_S = 5.0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(TIME_LIMIT_S)
    theirs.settimeout(TIME_LIMIT_S)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose path is short enough for sockets, which pytest's own need not be."""
    path = Path(tempfile.mkdtemp(prefix="luacell-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


def send_raw(channel: socket.socket, message: bytes, descriptors: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    channel.sendmsg([message], rights if descriptors else [])


# -- messages and descriptors --------------------------------------------------------------------------------
def test_messages_arrive_whole_and_in_order(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    messages = [b"x", b"y" * DESCRIPTOR_MESSAGE_MAX, b"\x00"]
    for message in messages:
        send_message(ours, message)
    assert [receive_message(theirs) for _ in messages] == [(message, []) for message in messages]


def test_descriptors_arrive_in_their_order_and_stay_the_senders(
    pair: tuple[socket.socket, socket.socket], pipe: tuple[int, int]
) -> None:
    ours, theirs = pair
    send_message(ours, b"pair", pipe)
    message, descriptors = receive_message(theirs)
    assert message == b"pair"
    reading, writing = descriptors
    os.write(writing, b"through the copy")
    assert os.read(pipe[0], 100) == b"through the copy"
    os.write(pipe[1], b"through the original")
    assert os.read(reading, 100) == b"through the original"
    close_all(descriptors)


def test_received_descriptors_are_closed_on_exec(
    pair: tuple[socket.socket, socket.socket], pipe: tuple[int, int]
) -> None:
    ours, theirs = pair
    os.set_inheritable(pipe[0], True)
    send_message(ours, b"one", pipe[:1])
    _, (descriptor,) = receive_message(theirs)
    assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert not os.get_inheritable(descriptor)
    close_all([descriptor])


def test_descriptor_without_a_message_is_no_end_of_file(
    pair: tuple[socket.socket, socket.socket], pipe: tuple[int, int]
) -> None:
    ours, theirs = pair
    send_raw(ours, b"", [pipe[0]])
    message, descriptors = receive_message(theirs)
    assert message == b""
    assert len(descriptors) == 1
    close_all(descriptors)


def test_nothing_there_is_told_by_blocking_mode(pair: tuple[socket.socket, socket.socket]) -> None:
    _, theirs = pair
    theirs.settimeout(0.01)
    with pytest.raises(TimeoutError):
        receive_message(theirs)
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        receive_message(theirs)


def test_peer_that_does_not_read_blocks_nobody(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        for _ in range(100_000):
            send_message(ours, b"x" * DESCRIPTOR_MESSAGE_MAX)


def test_message_over_the_limit_is_a_mistake_of_its_sender(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(AssertionError):
        send_message(pair[0], b"x" * (DESCRIPTOR_MESSAGE_MAX + 1))


def test_bad_descriptor_is_an_os_error_and_the_channel_lives(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    with pytest.raises(OSError) as caught:
        send_message(ours, b"x", [-1])
    assert caught.value.errno == errno.EBADF
    send_message(ours, b"next")
    assert receive_message(theirs) == (b"next", [])


# -- malformed messages --------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [DESCRIPTOR_MESSAGE_MAX + 1, 2 * DESCRIPTOR_MESSAGE_MAX])
def test_oversized_message_is_refused_and_its_descriptors_are_closed(
    pair: tuple[socket.socket, socket.socket], pipe: tuple[int, int], size: int
) -> None:
    ours, theirs = pair
    with no_descriptor_left():
        send_raw(ours, b"x" * size, list(pipe))
        with pytest.raises(ProtocolError, match="over 4096 bytes or 2 descriptors"):
            receive_message(theirs)


@pytest.mark.parametrize("count", [DESCRIPTORS_MAX + 1, 16, 253])
def test_too_many_descriptors_are_refused_and_closed(
    pair: tuple[socket.socket, socket.socket], pipe: tuple[int, int], count: int
) -> None:
    ours, theirs = pair
    with no_descriptor_left():
        send_raw(ours, b"x", [pipe[0]] * count)
        with pytest.raises(ProtocolError, match="over 4096 bytes or 2 descriptors"):
            receive_message(theirs)


def test_other_ancillary_data_is_not_taken_for_descriptors(
    pair: tuple[socket.socket, socket.socket], pipe: tuple[int, int]
) -> None:
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with no_descriptor_left():
        send_raw(ours, b"with credentials that nobody asked for", [pipe[0]])
        with pytest.raises(ProtocolError):
            receive_message(theirs)


def test_channel_goes_on_after_a_refused_message(
    pair: tuple[socket.socket, socket.socket], pipe: tuple[int, int]
) -> None:
    ours, theirs = pair
    send_raw(ours, b"x", [pipe[0]] * 5)
    send_raw(ours, b"x" * 5000, [])
    send_message(ours, b"fine", pipe)
    for _ in range(2):
        with pytest.raises(ProtocolError):
            receive_message(theirs)
    message, descriptors = receive_message(theirs)
    assert message == b"fine"
    close_all(descriptors)


def test_message_that_nobody_reads_leaves_no_descriptor(pipe: tuple[int, int]) -> None:
    with no_descriptor_left():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            send_message(ours, b"x", pipe)


# -- the end of the peer -------------------------------------------------------------------------------------
def test_peer_that_closed_is_told_after_its_last_message(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    send_message(ours, b"last")
    ours.close()
    assert receive_message(theirs) == (b"last", [])
    with pytest.raises(ChannelClosed, match="end of file"):
        receive_message(theirs)


def test_sending_to_a_peer_that_closed_raises_no_signal(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(ChannelClosed):
        send_message(ours, b"x")


def test_peer_that_closed_with_messages_unread_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    send_message(ours, b"never read")
    theirs.close()
    with pytest.raises(ChannelClosed):
        receive_message(ours)


# -- connecting ----------------------------------------------------------------------------------------------
def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(os.fspath(path))
    listener.listen()
    return listener


def test_connected_channel_talks_and_is_closed_on_exec(directory: Path) -> None:
    path = directory / "fd.sock"
    with listening(path) as listener, connect_channel(path, TIME_LIMIT_S) as channel:
        accepted, _ = listener.accept()
        with accepted:
            send_message(channel, b"hello")
            assert receive_message(accepted) == (b"hello", [])
        assert not channel.get_inheritable()
        assert channel.gettimeout() == TIME_LIMIT_S


@pytest.mark.parametrize("name", ["absent", "x" * SOCKET_PATH_MAX, "file"])
def test_connecting_to_nobody_is_an_os_error_and_leaves_no_descriptor(directory: Path, name: str) -> None:
    (directory / "file").touch()
    with no_descriptor_left(), pytest.raises(OSError):
        connect_channel(directory / name, TIME_LIMIT_S)


def test_connecting_to_a_socket_that_nobody_serves_is_refused(directory: Path) -> None:
    path = directory / "fd.sock"
    listening(path).close()
    with pytest.raises(ConnectionRefusedError):
        connect_channel(path, TIME_LIMIT_S)


def test_malformed_timeout_leaves_no_descriptor(directory: Path) -> None:
    path = directory / "fd.sock"
    with listening(path), no_descriptor_left(), pytest.raises(ValueError):
        connect_channel(path, -1.0)


def test_full_queue_is_waited_for_and_then_a_timeout(directory: Path) -> None:
    path = directory / "fd.sock"
    with listening(path) as listener, ExitStack() as stack:
        listener.listen(0)
        stack.enter_context(connect_channel(path, TIME_LIMIT_S))
        with no_descriptor_left(), pytest.raises(TimeoutError, match=r"fd\.sock"):
            connect_channel(path, 0.01)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(connect_channel, path, TIME_LIMIT_S)
            for _ in range(2):
                stack.enter_context(listener.accept()[0])
            stack.enter_context(waiting.result())


def test_longest_path_can_be_listened_on(directory: Path) -> None:
    path = directory / ("x" * (SOCKET_PATH_MAX - len(os.fsencode(directory)) - 1))
    with listening(path), connect_channel(path, TIME_LIMIT_S):
        pass
    with pytest.raises(OSError, match="AF_UNIX path too long"):
        connect_channel(path.with_name(path.name + "x"), TIME_LIMIT_S)


# -- who is at the other end ---------------------------------------------------------------------------------
class Reluctant:
    """A channel whose kernel gives an error for SO_PEERPIDFD."""

    def __init__(self, number: int, pid: int) -> None:
        self._number = number
        self._pid = pid

    def getsockopt(self, level: int, name: int, size: int = 0) -> int | bytes:
        assert level == socket.SOL_SOCKET
        if name == socket.SO_PEERCRED:
            return self._pid.to_bytes(4, "little", signed=True) + bytes(8)
        raise OSError(self._number, os.strerror(self._number))


def pid_of(pidfd: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    return int(next(line.partition(":")[2] for line in lines if line.startswith("Pid:")))


def test_peer_is_named_by_pid_and_pidfd(pair: tuple[socket.socket, socket.socket]) -> None:
    assert peer_pid(pair[0]) == os.getpid()
    pidfd = peer_pidfd(pair[0])
    try:
        assert pid_of(pidfd) == os.getpid()
        assert fcntl.fcntl(pidfd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    finally:
        os.close(pidfd)


def test_kernel_without_peer_pidfds_is_asked_by_pid() -> None:
    pidfd = peer_pidfd(Reluctant(errno.ENOPROTOOPT, os.getpid()))  # type: ignore[arg-type]
    try:
        assert pid_of(pidfd) == os.getpid()
    finally:
        os.close(pidfd)


@pytest.mark.parametrize("number", [errno.ESRCH, errno.ENODATA, errno.EMFILE])
def test_pid_of_a_peer_that_is_gone_is_never_looked_up(number: int) -> None:
    with pytest.raises(OSError) as caught:
        peer_pidfd(Reluctant(number, os.getpid()))  # type: ignore[arg-type]
    assert caught.value.errno == number


def test_peer_in_an_invisible_pid_namespace_has_no_pidfd() -> None:
    with pytest.raises(OSError):
        peer_pidfd(Reluctant(errno.ENOPROTOOPT, 0))  # type: ignore[arg-type]


def test_peer_that_died_is_either_refused_or_known_to_be_dead(directory: Path) -> None:
    path = directory / "fd.sock"
    script = "import socket, sys\nsocket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect(sys.argv[1])\n"
    with listening(path) as listener:
        subprocess.run([sys.executable, "-S", "-E", "-c", script, path], check=True, timeout=TIME_LIMIT_S * 4)
        accepted, _ = listener.accept()
        with accepted:
            try:
                pidfd = peer_pidfd(accepted)
            except OSError:
                return
            try:
                assert select.select([pidfd], [], [], TIME_LIMIT_S)[0] == [pidfd]
            finally:
                os.close(pidfd)
