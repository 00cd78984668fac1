"""Runs, batches and sets of pages."""

from __future__ import annotations

import numpy as np
import pytest

from virtmig.errors import GuestMemoryError
from virtmig.pages import PAGE_BYTES, PageBatch, PageSet, runs_of


def numbers(*pages: int) -> np.ndarray:
    return np.array(pages, np.uint64)


def test_runs_in_the_order_given() -> None:
    assert list(runs_of(numbers())) == []
    assert list(runs_of(numbers(5))) == [(5, 1)]
    assert list(runs_of(numbers(5, 6, 7, 2, 3, 9))) == [(5, 3), (2, 2), (9, 1)]
    assert list(runs_of(numbers(0, 1, 2, 3, 4), 2)) == [(0, 2), (2, 2), (4, 1)]
    assert list(runs_of(numbers(4, 3, 3))) == [(4, 1), (3, 1), (3, 1)]


def test_a_batch_gives_runs_that_share_its_memory() -> None:
    data = bytearray(b"".join(bytes([n]) * PAGE_BYTES for n in (7, 8, 3)))
    batch = PageBatch("pc.ram", numbers(7, 8, 3), memoryview(data), numbers(1, 2))
    assert batch.page_count == 5
    first, second = batch.runs()
    assert (first.first_page, first.page_count, first.offset_bytes) == (7, 2, 7 * PAGE_BYTES)
    assert (second.first_page, bytes(second.data)) == (3, b"\x03" * PAGE_BYTES)
    data[0] = 99
    assert first.data[0] == 99
    with pytest.raises(GuestMemoryError, match=r"2 pages of 'pc\.ram' with 4096 bytes"):
        PageBatch("pc.ram", numbers(1, 2), memoryview(bytes(PAGE_BYTES)))


def test_a_set() -> None:
    pages = PageSet({"a": 10 * PAGE_BYTES, "b": 70 * PAGE_BYTES})
    assert pages.add("a", numbers(1, 3, 3)) == 2
    assert pages.add("a", numbers(3, 4)) == 1
    assert ("a", 3) in pages
    assert ("a", 2) not in pages
    assert ("a", 10) not in pages
    assert ("c", 0) not in pages
    assert pages.among("a", numbers(0, 1, 4)).tolist() == [False, True, True]
    assert pages.pages("a").tolist() == [1, 3, 4]
    assert pages.missing("a").tolist() == [0, 2, 5, 6, 7, 8, 9]
    pages.discard("a", numbers(3))
    pages.add_range("b", 4 * PAGE_BYTES, 66 * PAGE_BYTES)
    pages.discard_range("b", 60 * PAGE_BYTES, 9 * PAGE_BYTES)
    assert len(pages) == 2 + 57
    assert pages.blocks == ("a", "b")


def test_a_bitmap_is_qemus() -> None:
    pages = PageSet({"b": 70 * PAGE_BYTES})
    pages.add("b", numbers(0, 9, 69))
    assert pages.to_bitmap("b") == b"\x01\x02" + bytes(6) + b"\x20" + bytes(7)
    other = PageSet({"b": 70 * PAGE_BYTES})
    other.add_bitmap("b", b"\x01\x02" + bytes(6) + b"\xe0" + b"\xff" * 7)
    assert other.pages("b").tolist() == [0, 9, 69]
    with pytest.raises(GuestMemoryError, match="8 bytes for the 70 pages"):
        other.add_bitmap("b", bytes(8))


def test_outside_is_refused() -> None:
    pages = PageSet({"a": 10 * PAGE_BYTES})
    with pytest.raises(GuestMemoryError, match="no RAM block 'c'"):
        pages.add("c", numbers(0))
    with pytest.raises(GuestMemoryError, match="page 10 of 'a', which has 10"):
        pages.add("a", numbers(2, 10))
    with pytest.raises(GuestMemoryError, match="outside of 'a'"):
        pages.add_range("a", 9 * PAGE_BYTES, 2 * PAGE_BYTES)
    with pytest.raises(GuestMemoryError, match="not whole pages"):
        pages.discard_range("a", 1, PAGE_BYTES)
    assert len(pages) == 0
