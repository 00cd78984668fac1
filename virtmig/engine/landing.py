"""Where a guest lands: what a destination does with RAM, device state, success and failure.

    begin -> place, zero ... -> commit                                               or abandon, at any time before
    expect -> begin -> place, zero ... -> devices_loaded -> run -> place, zero ... -> commit    in postcopy

ImageLanding keeps it at rest in a folder; a process guest lands in its own memory (process_landing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from virtmig.engine.image import ImageWriter
from virtmig.engine.manifest import Manifest, new_manifest
from virtmig.engine.memory import GuestMemory, NoRoom, read_block
from virtmig.errors import GuestMemoryError
from virtmig.pages import PAGE_BYTES, PageNumbers
from virtmig.stream.events import DeviceSection, StreamHeader

#: (block, start, length in bytes): ask the source for these first
Request = Callable[[str, int, int], None]
#: how the guest came, and what its manifest says beside the sections
Facts = Mapping[str, str | int]
Awaited = Mapping[str, npt.NDArray[np.bool_]]


class Landing(Protocol):
    """`place` and `zero` come from several threads, never twice for one page at a time."""

    def attach(self, request: Request) -> None:
        """How pages are asked for in postcopy."""

    def expect(self, blocks: Mapping[str, int]) -> None:
        """Before `begin`: the source may switch to postcopy. Raises MigrationError when there would be no room."""

    def begin(self, blocks: Mapping[str, int], page_sizes: Mapping[str, int]) -> None:
        """The guest's RAM blocks: name -> bytes; `page_sizes` only for huge ones."""

    def place(self, block: str, pages: PageNumbers, data: memoryview) -> None: ...

    def zero(self, block: str, pages: PageNumbers) -> None: ...

    def room(self, block: str, first_page: int, count: int) -> memoryview | None:
        """Where neighbouring pages can be read into, in precopy; None: only `place` takes them."""

    def read(self, block: str, page: int) -> memoryview:
        """One page as it is here now, for xbzrle."""

    def discard(self, block: str, start_bytes: int, length_bytes: int) -> None:
        """These pages will come again."""

    def awaits(self, pages: Awaited, facts: Facts) -> None:
        """Before `devices_loaded`: the pages that will come in postcopy, and what is known of the guest."""

    def devices_loaded(self, header: StreamHeader, sections: Sequence[DeviceSection]) -> None:
        """The device state of a postcopy is here, and must be safe when this returns, as the room for what is awaited.

        The source may not go back afterwards. Raises NoRoom when it may be called again.
        """

    def run(self) -> None:
        """Postcopy: the guest may run from now on, with pages still missing."""

    def commit(
        self,
        header: StreamHeader,
        sections: Sequence[DeviceSection],
        description: bytes,
        facts: Facts,
    ) -> None:
        """All is here. When this returns, the source is told so and will not go back.

        Raises NoRoom when it may be called again.
        """

    def resumed(self) -> None:
        """A broken postcopy goes on: ask again for what is waited for."""

    def let_go(self, heard: bool) -> None:
        """The source is gone after SHUT 0. `heard`: it has said that it lets go of the guest; only engines do.

        Raises MigrationError when that word was needed.
        """

    def keep(self) -> None:
        """A postcopy failed: the source cannot take the guest back, so what came stays, for a recovery."""

    def abandon(self) -> None:
        """It failed before commit: leave nothing behind. Safe after commit, and twice."""


class ImageLanding:
    """An image in a folder that does not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.writer = ImageWriter(folder)
        self.manifest: Manifest | None = None
        self._devices_saved = False
        self._awaited: Awaited | None = None
        self._facts: Facts = {}

    @classmethod
    def recover(cls, folder: Path) -> tuple[ImageLanding, Manifest, list[DeviceSection]]:
        """Go on with an interrupted postcopy: the landing, what is known of the guest, and its device state."""
        landing = cls.__new__(cls)
        landing.writer, manifest, sections = ImageWriter.reopen(folder)
        landing.manifest = None
        landing._devices_saved = True
        landing._awaited, landing._facts = {}, {}
        return landing, manifest, sections

    def attach(self, request: Request) -> None:
        """It asks for nothing: all of it comes by itself."""

    def resumed(self) -> None: ...

    def let_go(self, heard: bool) -> None: ...

    @property
    def memory(self) -> GuestMemory:
        if self.writer.memory is None:
            raise GuestMemoryError("pages before the list of RAM blocks")
        return self.writer.memory

    def expect(self, blocks: Mapping[str, int]) -> None:
        """Room for all of RAM: which pages will be left to a postcopy nobody knows, and then no source goes back."""
        try:
            self.writer.expect(blocks)
        except NoRoom as error:
            error.hint = "make room, or turn the source's capability postcopy-ram off: precopy needs no room for zeros"
            raise

    def begin(self, blocks: Mapping[str, int], page_sizes: Mapping[str, int]) -> None:
        self.writer.create_memory(blocks, page_sizes)

    def place(self, block: str, pages: PageNumbers, data: memoryview) -> None:
        self.memory.place(block, pages, data)

    def zero(self, block: str, pages: PageNumbers) -> None:
        if self._awaited is None:
            self.memory.zero(block, pages)
        else:
            self.memory.release(block, pages)  # their room was reserved

    def room(self, block: str, first_page: int, count: int) -> memoryview | None:
        return self.memory.room(block, first_page, count)

    def read(self, block: str, page: int) -> memoryview:
        found = self.memory.block(block)
        if page >= len(found.pages):
            raise GuestMemoryError(f"page {page} of '{block}', which has {len(found.pages)}")
        content = memoryview(bytearray(PAGE_BYTES))
        read_block(found.fd, page * PAGE_BYTES, content)
        return content

    def discard(self, block: str, start_bytes: int, length_bytes: int) -> None:
        """What is there is overwritten when the page comes; nothing runs that could read it before."""

    def awaits(self, pages: Awaited, facts: Facts) -> None:
        self._awaited, self._facts = pages, facts

    def devices_loaded(self, header: StreamHeader, sections: Sequence[DeviceSection]) -> None:
        self.writer.save_devices(sections, _manifest(header, sections, b"", self._facts))
        self._devices_saved = True
        self.writer.reserve(self._awaited or {})

    def run(self) -> None:
        """Nothing runs: it is at rest."""

    def commit(self, header: StreamHeader, sections: Sequence[DeviceSection], description: bytes, facts: Facts) -> None:
        if not self._devices_saved:
            self.writer.save_devices(sections)
        self.manifest = self.writer.commit(_manifest(header, sections, description, facts), description)

    def finish(self, manifest: Manifest) -> Manifest:
        """After `recover` of one that had all arrived: commit it, without its source. Raises NoRoom and ImageError."""
        self.manifest = self.writer.commit(manifest)
        return self.manifest

    def keep(self) -> None:
        self.writer.keep()

    def abandon(self) -> None:
        if self.manifest is None:
            self.writer.abandon()


def _manifest(header: StreamHeader, sections: Sequence[DeviceSection], description: bytes, facts: Facts) -> Manifest:
    details = dict(facts)
    return new_manifest(
        header,
        sections,
        description=description,
        uuid=str(details.pop("uuid", "")),
        footers=bool(details.pop("footers", 1)),
        ram_section_id=int(details.pop("ram_section_id", 1)),
        sections_before_ram=int(details.pop("sections_before_ram", 0)),
        sections_before_switch=int(details.pop("sections_before_switch", 0)),
        origin=details,
    )
