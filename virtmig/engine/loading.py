"""What a main stream's events mean to a destination: RAM placed, commands answered, device state kept (savevm.c).

Loading owns the guest that arrives, not the sockets: incoming.py feeds it events from its threads and writes what it
answers. Main's events come from one thread, those of multifd and preempt channels from their own.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from virtmig.engine.landing import Landing
from virtmig.engine.manifest import DEVICES_LIMIT_BYTES, MOST_SECTIONS
from virtmig.engine.memory import LARGEST_RAM_BYTES, NoRoom
from virtmig.engine.switchover_ack import SwitchoverAcks
from virtmig.engine.transport import Stop
from virtmig.errors import ChannelError, GuestMemoryError, RemoteProtocolError
from virtmig.pages import PAGE_BYTES, PageNumbers
from virtmig.stream.events import (
    Command,
    Description,
    DeviceSection,
    EncodedPage,
    EndOfRam,
    EndOfStream,
    MultifdFlush,
    OpaqueDevices,
    Package,
    Pages,
    RamBlocks,
    SectionBegin,
    SectionFooter,
    StreamHeader,
    ZeroPages,
)
from virtmig.stream.multifd import MultifdPacket
from virtmig.stream.multifd_epochs import MultifdEpochs
from virtmig.stream.return_path import Pong, ReceivedBitmap, ResumeAck, ReturnPathEvent, SwitchoverAck
from virtmig.stream.wire import PING_PACKAGE_LOADED, Item
from virtmig.stream.wire import Command as Number
from virtmig.stream.xbzrle import decode_xbzrle

_MASK = np.uint64(PAGE_BYTES)

Answer = Callable[[ReturnPathEvent], None]
#: called with a NoRoom; returns when it may be tried again, raises when it may not
Wait = Callable[[NoRoom], None]


class Epochs:
    """Multifd syncs and main's markers meet here: who came first waits (multifd_recv_sync_main, sem_sync)."""

    def __init__(self, channels: int, stop: Stop, stall_s: float, received: Callable[[], int]) -> None:
        """`received` counts the bytes of all channels: who waits gives up when none came for `stall_s`."""
        self._stall_s = stall_s
        self._received = received
        self._epochs = MultifdEpochs(channels)
        self._changed = threading.Condition()
        self._stop = stop
        self._syncs = [0] * channels
        self._markers = 0
        self._forget = stop.on_request(self._wake)

    def sync(self, channel_id: int) -> None:
        """Called by a channel's thread; returns when main has its marker and all channels are as far."""
        with self._changed:
            self._epochs.sync(channel_id)
            self._syncs[channel_id] += 1
            self._wait(self._syncs[channel_id])

    def marker(self) -> None:
        """Called by main's thread; returns when every channel has delivered its sync."""
        with self._changed:
            self._epochs.marker()
            self._markers += 1
            self._wait(self._markers)

    def end(self, channel_id: int) -> None:
        with self._changed:
            try:
                self._epochs.end(channel_id)
            finally:
                self._changed.notify_all()

    def close(self) -> None:
        self._forget()

    def _wait(self, number: int) -> None:
        self._changed.notify_all()
        seen, since = self._received(), time.monotonic()
        while self._epochs.completed < number:
            self._stop.check()
            self._changed.wait(min(1.0, self._stall_s))
            if (now := self._received()) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since >= self._stall_s:
                late = self._epochs.waiting_for()
                whom = f"multifd {', '.join(map(str, late))}" if late else "main"
                raise ChannelError(
                    f"for {self._stall_s:g} s no byte on any channel, while the others wait for {whom}",
                    hint="the number of multifd channels must be the same on both sides (--parallel-connections)",
                )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class Loading:
    """One guest on its way in.

    `answer` writes a return path message, `resumed` is called when a broken postcopy goes on, `no_room` when the disk
    is full and the source cannot take the guest back. `over` is True when everything that is to come has come, `split`
    from the moment on that the source may not take the guest back. `facts` go into the manifest.
    """

    def __init__(
        self,
        landing: Landing,
        answer: Answer,
        epochs: Epochs | None,
        resumed: Callable[[], None],
        no_room: Wait,
        switchover_ack: bool | None = None,
    ) -> None:
        self.landing = landing
        self.facts: dict[str, str | int] = {}
        self._resumed = resumed
        self._no_room = no_room
        self.header = StreamHeader(3, None)
        self.sections: list[DeviceSection] = []
        self.description = b""
        self.lengths: dict[str, int] = {}
        self.footers = True
        self.ram_section_id = 1
        self.return_path = False
        self.postcopy = False  # advised
        self.split = False
        self.ended = False  # EOF was read
        self.over = False
        self.pages_normal = 0
        self.pages_zero = 0
        self.pages_twice = 0
        self._answer = answer
        self._epochs = epochs
        #: with multifd: whether every EOS is a marker (7.2, machine types up to 8.0); None until the first section ends
        self._marker_is_eos: bool | None = None
        self._awaited: dict[str, npt.NDArray[np.bool_]] = {}
        self._counting = threading.Lock()
        self._placed = threading.Condition(self._counting)
        self._placing = 0
        self._acks = SwitchoverAcks(switchover_ack)
        self._ram_begun = self._ram_ended = False
        self._devices_bytes = 0

    def restore(self, header: StreamHeader, lengths: dict[str, int], sections: list[DeviceSection]) -> None:
        """Begin where another process left a postcopy: the devices are here, and every page is asked for again."""
        self.header, self.lengths, self.sections = header, lengths, sections
        self._awaited = {name: np.ones(length // PAGE_BYTES, np.bool_) for name, length in lengths.items()}
        self.postcopy = self.split = self.return_path = True

    # -- main ------------------------------------------------------------------------------------------------------

    def take(self, event: object) -> None:
        """One event of main. Raises MigrationError."""
        match event:
            case Pages():
                self.place(event.block, event.page_numbers, event.data)
            case ZeroPages():
                self.zero(event.block, event.page_numbers)
            case SectionFooter():
                pass
            case SectionBegin():
                self._ram_begun = True
                self._ram_ended = event.kind == Item.SECTION_END
                if event.kind == Item.SECTION_START:
                    self.ram_section_id = event.section_id
            case EndOfRam():
                self._end_of_ram()
            case MultifdFlush():
                self._marker_is_eos = False
                self._marker()
            case DeviceSection():
                self._keep(event)
                if not self._ram_ended and not self.split:
                    place = "sections_before_switch" if self._ram_begun else "sections_before_ram"
                    self.facts[place] = int(self.facts.get(place, 0)) + 1
            case Command():
                self._command(event)
            case Package():
                self._package(event)
            case RamBlocks():
                self._blocks(event)
            case EncodedPage():
                self._encoded(event)
            case StreamHeader():
                self.header = event
            case EndOfStream():
                self.ended = True
                self.over = self.split
            case Description():
                self.description = event.text if event.complete else b""
                self.over = True
            case OpaqueDevices():
                raise RemoteProtocolError(
                    "device sections whose ends nobody told", channel="main", offset=event.begins_at,
                    hint="machine types up to 2.2 cannot be kept in an image",
                )  # fmt: skip
            case _:
                raise RemoteProtocolError(f"{type(event).__name__} does not belong into a migration", channel="main")

    def missing_pages(self) -> int:
        """Pages that the source promised to send after the switch to postcopy, and that are not here."""
        return sum(int(np.count_nonzero(bits)) for bits in self._awaited.values())

    def settle(self, within_s: float) -> None:
        """Wait for pages that other channels have, or are being placed; at most so long."""
        with self._placed:
            self._placed.wait_for(lambda: not self._placing and not self.missing_pages(), within_s)

    def missing_words(self) -> str:
        """Which pages are missing, for a person."""
        found = [
            f"{int(np.count_nonzero(bits))} of '{name}' from page {int(bits.argmax())} on"
            for name, bits in self._awaited.items()
            if bits.any()
        ]
        return ", ".join(found)

    # -- pages, from any channel -------------------------------------------------------------------------------------

    def place(self, block: str, pages: PageNumbers, data: memoryview) -> None:
        if self.split:
            self._place_once(block, pages, data)
            return
        self.landing.place(block, pages, data)
        self.pages_normal += len(pages)

    def zero(self, block: str, pages: PageNumbers) -> None:
        if self.split:
            self._place_once(block, pages, None)
            return
        self.landing.zero(block, pages)
        self.pages_zero += len(pages)

    def packet(self, packet: MultifdPacket) -> None:
        """A multifd packet's pages."""
        if not packet.normal_count and not packet.zero_count:
            return
        if not self.lengths:
            raise RemoteProtocolError("pages before the list of RAM blocks", channel="multifd", offset=packet.offset)
        if packet.normal_count and not packet.placed:
            self.landing.place(packet.block, packet.normal_offsets // _MASK, packet.data)
        if packet.zero_count:
            self.landing.zero(packet.block, packet.zero_offsets // _MASK)
        with self._counting:
            self.pages_normal += packet.normal_count
            self.pages_zero += packet.zero_count

    def room(self, block: str, offsets: npt.NDArray[np.uint64]) -> memoryview | None:
        """The guest's memory for the neighbouring pages of a multifd packet, None when they are scattered."""
        count = len(offsets)
        first = int(offsets[0])
        if int(offsets[-1]) - first != (count - 1) * PAGE_BYTES or not bool((offsets[1:] > offsets[:-1]).all()):
            return None
        return self.landing.room(block, first // PAGE_BYTES, count)

    def _place_once(self, block: str, pages: PageNumbers, data: memoryview | None) -> None:
        """Those of the pages that are still awaited; `data` None: they are zero. A full disk is waited for."""
        while True:
            fresh = self._claim(block, pages)
            try:
                if data is None:
                    self.landing.zero(block, pages[fresh])
                elif fresh.all():
                    self.landing.place(block, pages, data)
                elif fresh.any():
                    rows = np.frombuffer(data, np.uint8).reshape(-1, PAGE_BYTES)[fresh]
                    self.landing.place(block, pages[fresh], rows.reshape(-1).data)
            except NoRoom as error:
                self._unclaim(block, pages[fresh])  # a source that comes again meanwhile must know that they lack
                self._no_room(error)
                continue
            except BaseException:
                self._unclaim(block, pages[fresh])
                raise
            break
        with self._placed:
            self._placing -= 1
            count = int(np.count_nonzero(fresh))
            self.pages_twice += len(pages) - count
            if data is None:
                self.pages_zero += count
            else:
                self.pages_normal += count
            self._placed.notify_all()

    def _claim(self, block: str, pages: PageNumbers) -> npt.NDArray[np.bool_]:
        """Which of the pages were still awaited; they are not any more."""
        with self._counting:
            bits = self._awaited[block]
            fresh = bits[pages]
            bits[pages] = False
            self._placing += 1
        return fresh

    def _unclaim(self, block: str, pages: PageNumbers) -> None:
        with self._placed:
            self._awaited[block][pages] = True
            self._placing -= 1
            self._placed.notify_all()

    # -- the parts -------------------------------------------------------------------------------------------------

    def _end_of_ram(self) -> None:
        if self.split:
            return
        if self._epochs is not None:
            if self._marker_is_eos is None:
                self._marker_is_eos = True  # START ended without MULTIFD_FLUSH: each section ends with a sync
            if self._marker_is_eos:
                self._marker()
        if self.return_path and self._acks.due_after_part(self.pages_normal + self.pages_zero):
            self._answer(SwitchoverAck())

    def _marker(self) -> None:
        if self._epochs is None:
            raise RemoteProtocolError(
                "the source uses multifd, which was not expected", channel="main",
                hint="give the number of the source's multifd channels with --parallel-connections",
            )  # fmt: skip
        self._epochs.marker()

    def _blocks(self, event: RamBlocks) -> None:
        shared = [block.name for block in event.blocks if block.address is not None]
        if shared:
            raise GuestMemoryError(
                f"the source leaves out shared memory ({', '.join(shared)}): its contents never come",
                hint="turn the source's capability x-ignore-shared off",
            )
        if event.total_bytes > LARGEST_RAM_BYTES:
            raise RemoteProtocolError(f"a guest of {event.total_bytes} bytes of RAM", channel="main")
        lengths = {block.name: block.used_length for block in event.blocks}
        if self.postcopy:
            self.landing.expect(lengths)
        sizes = {b.name: b.page_size_bytes for b in event.blocks if b.page_size_bytes is not None}
        self.landing.begin(lengths, sizes)
        self._awaited = {name: np.zeros(length // PAGE_BYTES, np.bool_) for name, length in lengths.items()}
        self.lengths = lengths

    def _encoded(self, event: EncodedPage) -> None:
        page = event.offset // PAGE_BYTES
        self._acks.never()
        if event.xbzrle:
            content = decode_xbzrle(event.data, bytes(self.landing.read(event.block, page)))
        else:
            inflater = zlib.decompressobj()
            try:
                content = inflater.decompress(event.data, PAGE_BYTES + 1)
            except zlib.error as error:
                raise RemoteProtocolError(f"a compressed page that is none: {error}", channel="main") from None
            if len(content) != PAGE_BYTES:
                raise RemoteProtocolError(f"a compressed page of {len(content)} bytes", channel="main")
        self.place(event.block, np.array([page], np.uint64), memoryview(content))

    def _command(self, event: Command) -> None:
        number = Number(event.number)
        if number is Number.OPEN_RETURN_PATH:
            self.return_path = True
            if self._acks.due_at_open(self.header.machine):
                self._answer(SwitchoverAck())
        elif number is Number.PING:
            self._answer(Pong(event.value or 0))
        elif number is Number.POSTCOPY_ADVISE:
            self.postcopy = event.page_sizes is not None
        elif number is Number.POSTCOPY_RAM_DISCARD:
            self._discard(event)
        elif number is Number.POSTCOPY_LISTEN:
            self.split = True
        elif number is Number.POSTCOPY_RUN:
            self.landing.run()
        elif number is Number.RECV_BITMAP:
            packed = np.packbits(~self._awaited[event.name], bitorder="little").tobytes()
            self._answer(ReceivedBitmap(event.name, packed + bytes(-len(packed) % 8)))
        elif number is Number.POSTCOPY_RESUME:
            self._answer(ResumeAck())
            self._resumed()
        elif number is Number.ENABLE_COLO:
            raise RemoteProtocolError("COLO, which an image cannot take part in", channel="main")

    def _discard(self, event: Command) -> None:
        bits = self._awaited[event.name]
        for start, length in event.ranges:
            bits[start // PAGE_BYTES : (start + length) // PAGE_BYTES] = True
            self.landing.discard(event.name, start, length)

    def _package(self, event: Package) -> None:
        """LISTEN, the devices, PINGs and RUN. The devices are safe before any PING of the package is answered.

        A source with PING 0x42 (10.2 on) takes the guest back until that is answered; an older one never does, as its
        postcopy has begun: it waits, paused or not, and so does a full disk.
        """
        for each in event.events:
            if isinstance(each, DeviceSection):
                self._keep(each)
        commands = [each for each in event.events if isinstance(each, Command)]
        listens = any(each.number == Number.POSTCOPY_LISTEN for each in commands)
        confirmed = any(map(_asks_for_the_guest, commands))
        if listens:
            self.split = not confirmed
            self.landing.awaits(self._awaited, self._all_facts(postcopy=True))
            while True:
                try:
                    self.landing.devices_loaded(self.header, self.sections)
                    break
                except NoRoom as error:
                    self._no_room(error)
        for each in commands:
            if each.number != Number.POSTCOPY_LISTEN or not confirmed:
                self._command(each)
            self.split = self.split or (listens and _asks_for_the_guest(each))

    def commit(self) -> None:
        """All has come: make it last. Raises NoRoom when it may be called again."""
        facts = self._all_facts(postcopy=self.split)
        self.landing.commit(self.header, self.sections, self.description, facts)

    def _all_facts(self, *, postcopy: bool) -> dict[str, str | int]:
        return self.facts | {
            "transfer": "postcopy" if postcopy else "precopy",
            "footers": int(self.footers),
            "ram_section_id": self.ram_section_id,
        }

    def _keep(self, section: DeviceSection) -> None:
        self.sections.append(section)
        self._devices_bytes += len(section.data)
        if len(self.sections) > MOST_SECTIONS or self._devices_bytes > DEVICES_LIMIT_BYTES:
            raise RemoteProtocolError(
                f"{len(self.sections)} device sections of {self._devices_bytes} bytes", channel="main"
            )


def _asks_for_the_guest(command: Command) -> bool:
    """PING 0x42 (10.2 on): its PONG is what the source gives the guest away for."""
    return command.number == Number.PING and command.value == PING_PACKAGE_LOADED
