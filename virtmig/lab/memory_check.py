"""Is every byte of a stopped lab guest what it must be? guest.S says what that is.

Independent of whoever moved the guest: it reads the guest's RAM through libvirt and recomputes each word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import numpy as np

from virtmig.errors import MigrationError
from virtmig.lab.guest import FIRST_BYTE, PAGE_BYTES

_HASH = np.uint32(0x9E3779B1)
_WORDS = PAGE_BYTES // 4
_PHYSICAL = 2  # VIR_MEMORY_PHYSICAL
#: libvirt's protocol limits one virDomainMemoryPeek to 4 MiB (REMOTE_DOMAIN_MEMORY_PEEK_BUFFER_MAX)
_PEEK_BYTES = 4 << 20
_PAUSED = 3  # VIR_DOMAIN_PAUSED

Reader = Callable[[int, int], bytes]


class MemoryOfDomain(Protocol):
    def memoryPeek(self, start: int, size: int, flags: int) -> bytes: ...


class MemoryCheckFailed(MigrationError):
    """A page is not what it must be: `address` is the first bad page's, `bad_pages` how many there are.

    `expected` and `found` are the first bad word of that page.
    """

    def __init__(
        self, message: str, *, address: int = 0, bad_pages: int = 0, expected: int = 0, found: int = 0
    ) -> None:
        super().__init__(message, hint="the guest's memory was damaged: keep both hosts' logs, do not trust this guest")
        self.address = address
        self.bad_pages = bad_pages
        self.expected = expected
        self.found = found


class MemoryCheck(msgspec.Struct, frozen=True):
    """What a good check saw. `step_page` is the page where the walk stood, None when all counters were equal."""

    pages: int
    counter: int
    step_page: int | None
    digest: str

    @property
    def checked_bytes(self) -> int:
        return self.pages * PAGE_BYTES


def check_stopped(domain: MemoryOfDomain, pages: int) -> MemoryCheck:
    """Check `pages` pages of a domain that somebody has stopped; it is read twice, and nothing may have changed.

    `domain` is a libvirt domain (virDomainMemoryPeek, physical addresses). Raises MemoryCheckFailed.
    """

    def read(start: int, size: int) -> bytes:
        return bytes(domain.memoryPeek(start, size, _PHYSICAL))

    first = read_walk(read, pages)
    result = check_memory(first, pages)
    if read_walk(read, pages) != first:
        raise MemoryCheckFailed("memory changed while the guest was stopped")
    return result


def check_domain(domain: Any, pages: int) -> MemoryCheck:
    """Suspend a running domain, check it, resume it. A domain that is already paused stays paused."""
    paused = domain.state(0)[0] == _PAUSED
    if not paused:
        domain.suspend()
    try:
        return check_stopped(domain, pages)
    finally:
        if not paused:
            domain.resume()


def read_walk(read: Reader, pages: int) -> bytes:
    """The walk's memory; `read(start, size)` gives bytes of guest physical memory."""
    size = pages * PAGE_BYTES
    chunks = [read(FIRST_BYTE + at, min(_PEEK_BYTES, size - at)) for at in range(0, size, _PEEK_BYTES)]
    return b"".join(chunks)


def expected_memory(pages: int, counter: int, step_page: int | None = None) -> bytes:
    """What a good guest's walk looks like: pages below `step_page` are one step ahead of `counter`."""
    words = _filler(pages)
    words[:, 0] = counter
    if step_page is not None:
        words[:step_page, 0] += np.uint32(1)
    return words.tobytes()


def check_memory(memory: bytes, pages: int) -> MemoryCheck:
    """Every word: fillers exact, counters equal except for one step of one. Raises MemoryCheckFailed."""
    if len(memory) != pages * PAGE_BYTES:
        raise MemoryCheckFailed(f"{len(memory)} bytes of memory were read, {pages * PAGE_BYTES} are the guest's walk")
    words = np.frombuffer(memory, dtype="<u4").reshape(pages, _WORDS)
    wrong = (words[:, 1:] != _filler(pages)[:, 1:]).any(axis=1)
    if wrong.any():
        page = int(np.argmax(wrong))
        offset = 1 + int(np.argmax(words[page, 1:] != _filler(pages)[page, 1:]))
        address = FIRST_BYTE + page * PAGE_BYTES
        expected = (address + 4 * offset) * int(_HASH) & 0xFFFF_FFFF
        raise MemoryCheckFailed(
            f"page {address:#x} is damaged at {address + 4 * offset:#x}: {expected:#010x} expected, "
            f"{int(words[page, offset]):#010x} found ({int(wrong.sum())} bad pages of {pages})",
            address=address,
            bad_pages=int(wrong.sum()),
            expected=expected,
            found=int(words[page, offset]),
        )
    counters = words[:, 0]
    low = int(counters[-1])  # the walk starts at the first page: what it has not reached yet is the lower value
    step = int(np.argmax(counters != counters[0])) if (counters != counters[0]).any() else None
    ahead = np.full(pages, low, dtype=np.uint32)
    if step is not None:
        ahead[:step] = (low + 1) & 0xFFFF_FFFF
    bad = counters != ahead
    if bad.any():
        page = int(np.argmax(bad))
        address = FIRST_BYTE + page * PAGE_BYTES
        raise MemoryCheckFailed(
            f"page {address:#x} lost writes: its counter is {int(counters[page])}, {int(ahead[page])} expected "
            f"({int(bad.sum())} bad pages of {pages})",
            address=address,
            bad_pages=int(bad.sum()),
            expected=int(ahead[page]),
            found=int(counters[page]),
        )
    return MemoryCheck(pages, low, step, hashlib.blake2b(memory, digest_size=16).hexdigest())


def _filler(pages: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint32]]:
    addresses = np.arange(FIRST_BYTE, FIRST_BYTE + pages * PAGE_BYTES, 4, dtype=np.uint32)
    return (addresses * _HASH).reshape(pages, _WORDS)
