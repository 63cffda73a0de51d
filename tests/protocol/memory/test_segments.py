"""Sealed segments: seals that hold, pages that are there, mappings that keep no descriptor."""

import ctypes
import errno
import fcntl
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from luacell.protocol.memory import segments
from luacell.protocol.memory.segments import (
    ARGS_SEALS,
    OUT_SEALS,
    SEAL_FUTURE_WRITE,
    SEAL_GROW,
    SEAL_SEAL,
    SEAL_SHRINK,
    SIZE_SEALS,
    Mapping,
    add_seals,
    create_segment,
    seals_of,
)
from tests.protocol.support import no_descriptor_left

PAGE = mmap.PAGESIZE
SIZE = 4 * PAGE
SEAL_WRITE = 0x08

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@contextmanager
def segment(seals: int, size: int = SIZE) -> Iterator[int]:
    fd = create_segment("luacell-test", size, seals)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def mapped(fd: int, *, writable: bool, size: int = SIZE) -> Iterator[Mapping]:
    mapping = Mapping(fd, size, writable=writable)
    try:
        yield mapping
    finally:
        mapping.close()


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, errno.errorcode[caught.value.errno or 0]


def may_be_made_writable(mapping: Mapping) -> bool:
    return bool(libc.mprotect(mapping.address, mapping.size, mmap.PROT_READ | mmap.PROT_WRITE) == 0)


# -- creation ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [PAGE, SIZE, 1 << 20])
def test_segment_has_its_size_and_every_page_from_the_start(size: int) -> None:
    with segment(SIZE_SEALS, size) as fd:
        found = os.fstat(fd)
        assert found.st_size == size
        assert found.st_blocks * 512 == size


def test_segment_is_closed_on_exec_and_has_no_name_in_any_directory() -> None:
    with segment(SIZE_SEALS) as fd:
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:luacell-test (deleted)"
        assert os.fstat(fd).st_nlink == 0


@pytest.mark.parametrize("size", [0, -PAGE, 1, PAGE - 1, PAGE + 1])
def test_segment_of_a_size_that_is_no_whole_pages_is_a_mistake(size: int) -> None:
    with pytest.raises(AssertionError):
        create_segment("luacell-test", size, SIZE_SEALS)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM, errno.EINTR])
def test_segment_without_memory_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(fd: int, offset: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with no_descriptor_left(), refused(number):
        create_segment("luacell-test", SIZE, SIZE_SEALS)


def test_interrupted_creation_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int, offset: int, size: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "posix_fallocate", interrupt)
    with no_descriptor_left(), pytest.raises(KeyboardInterrupt):
        create_segment("luacell-test", SIZE, SIZE_SEALS)


def test_segment_that_cannot_be_sealed_leaves_no_descriptor() -> None:
    with no_descriptor_left(), refused(errno.EINVAL):
        create_segment("luacell-test", SIZE, 1 << 30)


def test_segment_without_a_descriptor_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", fail)
    with refused(errno.EMFILE):
        create_segment("luacell-test", SIZE, SIZE_SEALS)


def test_another_system_is_told_that_luacell_needs_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="luacell needs Linux: sealed memfds"):
        create_segment("luacell-test", SIZE, SIZE_SEALS)


# -- seals ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seals", [SIZE_SEALS, OUT_SEALS, ARGS_SEALS])
def test_segment_bears_the_seals_it_was_given(seals: int) -> None:
    with segment(seals) as fd:
        assert seals_of(fd) == seals


def test_seals_are_those_of_the_kernel() -> None:
    assert (segments.F_ADD_SEALS, segments.F_GET_SEALS) == (fcntl.F_ADD_SEALS, fcntl.F_GET_SEALS)
    assert (SEAL_SEAL, SEAL_SHRINK, SEAL_GROW, SEAL_WRITE, SEAL_FUTURE_WRITE) == (1, 2, 4, 8, 16)
    assert (SIZE_SEALS, OUT_SEALS, ARGS_SEALS) == (6, 7, 23)


@pytest.mark.parametrize("seals", [SIZE_SEALS, OUT_SEALS, ARGS_SEALS])
@pytest.mark.parametrize("size", [0, PAGE, SIZE - 1, SIZE + 1, 2 * SIZE])
def test_nobody_shrinks_or_grows_a_segment(seals: int, size: int) -> None:
    with segment(seals) as fd:
        with refused(errno.EPERM):
            os.ftruncate(fd, size)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            with refused(errno.EPERM):
                os.ftruncate(again, size)
            with refused(errno.EPERM):
                os.posix_fallocate(again, SIZE, PAGE)
            with refused(errno.EPERM):
                os.pwrite(again, b"x", SIZE)
        finally:
            os.close(again)
        assert os.fstat(fd).st_size == SIZE


def test_truncating_open_is_refused() -> None:
    with segment(OUT_SEALS) as fd, refused(errno.EPERM):
        os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_TRUNC)


@pytest.mark.parametrize("seals", [OUT_SEALS, ARGS_SEALS])
def test_seals_are_final_once_sealed(seals: int) -> None:
    with segment(seals) as fd:
        for more in (SEAL_WRITE, SEAL_FUTURE_WRITE, SEAL_SEAL):
            with refused(errno.EPERM):
                add_seals(fd, more)
        assert seals_of(fd) == seals


def test_file_that_is_no_memfd_has_no_seals() -> None:
    reading, writing = os.pipe()
    try:
        with refused(errno.EINVAL):
            seals_of(reading)
    finally:
        os.close(reading)
        os.close(writing)


def test_args_are_written_through_the_hosts_mapping_after_they_were_sealed() -> None:
    with segment(SIZE_SEALS) as fd, mapped(fd, writable=True) as host:
        add_seals(fd, ARGS_SEALS)
        assert seals_of(fd) == ARGS_SEALS
        with mapped(fd, writable=False) as worker:
            host.view[10:15] = b"hello"
            assert bytes(worker.view[10:15]) == b"hello"


def test_sealed_args_cannot_be_mapped_for_writing() -> None:
    with segment(SIZE_SEALS) as fd, mapped(fd, writable=True):
        add_seals(fd, ARGS_SEALS)
        with pytest.raises(OSError, match=f"cannot map {SIZE} bytes: Operation not permitted") as caught:
            Mapping(fd, SIZE, writable=True)
        assert caught.value.errno == errno.EPERM


def test_sealed_args_reopened_for_writing_stay_closed() -> None:
    with segment(SIZE_SEALS) as fd:
        before = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        add_seals(fd, ARGS_SEALS)
        after = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            for again in (before, after):
                with refused(errno.EPERM):
                    Mapping(again, SIZE, writable=True)
                with refused(errno.EPERM):
                    os.pwrite(again, b"x", 0)
                with mapped(again, writable=False) as worker:
                    assert bytes(worker.view) == bytes(SIZE)
        finally:
            os.close(before)
            os.close(after)


def test_readers_mapping_of_sealed_args_cannot_be_made_writable() -> None:
    with segment(ARGS_SEALS) as fd, mapped(fd, writable=False) as worker:
        assert not may_be_made_writable(worker)
        assert ctypes.get_errno() == errno.EACCES
    with segment(SIZE_SEALS) as fd, mapped(fd, writable=False) as reader:
        assert may_be_made_writable(reader)  # so it is the seal that forbids it


def test_out_stays_writable_for_workers() -> None:
    with segment(OUT_SEALS) as fd, mapped(fd, writable=True) as worker, mapped(fd, writable=False) as host:
        worker.view[0] = 7
        assert host.view[0] == 7


# -- mappings ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("populate", [True, False])
def test_mapping_shows_every_byte_of_the_segment(populate: bool) -> None:
    with segment(SIZE_SEALS) as fd:
        os.pwrite(fd, bytes(range(256)) * (SIZE // 256), 0)
        mapping = Mapping(fd, SIZE, writable=False, populate=populate)
        assert mapping.size == len(mapping.view) == SIZE
        assert bytes(mapping.view) == bytes(range(256)) * (SIZE // 256)
        assert ctypes.string_at(mapping.address, 4) == b"\x00\x01\x02\x03"
        mapping.close()


def test_views_are_of_bytes_and_writable_only_where_asked_for() -> None:
    with segment(SIZE_SEALS) as fd, mapped(fd, writable=True) as writer, mapped(fd, writable=False) as reader:
        assert (writer.view.format, writer.view.itemsize, writer.view.readonly) == ("B", 1, False)
        assert (reader.view.format, reader.view.itemsize, reader.view.readonly) == ("B", 1, True)
        writer.view[-1] = 9
        assert reader.view[-1] == 9
        with pytest.raises(TypeError):
            reader.view[0] = 1


def test_mapping_outlives_the_descriptor_and_keeps_none() -> None:
    with no_descriptor_left():
        fd = create_segment("luacell-test", SIZE, SIZE_SEALS)
        mapping = Mapping(fd, SIZE, writable=True)
        os.close(fd)
        mapping.view[0] = 1
        assert mapping.view[0] == 1
        mapping.close()


def test_closing_unmaps_once() -> None:
    with segment(SIZE_SEALS) as fd:
        mapping = Mapping(fd, SIZE, writable=True)
        address = mapping.address
        assert any(line.startswith(f"{address:x}-") for line in open_maps())
        mapping.close()
        assert not any("luacell-test" in line for line in open_maps())
        assert mapping.address == 0
        assert len(mapping.view) == 0
        mapping.close()


def open_maps() -> list[str]:
    with open("/proc/self/maps") as maps:
        return maps.readlines()


def test_mapping_that_the_kernel_refuses_says_why_and_leaves_nothing() -> None:
    with no_descriptor_left():
        with pytest.raises(OSError, match=f"cannot map {SIZE} bytes: Bad file descriptor"):
            Mapping(-1, SIZE, writable=False)
        with segment(SIZE_SEALS) as fd, refused(errno.EINVAL):
            Mapping(fd, 0, writable=False)
    assert not any("luacell-test" in line for line in open_maps())
