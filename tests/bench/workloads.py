"""What the guest's memory holds in a benchmark. Seeds are fixed, and no two pages of contents are the same.

zero            never touched: a hole of the memory file
zero-touched    zeros that are there, so that they have to be looked at
clumped         nine tenths never touched, one tenth random in pieces of 2 MiB
scattered       the same share, page by page
random          incompressible
text            words, some of them often: zlib makes a third of it
"""

from __future__ import annotations

import mmap
import os

import numpy as np

from virtmig.pages import PAGE_BYTES

NAMES = ("zero", "zero-touched", "clumped", "scattered", "random", "text")
_PIECE = 8 << 20
_CLUMP = 2 << 20


class Pattern:
    """One workload's bytes, kept in a memory file and copied into a guest's."""

    def __init__(self, name: str, length: int) -> None:
        self.name = name
        self.length = length
        self.ranges = _ranges(name, length)
        self._fd = os.memfd_create(f"bench-{name}", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, length)
        if name != "zero-touched":
            self._make()

    def fill(self, fd: int, first_byte: int = 0) -> None:
        """Into a memory file of the same length, from `first_byte` on; holes stay holes."""
        with mmap.mmap(self._fd, self.length, prot=mmap.PROT_READ) as source:
            view = memoryview(source)
            for start, end in self.ranges:
                at = max(start, first_byte)
                while at < end:
                    part = view[at : min(at + _PIECE, end)]
                    at += os.pwrite(fd, part, at)
                    part.release()
            view.release()

    def close(self) -> None:
        os.close(self._fd)

    def _make(self) -> None:
        generator = np.random.Generator(np.random.SFC64(7))
        text = np.zeros(0, np.uint8)
        for start, end in self.ranges:
            for at in range(start, end, _PIECE):
                size = min(_PIECE, end - at)
                if self.name == "text":
                    text = text if len(text) == _PIECE else _text(generator, _PIECE)
                    data = np.roll(text, 1021 * (at // _PIECE))[:size].tobytes()  # no page comes twice
                else:
                    data = generator.bytes(size)
                os.pwrite(self._fd, data, at)


def _ranges(name: str, length: int) -> list[tuple[int, int]]:
    """Where something is written."""
    if name == "zero":
        return []
    if name == "clumped":
        return [(at, min(at + _CLUMP, length)) for at in range(0, length, 10 * _CLUMP)]
    if name == "scattered":
        picked = np.random.default_rng(3).random(length // PAGE_BYTES) < 0.1
        return [(page * PAGE_BYTES, (page + 1) * PAGE_BYTES) for page in np.flatnonzero(picked).tolist()]
    return [(0, length)]


def _text(generator: np.random.Generator, size: int) -> np.ndarray:
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", np.uint8)
    words = letters[np.minimum(generator.geometric(0.12, (4096, 8)) - 1, 25)]
    words[:, 7] = ord(" ")
    chosen = np.minimum(generator.zipf(1.3, size // 8), 4096) - 1
    return words[chosen].reshape(-1)
