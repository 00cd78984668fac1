"""What a main stream says, element by element. Plain data; the events of a stream give back its bytes exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from virtmig.pages import PageBatch
from virtmig.stream.wire import TARGET_PAGE_BYTES, Item, RamFlag

Words = npt.NDArray[np.uint64]
_ADDRESS = np.uint64(~(TARGET_PAGE_BYTES - 1) & 0xFFFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True, slots=True)
class StreamHeader:
    """File header and configuration. `machine` is None where the configuration is absent (machine types up to 2.3).

    `subsections` are (name, version, payload) as they came; `capabilities` is what the one of that name lists.
    """

    version: int
    machine: str | None
    subsections: tuple[tuple[str, int, bytes], ...] = ()
    capabilities: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Command:
    """A command with its raw payload; `value` is the number of a PING, `name` the block of RECV_BITMAP and DISCARD,
    `ranges` the (start, length) pairs of a DISCARD in bytes, `page_sizes` what ADVISE says: all blocks' host page sizes
    ORed, and the target page size.
    """

    number: int
    payload: bytes
    value: int | None = None
    name: str = ""
    ranges: tuple[tuple[int, int], ...] = ()
    page_sizes: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Package:
    """The PACKAGED command with the events of the stream nested in it."""

    length: int
    events: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class SectionBegin:
    """The head of a section of a live handler whose records follow: RAM. `kind` is START, PART or END."""

    kind: Item
    section_id: int
    idstr: str
    instance_id: int = 0
    version_id: int = 0


@dataclass(frozen=True, slots=True)
class SectionFooter:
    section_id: int


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One block of the MEM_SIZE list; `page_size_bytes` only for hugetlb blocks under postcopy, `address` only with
    x-ignore-shared, `mapped` (page size, bitmap offset, pages offset) only with mapped-ram.
    """

    name: str
    used_length: int
    page_size_bytes: int | None = None
    address: int | None = None
    mapped: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class RamBlocks:
    """The block list; `word` is the record's first word (total | MEM_SIZE)."""

    word: int
    blocks: tuple[RamBlock, ...]

    @property
    def total_bytes(self) -> int:
        return self.word & ~(TARGET_PAGE_BYTES - 1)


@dataclass(frozen=True, slots=True)
class _Run:
    """A run of records of one kind. `words` as on the wire (address | flags); only the first can name a block
    (`named`); `block` is the block all of them belong to.
    """

    block: str
    named: bool
    words: Words

    @property
    def offsets(self) -> Words:
        """Bytes from the start of the block."""
        return self.words & _ADDRESS

    @property
    def page_numbers(self) -> Words:
        return self.words // np.uint64(TARGET_PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class Pages(_Run):
    """A run of PAGE records; `data` holds the pages one behind the other."""

    data: memoryview

    def batch(self) -> PageBatch:
        """The same pages for who places them; shares `data`."""
        return PageBatch(self.block, self.page_numbers, self.data)


@dataclass(frozen=True, slots=True)
class ZeroPages(_Run):
    """A run of ZERO records; the fill byte is always 0."""


@dataclass(frozen=True, slots=True)
class EncodedPage:
    """One XBZRLE or COMPRESS_PAGE record; `data` is its body without the length."""

    block: str
    named: bool
    word: int
    data: bytes

    @property
    def offset(self) -> int:
        return self.word & ~(TARGET_PAGE_BYTES - 1)

    @property
    def xbzrle(self) -> bool:
        return bool(self.word & RamFlag.XBZRLE)


@dataclass(frozen=True, slots=True)
class MultifdFlush:
    """The word 0x200: every multifd channel sends a SYNC that belongs to it."""


@dataclass(frozen=True, slots=True)
class EndOfRam:
    """EOS: the end of the RAM records of one section (or of a preempt channel)."""


@dataclass(frozen=True, slots=True)
class MappedList:
    """mapped-ram: the word that begins the block list; entries and areas follow in turns."""

    word: int


@dataclass(frozen=True, slots=True)
class MappedEntry:
    """mapped-ram: one entry of the block list; its area follows unless its offsets are 0."""

    block: RamBlock


@dataclass(frozen=True, slots=True)
class MappedArea:
    """mapped-ram: the bytes between a block's header and the next entry (bitmap, padding, pages), a piece at a time."""

    data: bytes


@dataclass(frozen=True, slots=True)
class DeviceSection:
    """A whole section of a device, opaque and exact. `begins_at` is its offset in the stream."""

    kind: Item
    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    data: bytes
    begins_at: int


@dataclass(frozen=True, slots=True)
class OpaqueDevices:
    """All device sections of a stream that says nowhere where one of them ends (machine types up to 2.2): no footers
    and no description.
    """

    data: bytes
    begins_at: int


@dataclass(frozen=True, slots=True)
class EndOfStream:
    """EOF: no more sections."""


@dataclass(frozen=True, slots=True)
class Description:
    """The JSON description behind EOF, as it came. The stream may end inside it, and even inside its length: `head` is
    then what was there of it (else None). `disagreements` says which sections have another length than is described.
    """

    text: bytes
    length: int
    head: bytes | None = None
    disagreements: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return self.head is None and len(self.text) == self.length


RamEvent = RamBlocks | Pages | ZeroPages | EncodedPage | MultifdFlush | EndOfRam | MappedList | MappedEntry | MappedArea
