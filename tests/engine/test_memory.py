"""Guest memory in mapped blocks: runs and scattered pages, zero pages that cost nothing, bounds."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtmig.engine.memory import GuestMemory, holes_and_data, nonzero_pages
from virtmig.errors import GuestMemoryError

PAGE = 4096


def numbers(*pages: int) -> np.ndarray:
    return np.array(pages, np.uint64)


@pytest.fixture
def memory():
    fd = os.memfd_create("test")
    os.ftruncate(fd, 64 * PAGE)
    made = GuestMemory({"ram": (fd, 64 * PAGE)})
    yield made
    made.close()


def test_runs_and_scattered_pages_land_where_they_belong(memory: GuestMemory) -> None:
    content = np.random.default_rng(2).bytes(4 * PAGE)
    memory.place("ram", numbers(3, 4, 5, 6), memoryview(content))
    memory.place("ram", numbers(40, 9, 63, 11), memoryview(content))
    block = memory.block("ram")
    assert bytes(block.bytes[3 * PAGE : 7 * PAGE]) == content
    for row, page in enumerate((40, 9, 63, 11)):
        assert bytes(block.pages[page]) == content[row * PAGE : (row + 1) * PAGE]
    assert np.flatnonzero(memory.touched("ram")).tolist() == [3, 4, 5, 6, 9, 11, 40, 63]


def test_zero_pages_are_written_only_where_something_was(memory: GuestMemory) -> None:
    block = memory.block("ram")
    memory.zero("ram", np.arange(64, dtype=np.uint64))
    assert list(holes_and_data(block.fd, block.length)) == []
    memory.place("ram", numbers(7, 8), memoryview(b"x" * (2 * PAGE)))
    memory.zero("ram", np.arange(8, 64, dtype=np.uint64))
    assert nonzero_pages(block.bytes).nonzero()[0].tolist() == [7]
    held = [page for start, end in holes_and_data(block.fd, block.length) for page in range(start // PAGE, end // PAGE)]
    assert {7, 8} <= set(held)  # and their neighbours, where the kernel fills larger folios


@pytest.mark.parametrize("pages", [(64,), (0, 64), (1 << 40,)])
def test_pages_outside_are_refused(memory: GuestMemory, pages: tuple[int, ...]) -> None:
    with pytest.raises(GuestMemoryError, match="which has 64"):
        memory.place("ram", numbers(*pages), memoryview(bytes(len(pages) * PAGE)))
    with pytest.raises(GuestMemoryError):
        memory.zero("ram", numbers(*pages))
    with pytest.raises(GuestMemoryError):
        memory.room("ram", pages[-1], 1)
    with pytest.raises(GuestMemoryError, match="no RAM block"):
        memory.place("vram", numbers(0), memoryview(bytes(PAGE)))


@given(st.lists(st.tuples(st.integers(0, 599), st.integers(0, 511), st.integers(1, 2**64 - 1)), max_size=20))
def test_one_word_anywhere_makes_a_page_nonzero(words: list[tuple[int, int, int]]) -> None:
    block = np.zeros(600 * 512, np.uint64)
    for page, at, value in words:
        block[page * 512 + at] = value
    expected = sorted({page for page, _, _ in words})
    assert np.flatnonzero(nonzero_pages(block.view(np.uint8))).tolist() == expected
    some = nonzero_pages(block.view(np.uint8), 100, 300)
    assert (np.flatnonzero(some) + 100).tolist() == [page for page in expected if 100 <= page < 400]


def test_length_that_is_no_pages_is_refused_and_the_descriptor_closed() -> None:
    fd = os.memfd_create("test")
    with pytest.raises(GuestMemoryError, match="not whole pages"):
        GuestMemory({"ram": (fd, 100)})
    with pytest.raises(OSError):
        os.fstat(fd)
