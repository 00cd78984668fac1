"""One multifd channel, bytes <-> events: the hello, RAM packets, device-state packets (QEMU migration/multifd.h).

    | 64 bytes hello | packet | body | packet | body | ...              one way, source to destination

A RAM packet is 320 bytes and C offsets (C = 512 KiB / page size), whatever it carries; `next_packet_size` bytes of
body follow, but only when it has normal pages: on 7.2 that field, the block name and the unused offsets are left over
from earlier packets. They are kept in the event, so that encode_multifd(event) gives the received bytes back.
The pages of a packet stay one memoryview; page by page is left to nobody.

Syncs are told by the flag SYNC. On 7.2 it can ride on a packet with pages, and then an empty packet with the same
number follows; since 8.x it travels alone. See multifd_epochs.py for what a sync means.
"""

from __future__ import annotations

import struct
import uuid as uuids
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.stream.channel import describe_bytes
from virtmig.stream.multifd_compression import METHOD_NAME, Inflater, make_inflater
from virtmig.stream.wire import (
    MULTIFD_COMPRESSED_LONGEST,
    MULTIFD_COMPRESSION_MASK,
    MULTIFD_DEVICE_STATE_BYTES,
    MULTIFD_HEADER_BYTES,
    MULTIFD_INIT_BYTES,
    MULTIFD_MAGIC,
    MULTIFD_PACKET_SIZE,
    MULTIFD_VERSION,
    TARGET_PAGE_BYTES,
    Dialect,
    MultifdFlag,
)

Offsets = npt.NDArray[np.uint64]

_HELLO = struct.Struct(">II16sB39s")
_HEADER = struct.Struct(">IIIIIIQI28s256s")
_DEVICE_STATE = struct.Struct(">III256sII")
_WORDS = struct.Struct(">III")
_KNOWN_FLAGS = int(MultifdFlag.SYNC) | MULTIFD_COMPRESSION_MASK | int(MultifdFlag.DEVICE_STATE)
#: how much of a device-state body is held at once; the rest goes on in further DeviceStateData
DEVICE_STATE_PIECE_BYTES = 256 * 1024
#: VFIO sends its state in buffers of 1 MiB (VFIO_MIG_DEFAULT_DATA_BUFFER_SIZE); QEMU's reader takes up to 4 GiB
DEVICE_STATE_LONGEST_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class MultifdHello:
    """The first 64 bytes of a channel (MultiFDInit_t). `uuid` is the guest's, all zero without one."""

    uuid: bytes
    channel_id: int
    reserved: bytes = bytes(39)
    offset: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class MultifdPacket:
    """A RAM packet (MultiFDPacket_t) and its pages.

    `offsets` are all C fields as received, big-endian u64, bytes from the start of the RAM block: normal pages, then
    zero pages, then zeros or leftovers. `data` holds the normal pages in that order; `body` is what was on the wire
    (the same memory when not compressed). Both are read-only. `name_field` is 256 bytes; see `block`. `placed`: the
    normal pages were read straight to where they belong.
    """

    flags: int
    pages_alloc: int
    normal_count: int
    next_packet_size: int
    packet_num: int
    zero_count: int
    reserved: bytes
    name_field: bytes
    offsets: npt.NDArray[np.uint64]
    body: memoryview
    data: memoryview
    offset: int = 0
    placed: bool = False

    @property
    def is_sync(self) -> bool:
        return bool(self.flags & MultifdFlag.SYNC)

    @property
    def method(self) -> int:
        """The compression bits; they mean nothing in a packet without pages."""
        return self.flags & MULTIFD_COMPRESSION_MASK

    @property
    def block(self) -> str:
        """The RAM block of the pages; "" without pages, since the field is then a leftover (7.2)."""
        if not self.normal_count and not self.zero_count:
            return ""
        return self.name_field.split(b"\0", 1)[0].decode("ascii")

    @property
    def normal_offsets(self) -> Offsets:
        return self.offsets[: self.normal_count].astype(np.uint64)

    @property
    def zero_offsets(self) -> Offsets:
        return self.offsets[self.normal_count : self.normal_count + self.zero_count].astype(np.uint64)


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The header of a device-state packet (MultiFDPacketDeviceState_t); `size` bytes follow as DeviceStateData."""

    flags: int
    name_field: bytes
    instance_id: int
    size: int
    offset: int = 0

    @property
    def idstr(self) -> str:
        return self.name_field.split(b"\0", 1)[0].decode("ascii")


@dataclass(frozen=True, slots=True)
class DeviceStateData:
    """A piece of an opaque device state, in order; `remaining` bytes of the same packet are still to come."""

    data: bytes
    remaining: int
    offset: int = 0


MultifdEvent = MultifdHello | MultifdPacket | DeviceState | DeviceStateData


def check_hello(
    hello: MultifdHello, *, channels: int | None, uuid: bytes | None, present: Collection[int] = (), channel: str = ""
) -> None:
    """What a destination asks of a hello (multifd_recv_initial_packet): its uuid, an id in range, no id twice.

    The id must be below `channels`; QEMU up to 10.0 lets `channels` itself pass. None: not known, not checked.
    Raises RemoteProtocolError.
    """
    channel = channel or f"multifd {hello.channel_id}"
    if uuid is not None and hello.uuid != uuid:
        theirs, ours = uuids.UUID(bytes=hello.uuid), uuids.UUID(bytes=uuid)
        raise RemoteProtocolError(
            f"the channel belongs to guest {theirs}, expected is {ours}", channel=channel, offset=hello.offset + 8
        )
    if channels is not None and hello.channel_id >= channels:
        raise RemoteProtocolError(
            f"channel id {hello.channel_id}, but only {channels} multifd channels are expected",
            channel=channel,
            offset=hello.offset + 24,
        )
    if hello.channel_id in present:
        raise RemoteProtocolError(
            f"channel id {hello.channel_id} is already set up", channel=channel, offset=hello.offset + 24
        )


class MultifdDecoder:
    """Bytes of one multifd channel to events.

    `method` is what both sides agreed on (none, zlib, zstd), None to take it from the first packet with pages.
    `source` is the sender's dialect when known: only 7.2 puts SYNC on a packet with pages, only later ones list zero
    pages. `blocks` maps RAM block names to used lengths in bytes and may be set later (the list comes on the main
    channel); None leaves names and ranges unchecked. Bounds: one body of at most 1 MiB, one output of at most 512 KiB,
    device state in pieces of 256 KiB. `feed` copies, so that the caller's buffer is free again; to save the copy, read
    straight into `room()` and report with `filled(count)`. `destination(block, offsets)` may hand out the guest's own
    memory for the pages of a packet that is not compressed (or None): they are then read into it, uncopied. Errors are
    raised by `events()`, after the events before them, and again by every later call.
    """

    def __init__(
        self,
        *,
        method: str | None = None,
        source: Dialect | None = None,
        channel: str = "multifd",
        blocks: Mapping[str, int] | None = None,
        channels: int | None = None,
        uuid: bytes | None = None,
        page_bytes: int = TARGET_PAGE_BYTES,
        device_state_limit_bytes: int = DEVICE_STATE_LONGEST_BYTES,
        expect_hello: bool = True,
        destination: Callable[[str, Offsets], memoryview | None] | None = None,
    ) -> None:
        self.channel = channel
        self._destination = destination
        self._placed = False
        self.blocks = blocks
        self.source = source
        self._method = method
        self._inflater = make_inflater(method) if method is not None else None
        self._page_bytes = page_bytes
        self._capacity = MULTIFD_PACKET_SIZE // page_bytes
        self._packet_bytes = MULTIFD_HEADER_BYTES + 8 * self._capacity
        self._device_state_limit = device_state_limit_bytes
        self._channels, self._uuid = channels, uuid
        self._ready: deque[tuple[bytes, memoryview, int, bool] | MultifdEvent] = deque()
        self._failure: RemoteProtocolError | None = None
        self._position = 0  # of the element being filled
        self._in_hello = expect_hello
        self._device_left = 0
        self._header = b""
        self._space = memoryview(b"")
        self._have = 0
        self._ended = False
        self._expect(MULTIFD_INIT_BYTES if expect_hello else MULTIFD_DEVICE_STATE_BYTES)

    # -- bytes in ----------------------------------------------------------------------------------------------------

    def room(self) -> memoryview:
        """Where the next bytes belong: read into it (or into its beginning), then call `filled`. Never empty."""
        return self._space[self._have :]

    def filled(self, count: int) -> None:
        """`count` bytes of `room()` are there."""
        if self._failure is not None:
            return
        before = self._have
        self._have += count
        try:
            if not self._header and self._device_left == 0 and before < 12 <= self._have:
                self._check_words()
            if self._have == len(self._space):
                self._complete()
        except RemoteProtocolError as broken:
            self._failure = broken

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """More bytes, of any number."""
        source = memoryview(data).cast("B")
        at, total = 0, len(source)
        while at < total and self._failure is None:
            room = self._space[self._have :]
            count = min(len(room), total - at)
            room[:count] = source[at : at + count]
            at += count
            self.filled(count)

    def end(self) -> None:
        """No more bytes. The end of a channel between packets is a normal end; `events` raises when it is not."""
        self._ended = True

    @property
    def offset(self) -> int:
        """How many bytes were taken."""
        return self._position + (len(self._header)) + self._have

    # -- events out --------------------------------------------------------------------------------------------------

    def events(self) -> Iterator[MultifdEvent]:
        """What is complete. Bodies are decompressed here, one at a time, so that nobody can make us hold many."""
        while self._ready:
            ready = self._ready.popleft()
            if isinstance(ready, tuple):
                try:
                    packet = self._packet(*ready)
                except RemoteProtocolError as broken:
                    self._ready.clear()
                    self._failure = broken
                    break
                yield packet
            else:
                yield ready
        if self._failure is not None:
            raise self._failure
        if self._ended and (self._have or self._header or self._device_left or self._in_hello):
            what = "the hello" if self._in_hello else "a packet" if not self._header else "the pages of a packet"
            if self._device_left:
                what = "a device state"
            self._failure = self._broken(f"the channel ended inside {what}", self.offset)
            raise self._failure

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _expect(self, count: int) -> None:
        self._space = memoryview(bytearray(count))
        self._have = 0

    def _broken(self, message: str, at: int) -> RemoteProtocolError:
        return RemoteProtocolError(message, channel=self.channel, offset=at)

    def _check_words(self) -> None:
        """Refuse a stranger as soon as its first bytes are here, not after a whole packet."""
        magic, version, _ = _WORDS.unpack_from(self._space)
        if magic != MULTIFD_MAGIC:
            seen = describe_bytes(bytes(self._space[:8]))
            raise self._broken(f"expected multifd magic {MULTIFD_MAGIC:#010x}, got {seen}", self._position)
        if version != MULTIFD_VERSION:
            raise self._broken(f"expected multifd version {MULTIFD_VERSION}, got {version}", self._position + 4)

    def _complete(self) -> None:
        """The space that was asked for is full: say what it was, and ask for what follows."""
        if self._device_left:
            self._complete_device_piece()
        elif self._header:
            self._ready.append((self._header, self._space.toreadonly(), self._position, self._placed))
            self._next(len(self._header) + len(self._space))
        elif self._in_hello:
            self._complete_hello()
        else:
            self._complete_header()

    def _next(self, taken: int) -> None:
        self._position += taken
        self._header = b""
        self._expect(MULTIFD_DEVICE_STATE_BYTES)

    def _complete_hello(self) -> None:
        _, _, uuid, channel_id, reserved = _HELLO.unpack(self._space)
        hello = MultifdHello(uuid, channel_id, reserved, self._position)
        check_hello(hello, channels=self._channels, uuid=self._uuid, channel=self.channel)
        self._ready.append(hello)
        self._in_hello = False
        self._next(MULTIFD_INIT_BYTES)

    def _complete_header(self) -> None:
        flags = _WORDS.unpack_from(self._space)[2]
        if flags & ~_KNOWN_FLAGS:
            raise self._broken(f"unknown multifd flags {flags:#x}", self._position + 8)
        if flags & MultifdFlag.DEVICE_STATE:
            self._complete_device_state(flags)
        elif len(self._space) < self._packet_bytes:
            # both kinds of packet are at least as long as the shorter one, so this much could be asked for unseen
            whole = bytearray(self._packet_bytes)
            whole[: self._have] = self._space
            self._space = memoryview(whole)
        else:
            self._complete_ram_header(flags)

    def _complete_device_state(self, flags: int) -> None:
        at = self._position
        _, _, _, name, instance_id, size = _DEVICE_STATE.unpack(self._space)
        if self.source is Dialect.QEMU_7_2:
            raise self._broken("a device-state packet, which QEMU has only since 10.0", at + 8)
        if flags & MultifdFlag.SYNC:
            raise self._broken("SYNC on a device-state packet", at + 8)
        self._check_name(name, at + 12, "device")
        if size > self._device_state_limit:
            raise self._broken(
                f"a device state of {size} bytes, at most {self._device_state_limit} are accepted", at + 272
            )
        self._ready.append(DeviceState(flags, name, instance_id, size, at))
        self._next(MULTIFD_DEVICE_STATE_BYTES)
        if size:
            self._device_left = size
            self._expect(min(size, DEVICE_STATE_PIECE_BYTES))

    def _complete_device_piece(self) -> None:
        piece = bytes(self._space)
        self._device_left -= len(piece)
        self._ready.append(DeviceStateData(piece, self._device_left, self._position))
        self._next(len(piece))
        if self._device_left:
            self._expect(min(self._device_left, DEVICE_STATE_PIECE_BYTES))

    def _check_name(self, field: bytes, at: int, what: str) -> str:
        raw, ending, _ = field.partition(b"\0")
        if not ending:
            raise self._broken(f"the {what} name is not terminated", at)
        if not raw:
            raise self._broken(f"an empty {what} name", at)
        try:
            return raw.decode("ascii")
        except UnicodeDecodeError:
            raise self._broken(f"a {what} name that is not ASCII: {raw[:64]!r}", at) from None

    def _complete_ram_header(self, flags: int) -> None:
        """Check the counts and lengths, and make room for the body. What needs the block list waits for `events`."""
        at = self._position
        fields = _HEADER.unpack_from(self._space)
        alloc, normal, size, zero = fields[3], fields[4], fields[5], fields[7]
        if alloc > self._capacity:
            raise self._broken(f"room for {alloc} pages, a packet has at most {self._capacity}", at + 12)
        if normal > alloc:
            raise self._broken(f"{normal} pages in a packet with room for {alloc}", at + 16)
        if zero > alloc - normal:
            raise self._broken(f"{zero} zero pages in a packet with {normal} pages and room for {alloc}", at + 32)
        if zero and self.source is Dialect.QEMU_7_2:
            raise self._broken("zero pages in a packet, which QEMU has only since 9.0", at + 32)
        if flags & MultifdFlag.SYNC and normal + zero and self.source not in (None, Dialect.QEMU_7_2):
            raise self._broken("SYNC on a packet with pages, which only QEMU up to 8.x sends", at + 8)
        if normal + zero:
            self._check_method(flags & MULTIFD_COMPRESSION_MASK, at + 8)
        if not normal and zero and size:
            raise self._broken(f"an empty packet expected, but {size} bytes are to follow", at + 20)
        header = bytes(self._space)
        if not normal:
            self._ready.append((header, memoryview(b""), at, False))
            self._next(len(header))
            return
        wanted = normal * self._page_bytes
        if not flags & MULTIFD_COMPRESSION_MASK:
            if size != wanted:
                raise self._broken(f"{size} bytes for {normal} pages, expected {wanted}", at + 20)
        elif not 0 < size <= MULTIFD_COMPRESSED_LONGEST:
            raise self._broken(
                f"a compressed body of {size} bytes, expected 1 to {MULTIFD_COMPRESSED_LONGEST}", at + 20
            )
        self._header = header
        self._space = self._place_of(header, normal, flags, at) or np.empty(size, np.uint8).data  # not cleared first
        self._have = 0

    def _place_of(self, header: bytes, normal: int, flags: int, at: int) -> memoryview | None:
        """The guest's memory for the pages that follow, checked as `_packet` checks them."""
        self._placed = False
        if self._destination is None or self.blocks is None or flags & MULTIFD_COMPRESSION_MASK:
            return None
        name = self._check_name(header[64:320], at + 64, "RAM block")
        offsets = np.frombuffer(header, ">u8", normal, MULTIFD_HEADER_BYTES).astype(np.uint64)
        self._check_offsets(name, offsets, at)
        place = self._destination(name, offsets)
        self._placed = place is not None
        return place

    def _check_method(self, bits: int, at: int) -> None:
        name = METHOD_NAME.get(bits)
        if name is None:
            raise self._broken(f"unknown multifd compression {bits:#x}", at)
        if self._method is None:
            try:
                self._inflater = make_inflater(name)
            except LocalProtocolError as refused:
                raise self._broken(f"multifd compression {name}: {refused}", at) from None
            self._method = name
        elif name != self._method:
            raise self._broken(f"a packet compressed with {name}, agreed is {self._method}", at)

    def _packet(self, header: bytes, body: memoryview, at: int, placed: bool) -> MultifdPacket:
        fields = _HEADER.unpack_from(header)
        _, _, flags, alloc, normal, size, number, zero, reserved, name_field = fields
        offsets = np.frombuffer(header, ">u8", self._capacity, MULTIFD_HEADER_BYTES)
        if normal + zero:
            name = self._check_name(name_field, at + 64, "RAM block")
            self._check_offsets(name, offsets[: normal + zero].astype(np.uint64), at)
        data = body
        if normal and flags & MULTIFD_COMPRESSION_MASK:
            # there is one: _check_method made it, or refused the packet
            inflater = cast(Inflater, self._inflater)
            try:
                data = memoryview(inflater.inflate(body, normal * self._page_bytes))
            except ValueError as broken:
                raise self._broken(str(broken), at + len(header)) from None
        return MultifdPacket(
            flags, alloc, normal, size, number, zero, reserved, name_field, offsets, body, data, at, placed
        )

    def _check_offsets(self, name: str, offsets: Offsets, at: int) -> None:
        if int(np.bitwise_or.reduce(offsets)) & (self._page_bytes - 1):
            bad = int(np.flatnonzero(offsets & np.uint64(self._page_bytes - 1))[0])
            place = at + MULTIFD_HEADER_BYTES + 8 * bad
            raise self._broken(f"offset {int(offsets[bad]):#x} is not the start of a page", place)
        if not bool((offsets[1:] > offsets[:-1]).all()) and len(np.unique(offsets)) != len(offsets):
            raise self._broken("the same page twice in one packet", at + MULTIFD_HEADER_BYTES)
        if self.blocks is None:
            return
        used = self.blocks.get(name)
        if used is None:
            raise self._broken(f"unknown RAM block {name!r}", at + 64)
        highest = int(offsets.max())
        # not "> used - page": a block shorter than a page would wrap round in unsigned numbers
        if highest + self._page_bytes > used:
            place = at + MULTIFD_HEADER_BYTES + 8 * int(offsets.argmax())
            raise self._broken(f"page at {highest:#x} is outside {name}, which has {used:#x} bytes", place)


def encode_multifd(event: MultifdEvent) -> list[bytes | memoryview]:
    """The bytes an event was read from, as buffers in order; the header is made again from its fields."""
    if isinstance(event, MultifdHello):
        return [_HELLO.pack(MULTIFD_MAGIC, MULTIFD_VERSION, event.uuid, event.channel_id, event.reserved)]
    if isinstance(event, DeviceState):
        return [
            _DEVICE_STATE.pack(
                MULTIFD_MAGIC, MULTIFD_VERSION, event.flags, event.name_field, event.instance_id, event.size
            )
        ]
    if isinstance(event, DeviceStateData):
        return [event.data]
    header = (
        _HEADER.pack(
            MULTIFD_MAGIC,
            MULTIFD_VERSION,
            event.flags,
            event.pages_alloc,
            event.normal_count,
            event.next_packet_size,
            event.packet_num,
            event.zero_count,
            event.reserved,
            event.name_field,
        )
        + event.offsets.astype(">u8").tobytes()
    )
    return [header, event.body] if event.normal_count else [header]
