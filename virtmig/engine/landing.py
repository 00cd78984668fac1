"""Where a guest lands: what a destination does with RAM, device state, success and failure.

    begin -> place, zero ... [devices_loaded -> run] -> commit        or abandon, at any time before commit

ImageLanding keeps it at rest in a folder; a process guest lands in its own memory (process_landing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from virtmig.engine.image import ImageWriter, Manifest, new_manifest
from virtmig.engine.memory import Bytes, GuestMemory
from virtmig.errors import GuestMemoryError
from virtmig.pages import PageNumbers
from virtmig.stream.events import DeviceSection, StreamHeader

#: (block, start, length in bytes): ask the source for these first
Request = Callable[[str, int, int], None]


class Landing(Protocol):
    """`place` and `zero` come from several threads, never twice for one page at a time."""

    def attach(self, request: Request) -> None:
        """How pages are asked for in postcopy."""

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

    def devices_loaded(self, header: StreamHeader, sections: Sequence[DeviceSection]) -> None:
        """The device state of a postcopy is here and must be safe when this returns; the source may not go back."""

    def run(self) -> None:
        """Postcopy: the guest may run from now on, with pages still missing."""

    def commit(
        self,
        header: StreamHeader,
        sections: Sequence[DeviceSection],
        description: bytes,
        facts: Mapping[str, str | int],
    ) -> None:
        """All is here. When this returns, the source is told so and will not go back."""

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

    @classmethod
    def recover(cls, folder: Path) -> tuple[ImageLanding, Manifest, list[DeviceSection]]:
        """Go on with an interrupted postcopy: the landing, what is known of the guest, and its device state."""
        landing = cls.__new__(cls)
        landing.writer, manifest, sections = ImageWriter.reopen(folder)
        landing.manifest = None
        landing._devices_saved = True
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

    def begin(self, blocks: Mapping[str, int], page_sizes: Mapping[str, int]) -> None:
        self.writer.create_memory(blocks, page_sizes)

    def place(self, block: str, pages: PageNumbers, data: memoryview) -> None:
        self.memory.place(block, pages, data)

    def zero(self, block: str, pages: PageNumbers) -> None:
        self.memory.zero(block, pages)

    def room(self, block: str, first_page: int, count: int) -> memoryview | None:
        return self.memory.room(block, first_page, count)

    def read(self, block: str, page: int) -> memoryview:
        found = self.memory.block(block)
        if page >= len(found.pages):
            raise GuestMemoryError(f"page {page} of '{block}', which has {len(found.pages)}")
        row: Bytes = found.pages[page]
        return row.data

    def discard(self, block: str, start_bytes: int, length_bytes: int) -> None:
        """What is there is overwritten when the page comes; nothing runs that could read it before."""

    def devices_loaded(self, header: StreamHeader, sections: Sequence[DeviceSection]) -> None:
        self.writer.save_devices(sections, new_manifest(header, sections))
        self._devices_saved = True

    def run(self) -> None:
        """Nothing runs: it is at rest."""

    def commit(
        self,
        header: StreamHeader,
        sections: Sequence[DeviceSection],
        description: bytes,
        facts: Mapping[str, str | int],
    ) -> None:
        if not self._devices_saved:
            self.writer.save_devices(sections)
        details = dict(facts)
        manifest = new_manifest(
            header,
            sections,
            description=description,
            uuid=str(details.pop("uuid", "")),
            footers=bool(details.pop("footers", 1)),
            ram_section_id=int(details.pop("ram_section_id", 1)),
            origin=details,
        )
        self.manifest = self.writer.commit(manifest, description)

    def keep(self) -> None:
        self.writer.keep()

    def abandon(self) -> None:
        if self.manifest is None:
            self.writer.abandon()
