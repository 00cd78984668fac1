"""Sets of CPU or NUMA node numbers as libvirt writes them: 0-3,^2,8 (virBitmapParse, util/virbitmap.c)."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: virDomainDefParse takes CPU numbers below this (VIR_DOMAIN_CPUMASK_LEN)
MAX_CPUS = 16384

_PART = re.compile(r"\s*(\^?)(\d{1,5})(?:-(\d{1,5}))?\s*", re.ASCII)


def parse_set(text: str) -> frozenset[int]:
    """The numbers in `text`. Raises ValueError for what libvirt would not read, and for MAX_CPUS and more."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if not match or (match[1] and match[3]):
            raise ValueError(f"'{text}' is no list of numbers such as 0-3,8")
        first, last = int(match[2]), int(match[3] or match[2])
        if last < first or last >= MAX_CPUS:
            raise ValueError(f"'{text}': {match[0].strip()} is no range below {MAX_CPUS}")
        if match[1]:
            numbers.discard(first)
        else:
            numbers.update(range(first, last + 1))
    return frozenset(numbers)


def format_set(numbers: Iterable[int]) -> str:
    """As virBitmapFormat prints it: ascending, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def numbering(before: str, after: str) -> dict[int, int]:
    """Which number becomes which: the n-th of `before` the n-th of `after`, or all of them the only one of `after`.

    Raises ValueError when the counts differ.
    """
    old, new = sorted(parse_set(before)), sorted(parse_set(after))
    if len(new) == 1:
        new *= len(old)
    if len(old) != len(new):
        raise ValueError(f"'{before}' has {len(old)} numbers and '{after}' has {len(new)}")
    return dict(zip(old, new, strict=True))
