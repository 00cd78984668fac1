"""Sets of CPU numbers in libvirt's writing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtmig.domain.cpu_sets import MAX_CPUS, format_set, numbering, parse_set


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("3", {3}), ("0-2", {0, 1, 2}), ("0-3,^2,8", {0, 1, 3, 8}), (" 1 , 5-5 ", {1, 5}), ("^1,1", {1}), ("4,4", {4})],
)
def test_what_libvirt_reads(text: str, numbers: set[int]) -> None:
    assert parse_set(text) == numbers


@pytest.mark.parametrize("text", ["", ",", "a", "1-", "3-2", "-1", "^1-2", "0-99999", str(MAX_CPUS), "1 2", "١"])
def test_what_libvirt_does_not_read(text: str) -> None:
    with pytest.raises(ValueError, match="'"):
        parse_set(text)


@given(st.sets(st.integers(0, MAX_CPUS - 1), min_size=1))
def test_a_set_that_was_written_is_read_again(numbers: set[int]) -> None:
    assert parse_set(format_set(numbers)) == numbers


def test_neighbours_are_joined() -> None:
    assert format_set([9, 1, 2, 3, 7, 8]) == "1-3,7-9"


def test_numbers_are_paired_in_order() -> None:
    assert numbering("0,2-3", "7-9") == {0: 7, 2: 8, 3: 9}
    assert numbering("0-2", "5") == {0: 5, 1: 5, 2: 5}
    with pytest.raises(ValueError, match="'0-2' has 3 numbers and '5-6' has 2"):
        numbering("0-2", "5-6")
