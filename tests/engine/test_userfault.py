"""The userfaultfd binding against this kernel: placing, faults, partial answers, what is said when there is none."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.leftovers import leftovers
from virtmig.engine import userfault
from virtmig.engine.userfault import PageExists, Userfault, available
from virtmig.errors import GuestMemoryError
from virtmig.pages import PAGE_BYTES

FACTS = available()
pytestmark = pytest.mark.skipif(not FACTS.available, reason=FACTS.reason)
HEADER = Path("/usr/include/linux/userfaultfd.h")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = leftovers()
    yield
    assert leftovers() == before


class Memory:
    """Some pages of this process, touched only by libc, without the interpreter lock."""

    def __init__(self, pages: int, fd: int = -1) -> None:
        flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.mapping = mmap.mmap(fd, pages * PAGE_BYTES, flags)
        self.address = int(np.frombuffer(self.mapping, np.uint8).ctypes.data)
        self.length = pages * PAGE_BYTES

    def page(self, number: int) -> int:
        return self.address + number * PAGE_BYTES

    def touch(self, number: int, value: int = 7) -> threading.Thread:
        """A thread that writes one byte there."""
        thread = threading.Thread(target=ctypes.memset, args=(self.page(number), value, 1))
        thread.start()
        return thread

    def bytes_of(self, number: int) -> bytes:
        return self.mapping[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]

    def close(self) -> None:
        self.mapping.close()


@pytest.fixture
def memory() -> Iterator[Memory]:
    with contextlib.closing(Memory(8)) as made:
        yield made


@pytest.fixture
def source() -> Iterator[Memory]:
    with contextlib.closing(Memory(8)) as made:
        for page in range(8):
            made.mapping[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = bytes([page + 1]) * PAGE_BYTES
        yield made


def next_faults(watch: Userfault) -> list[userfault.Fault]:
    assert select.select([watch], [], [], 10)[0], "no fault within 10 s"
    return watch.faults()


def test_a_missing_page_is_read_as_a_fault_and_copied(memory: Memory, source: Memory) -> None:
    with Userfault.open() as watch:
        watch.register(memory.address, memory.length, missing=True)
        assert watch.faults() == []
        thread = memory.touch(3)
        (fault,) = next_faults(watch)
        assert (fault.address, fault.flags & userfault.UFFD_PAGEFAULT_FLAG_WRITE, fault.thread) == (
            memory.page(3),
            1,
            0,
        )
        watch.copy(memory.page(3), source.page(5), PAGE_BYTES)
        thread.join(10)
        assert not thread.is_alive()
        assert memory.bytes_of(3) == b"\x07" + bytes([6]) * (PAGE_BYTES - 1)


def test_several_faults_come_with_one_read(memory: Memory) -> None:
    with Userfault.open(userfault.UFFD_FEATURE_THREAD_ID) as watch:
        watch.register(memory.address, memory.length, missing=True)
        threads = [memory.touch(page) for page in range(8)]
        seen: list[userfault.Fault] = []
        reads = 0
        while len(seen) < 8:
            seen += next_faults(watch)
            reads += 1
        assert {fault.address for fault in seen} == {memory.page(page) for page in range(8)}
        assert {fault.thread for fault in seen} == {thread.native_id for thread in threads}
        assert reads <= 8
        watch.zeropage(memory.address, memory.length)
        for thread in threads:
            thread.join(10)
        assert all(memory.bytes_of(page) == b"\x07" + bytes(PAGE_BYTES - 1) for page in range(8))


def test_a_page_that_is_there_is_typed_and_says_how_far_it_got(memory: Memory, source: Memory) -> None:
    memory.mapping[2 * PAGE_BYTES] = 99
    with Userfault.open() as watch:
        watch.register(memory.address, memory.length, missing=True)
        with pytest.raises(PageExists) as caught:
            watch.copy(memory.address, source.address, 4 * PAGE_BYTES)
        assert caught.value.done_bytes == 2 * PAGE_BYTES
        with pytest.raises(PageExists) as caught:
            watch.zeropage(memory.page(2), PAGE_BYTES)
        assert caught.value.done_bytes == 0
        watch.copy(memory.page(3), source.page(3), PAGE_BYTES)
        assert [memory.mapping[page * PAGE_BYTES] for page in range(4)] == [1, 2, 99, 4]


def test_a_partial_answer_is_gone_on_with(memory: Memory) -> None:
    """Only two pages of the source exist: the kernel places them and says EAGAIN, then EFAULT for the third."""
    with contextlib.closing(Memory(4)) as short, Userfault.open() as watch:
        short.mapping[: 2 * PAGE_BYTES] = b"\x05" * (2 * PAGE_BYTES)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect(ctypes.c_void_p(short.page(2)), ctypes.c_size_t(2 * PAGE_BYTES), 0)
        watch.register(memory.address, memory.length, missing=True)
        with pytest.raises(GuestMemoryError, match=f"at {memory.page(2):#x}: Bad address"):
            watch.copy(memory.address, short.address, 4 * PAGE_BYTES)
        assert memory.bytes_of(1) == b"\x05" * PAGE_BYTES


@pytest.mark.skipif(not FACTS.has(userfault.UFFD_FEATURE_MINOR_SHMEM), reason="no minor faults of shmem (Linux 5.14)")
def test_a_memory_file_faults_minor_where_it_has_pages_and_missing_in_its_holes() -> None:
    fd = os.memfd_create("virtmig-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, 8 * PAGE_BYTES)
    os.pwrite(fd, b"\x11" * 2 * PAGE_BYTES, 2 * PAGE_BYTES)
    with contextlib.closing(Memory(8, fd)) as memory, Userfault.open() as watch:
        watch.register(memory.address, memory.length, missing=True, minor=True)
        minor, missing = userfault.UFFD_PAGEFAULT_FLAG_MINOR, 0
        for page, kind in ((2, minor), (5, missing)):
            thread = memory.touch(page)
            (fault,) = next_faults(watch)
            assert fault.flags & userfault.UFFD_PAGEFAULT_FLAG_MINOR == kind
            os.pwrite(fd, b"\x22" * PAGE_BYTES, page * PAGE_BYTES)
            watch.continue_(memory.page(page), PAGE_BYTES)
            thread.join(10)
            assert memory.bytes_of(page) == b"\x07" + b"\x22" * (PAGE_BYTES - 1)
        with pytest.raises(PageExists) as caught:
            watch.continue_(memory.page(2), 2 * PAGE_BYTES)
        assert caught.value.done_bytes == 0
        with pytest.raises(GuestMemoryError, match="Bad address"):
            watch.continue_(memory.page(7), PAGE_BYTES)
    os.close(fd)


def test_write_protection_stops_a_writer_until_it_is_lifted(memory: Memory) -> None:
    memory.mapping[:] = bytes(memory.length)
    with Userfault.open(userfault.UFFD_FEATURE_PAGEFAULT_FLAG_WP) as watch:
        watch.register(memory.address, memory.length, wp=True)
        watch.writeprotect(memory.address, memory.length, protect=True)
        thread = memory.touch(1)
        (fault,) = next_faults(watch)
        assert fault.flags & userfault.UFFD_PAGEFAULT_FLAG_WP
        watch.writeprotect(memory.page(1), PAGE_BYTES, protect=False)
        thread.join(10)
        assert memory.mapping[PAGE_BYTES] == 7


def test_unregistering_and_closing_let_go_of_who_waits(memory: Memory) -> None:
    watch = Userfault.open()
    watch.register(memory.address, memory.length, missing=True)
    waiting = memory.touch(0)
    next_faults(watch)
    watch.unregister(memory.address, PAGE_BYTES)
    waiting.join(10)
    later = memory.touch(1)
    next_faults(watch)
    watch.wake(memory.page(1), PAGE_BYTES)  # it looks again, and waits again
    next_faults(watch)
    watch.close()
    later.join(10)
    assert not waiting.is_alive()
    assert not later.is_alive()
    watch.close()


def test_what_is_not_registered_is_refused(memory: Memory) -> None:
    with Userfault.open() as watch:
        with pytest.raises(GuestMemoryError, match="UFFDIO_REGISTER"):
            watch.register(memory.address + 1, PAGE_BYTES, missing=True)
        with pytest.raises(GuestMemoryError, match="UFFDIO_ZEROPAGE"):
            watch.zeropage(memory.address, PAGE_BYTES)
        with pytest.raises(GuestMemoryError, match="UFFDIO_WRITEPROTECT"):
            watch.writeprotect(memory.address, PAGE_BYTES, protect=True)


def test_a_feature_that_the_kernel_lacks_is_named() -> None:
    with pytest.raises(GuestMemoryError, match="lacks bit 61 of userfaultfd"):
        Userfault.open(1 << 61)


def test_no_progress_at_all_ends(monkeypatch: pytest.MonkeyPatch, memory: Memory) -> None:
    with Userfault.open() as watch:

        def busy(*_: object) -> int:
            raise BlockingIOError(errno.EAGAIN, "busy")

        monkeypatch.setattr(userfault, "_IDLE_TRIES", 3)
        monkeypatch.setattr(fcntl, "ioctl", busy)
        with pytest.raises(GuestMemoryError, match="no progress"):
            watch.zeropage(memory.address, PAGE_BYTES)
        with pytest.raises(GuestMemoryError, match="no progress"):
            watch.writeprotect(memory.address, PAGE_BYTES, protect=True)
        monkeypatch.undo()


class TestOpening:
    def test_without_the_device_the_system_call_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(userfault, "DEVICE", "/dev/null/none")
        facts = available()
        assert facts.available
        assert facts.user_mode_only
        assert facts.features == FACTS.features

    def test_a_kernel_without_user_mode_only_is_asked_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real, asked = userfault.open_userfaultfd_syscall, []

        def old_kernel(flags: int) -> int:
            asked.append(flags)
            if flags:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(flags)

        monkeypatch.setattr(userfault, "DEVICE", "/dev/null/none")
        monkeypatch.setattr(userfault, "open_userfaultfd_syscall", old_kernel)
        facts = available()
        assert asked == [userfault.UFFD_USER_MODE_ONLY, 0]
        assert not facts.user_mode_only

    @pytest.mark.parametrize(
        ("code", "reason", "hint"),
        [
            (errno.EPERM, r"not permitted \(vm.unprivileged_userfaultfd is \d\)", "access to /dev/null/none.*seccomp"),
            (errno.ENOSYS, "no userfaultfd here", "CONFIG_USERFAULTFD"),
            (errno.EMFILE, "Too many open files", ""),
        ],
    )
    def test_a_refusal_says_who_can_lift_it(
        self, monkeypatch: pytest.MonkeyPatch, code: int, reason: str, hint: str
    ) -> None:
        def refuse(flags: int) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(userfault, "DEVICE", "/dev/null/none")
        monkeypatch.setattr(userfault, "open_userfaultfd_syscall", refuse)
        with pytest.raises(GuestMemoryError, match=reason) as caught:
            Userfault.open()
        assert re.search(hint, caught.value.hint)
        facts = available()
        assert (facts.available, facts.reason, facts.hint) == (False, caught.value.message, caught.value.hint)
        assert not facts.has(0)

    def test_an_unknown_machine_has_no_system_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(userfault, "SYSCALL_NUMBERS", {})
        with pytest.raises(OSError, match="not known here"):
            userfault.open_userfaultfd_syscall(0)


class TestNumbers:
    def test_ioctl_numbers_are_iocs(self) -> None:
        """asm-generic/ioctl.h: direction << 30 | size << 16 | type << 8 | number."""
        read_write, read = 3, 2
        expected = {
            "UFFDIO_API": (read_write, 24, 0x3F),
            "UFFDIO_REGISTER": (read_write, 32, 0x00),
            "UFFDIO_UNREGISTER": (read, 16, 0x01),
            "UFFDIO_WAKE": (read, 16, 0x02),
            "UFFDIO_COPY": (read_write, 40, 0x03),
            "UFFDIO_ZEROPAGE": (read_write, 32, 0x04),
            "UFFDIO_WRITEPROTECT": (read_write, 24, 0x06),
            "UFFDIO_CONTINUE": (read_write, 32, 0x07),
        }
        for name, (direction, size, number) in expected.items():
            assert getattr(userfault, name) == direction << 30 | size << 16 | 0xAA << 8 | number, name

    @pytest.mark.skipif(not HEADER.exists(), reason="no kernel headers are installed")
    def test_constants_are_those_of_the_installed_header(self) -> None:
        """It may be older than the table, never different from it."""
        found = re.findall(r"#define (UFFD\w+)\s+\(?(?:\(__u64\))?\(?(\d+) ?<< ?(\d+)\)", HEADER.read_text())
        known = [(name, int(one) << int(bit)) for name, one, bit in found if hasattr(userfault, name)]
        assert len(known) >= 20
        assert [(name, getattr(userfault, name)) for name, _ in known] == known

    def test_a_bit_without_a_name_is_a_number(self) -> None:
        assert userfault.feature_names(1 << 15 | 1 << 40) == ("UFFD_FEATURE_WP_ASYNC", "bit 40")
