"""The memory check finds what a bad migration leaves behind: in made-up memory, and in the RAM of a running QEMU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.lab import GuestFactory, LabGuest
from virtmig.lab.guest import FIRST_BYTE, PAGE_BYTES
from virtmig.lab.lab import Lab
from virtmig.lab.memory_check import MemoryCheckFailed, check_domain, check_memory, check_stopped, expected_memory

PAGES = 24


def words_of(counter: int, step: int | None = None) -> np.ndarray:
    return np.frombuffer(expected_memory(PAGES, counter, step), dtype="<u4").reshape(PAGES, -1).copy()


def failure(words: np.ndarray) -> MemoryCheckFailed:
    with pytest.raises(MemoryCheckFailed) as caught:
        check_memory(words.tobytes(), PAGES)
    return caught.value


def test_filler_is_the_address_times_the_constant_of_the_guest() -> None:
    words = words_of(0)
    for page, word in ((0, 1), (3, 17), (PAGES - 1, 1023)):
        assert words[page, word] == (0x100000 + page * 4096 + word * 4) * 0x9E3779B1 % 2**32
    assert np.all(words[:, 1:] != 0)


def test_all_counters_equal() -> None:
    result = check_memory(words_of(7).tobytes(), PAGES)
    assert (result.pages, result.counter, result.step_page, result.checked_bytes) == (PAGES, 7, None, PAGES * 4096)


@pytest.mark.parametrize("counter", [0, 7, 2**32 - 1], ids=["zero", "seven", "wraps"])
@pytest.mark.parametrize("step", [1, 11, PAGES - 1])
def test_one_step_of_one_is_where_the_walk_stood(counter: int, step: int) -> None:
    result = check_memory(words_of(counter, step).tobytes(), PAGES)
    assert (result.counter, result.step_page) == (counter, step)


def test_digest_tells_two_memories_apart() -> None:
    assert check_memory(words_of(7).tobytes(), PAGES).digest == check_memory(words_of(7).tobytes(), PAGES).digest
    assert check_memory(words_of(7).tobytes(), PAGES).digest != check_memory(words_of(8).tobytes(), PAGES).digest


def test_lost_page_is_a_stale_counter() -> None:
    words = words_of(9)
    words[5, 0] = 8
    error = failure(words)
    assert error.bad_pages >= 1
    assert error.found != error.expected


def test_lost_page_behind_the_step() -> None:
    words = words_of(9, 20)
    words[5, 0] = 9
    error = failure(words)
    assert error.address in (FIRST_BYTE, FIRST_BYTE + 5 * PAGE_BYTES, FIRST_BYTE + 6 * PAGE_BYTES)


def test_page_from_the_future() -> None:
    words = words_of(9, 6)
    words[15, 0] = 10
    failure(words)


def test_two_steps() -> None:
    words = words_of(9, 12)
    words[:4, 0] = 11
    failure(words)


def test_step_of_two() -> None:
    words = words_of(9)
    words[:12, 0] = 11
    error = failure(words)
    assert (error.address, error.expected, error.found, error.bad_pages) == (FIRST_BYTE, 10, 11, 12)


def test_step_the_wrong_way() -> None:
    words = words_of(9)
    words[:12, 0] = 8
    failure(words)


def test_torn_page() -> None:
    words = words_of(9)
    words[13, 512:] = words[14, 512:]
    error = failure(words)
    address = FIRST_BYTE + 13 * PAGE_BYTES
    assert (error.address, error.bad_pages) == (address, 1)
    assert error.expected == (address + 2048) * 0x9E3779B1 % 2**32
    assert error.found == (address + PAGE_BYTES + 2048) * 0x9E3779B1 % 2**32
    assert f"{address:#x}" in str(error)


def test_zero_page_and_swapped_pages_are_counted() -> None:
    words = words_of(9)
    words[4] = 0
    words[[8, 9]] = words[[9, 8]]
    assert failure(words).bad_pages == 3


@given(byte=st.integers(0, PAGES * PAGE_BYTES - 1), flip=st.integers(1, 255), step=st.integers(2, PAGES - 2))
@settings(max_examples=200, deadline=None)
def test_any_changed_byte_is_found(byte: int, flip: int, step: int) -> None:
    memory = bytearray(expected_memory(PAGES, 0x01010101, step))
    memory[byte] ^= flip
    if byte // PAGE_BYTES in (step - 1, step) and byte % PAGE_BYTES < 4:
        return  # at the step itself a counter one lower or higher is only another place of the walk
    with pytest.raises(MemoryCheckFailed):
        check_memory(bytes(memory), PAGES)


def test_short_read() -> None:
    with pytest.raises(MemoryCheckFailed, match="were read"):
        check_memory(expected_memory(PAGES, 1)[:-1], PAGES)


class Recorded:
    """A domain of bytes; `changes` is written into it after the first whole reading."""

    def __init__(self, memory: bytes, changes: dict[int, int] | None = None) -> None:
        self.memory = bytearray(memory)
        self.changes = changes or {}
        self.read: list[tuple[int, int, int]] = []

    def memoryPeek(self, start: int, size: int, flags: int) -> bytes:
        self.read.append((start, size, flags))
        offset = start - FIRST_BYTE
        found = bytes(self.memory[offset : offset + size])
        if offset + size == len(self.memory):
            for at, value in self.changes.items():
                self.memory[at] = value
        return found


def test_reads_physical_memory_in_peeks_that_libvirt_allows() -> None:
    pages = (9 << 20) // PAGE_BYTES
    domain = Recorded(expected_memory(pages, 3, 100))
    assert check_stopped(domain, pages).step_page == 100
    assert {flags for _, _, flags in domain.read} == {2}
    assert max(size for _, size, _ in domain.read) <= 4 << 20
    assert sum(size for _, size, _ in domain.read) == 2 * pages * PAGE_BYTES


def test_memory_that_changes_while_the_guest_is_stopped() -> None:
    # a counter that moves to the next legal value is still a change
    domain = Recorded(expected_memory(PAGES, 3), {0: 4})
    with pytest.raises(MemoryCheckFailed, match="while the guest was stopped"):
        check_stopped(domain, PAGES)


# -- on a running QEMU -----------------------------------------------------------------------------------------------


def poke(lab: Lab, guest: LabGuest, address: int, flip: int) -> None:
    """XOR one byte of the guest's physical memory from outside, in the QEMU process itself."""
    answer = lab.virsh(lab.a, "qemu-monitor-command", guest.name, "--hmp", f"gpa2hva {address:#x}")
    host_address = int(answer.split()[-1], 16)
    with open(f"/proc/{lab.a.qemu_pid(guest.name)}/mem", "r+b", buffering=0) as memory:
        memory.seek(host_address)
        byte = memory.read(1)[0]
        memory.seek(host_address)
        memory.write(bytes([byte ^ flip]))


@pytest.mark.lab
@pytest.mark.root
@pytest.mark.parametrize(
    ("page", "offset"), [(7, 4), (7, 4095), (7, 0)], ids=["first filler byte", "last filler byte", "counter"]
)
def test_corrupted_page_of_a_running_guest(full_lab: Lab, guest: GuestFactory, page: int, offset: int) -> None:
    victim = guest(memory_mib=16, dirty_mib_s=0)
    domain = victim.domain(full_lab.a)
    domain.suspend()
    check_stopped(domain, victim.settings.pages)
    poke(full_lab, victim, FIRST_BYTE + page * PAGE_BYTES + offset, 0x40)
    with pytest.raises(MemoryCheckFailed) as caught:
        check_stopped(domain, victim.settings.pages)
    assert caught.value.bad_pages >= 1
    if offset:
        assert caught.value.address == FIRST_BYTE + page * PAGE_BYTES
    poke(full_lab, victim, FIRST_BYTE + page * PAGE_BYTES + offset, 0x40)
    check_stopped(domain, victim.settings.pages)


@pytest.mark.lab
def test_check_resumes_a_running_guest_and_leaves_a_paused_one(lab: Lab, guest: GuestFactory) -> None:
    made = guest(memory_mib=16)
    domain = made.domain(lab.a)
    check_domain(domain, made.settings.pages)
    assert made.running(lab.a)
    domain.suspend()
    check_domain(domain, made.settings.pages)
    assert not made.running(lab.a)


def test_no_libvirt_is_imported() -> None:
    source = Path(__file__).parents[2] / "virtmig" / "lab"
    assert (source / "guest.py").exists()
    assert not [p.name for p in source.glob("*.py") if "import libvirt" in p.read_text()]
