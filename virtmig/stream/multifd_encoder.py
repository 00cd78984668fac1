"""Pages to the packets of one multifd channel: one header, and the pages as they lie in memory, merged into runs.

Nothing is copied when nothing is compressed: what comes back is a list of buffers for one sendmsg, the packet's header
and one memoryview per run of neighbouring pages (QEMU itself sends one buffer a page).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from virtmig.errors import LocalProtocolError
from virtmig.stream.multifd import MultifdHello, encode_multifd
from virtmig.stream.multifd_compression import METHOD_FLAG, make_deflater
from virtmig.stream.wire import (
    MULTIFD_COMPRESSED_LONGEST,
    MULTIFD_HEADER_BYTES,
    MULTIFD_MAGIC,
    MULTIFD_PACKET_SIZE,
    MULTIFD_VERSION,
    TARGET_PAGE_BYTES,
    Dialect,
    MultifdFlag,
)

Buffers = list[bytes | memoryview]

_HEADER = struct.Struct(">IIIIIIQI28x256s")


class MultifdEncoder:
    """One channel's sender. `dialect` is the destination's: 7.2 knows no zero pages in packets.

    `packet_numbers` is shared by all channels of a migration (QEMU counts over all of them). A compressing encoder
    belongs to its channel for the whole migration: its stream goes on from packet to packet.
    """

    def __init__(
        self,
        channel_id: int,
        *,
        dialect: Dialect,
        uuid: bytes = bytes(16),
        method: str = "none",
        level: int | None = None,
        packet_numbers: Iterator[int] | None = None,
        page_bytes: int = TARGET_PAGE_BYTES,
    ) -> None:
        if not 0 <= channel_id <= 254:
            raise LocalProtocolError(f"multifd channel id {channel_id}, QEMU takes 0 to 254")
        if len(uuid) != 16:
            raise LocalProtocolError(f"a uuid of {len(uuid)} bytes, it has 16")
        self.channel_id = channel_id
        self._dialect = dialect
        self._uuid = uuid
        self._deflater = make_deflater(method, level)
        self._method = METHOD_FLAG[method]
        self._numbers = packet_numbers if packet_numbers is not None else itertools.count()
        self._page_bytes = page_bytes
        self._capacity = MULTIFD_PACKET_SIZE // page_bytes
        self._channel = f"multifd {channel_id}"

    def hello(self) -> bytes:
        """The first 64 bytes."""
        return bytes(encode_multifd(MultifdHello(self._uuid, self.channel_id))[0])

    def sync(self) -> Buffers:
        """A packet that carries nothing but SYNC, as this dialect sends it."""
        alloc = self._capacity if self._dialect is Dialect.QEMU_7_2 else 0
        return [self._header(int(MultifdFlag.SYNC), alloc, 0, 0, b"", np.empty(0, np.uint64), 0)]

    def pages_of_memory(self, block: str, offsets: npt.NDArray[np.uint64], memory: memoryview) -> Buffers:
        """Packets of the pages at `offsets` (bytes from the block's start); `memory` is the whole RAM block.

        Neighbours in `offsets` become one buffer, so sorted offsets are cheapest. The memory must stay as it is until
        the buffers are sent (or not: QEMU too sends pages that the guest writes, and sends them again).
        """
        offsets = self._checked(block, offsets)
        if offsets.size and int(offsets.max()) + self._page_bytes > len(memory):
            raise LocalProtocolError(f"page {int(offsets.max()):#x} is outside {block}", channel=self._channel)
        buffers: Buffers = []
        for first in range(0, len(offsets), self._capacity):
            part = offsets[first : first + self._capacity]
            start, length = int(part[0]), len(part) * self._page_bytes
            if int(part[-1]) - start == length - self._page_bytes and bool((part[1:] > part[:-1]).all()):
                buffers += self._packet(block, part, [memory[start : start + length]])
                continue
            cuts = np.flatnonzero(part[1:] - part[:-1] != self._page_bytes) + 1
            starts = part[np.concatenate(([0], cuts))].tolist()
            lengths = (np.diff(np.concatenate(([0], cuts, [len(part)]))) * self._page_bytes).tolist()
            runs = [memory[start : start + length] for start, length in zip(starts, lengths, strict=True)]
            buffers += self._packet(block, part, runs)
        return buffers

    def pages(self, block: str, offsets: npt.NDArray[np.uint64], data: bytes | memoryview) -> Buffers:
        """Packets of the pages at `offsets`, whose contents follow one another in `data`."""
        offsets = self._checked(block, offsets)
        view = memoryview(data).cast("B")
        if len(view) != len(offsets) * self._page_bytes:
            raise LocalProtocolError(f"{len(view)} bytes for {len(offsets)} pages", channel=self._channel)
        buffers: Buffers = []
        for first in range(0, len(offsets), self._capacity):
            part = offsets[first : first + self._capacity]
            at = first * self._page_bytes
            buffers += self._packet(block, part, [view[at : at + len(part) * self._page_bytes]])
        return buffers

    def zero_pages(self, block: str, offsets: npt.NDArray[np.uint64]) -> Buffers:
        """Packets that only list zero pages. A destination clears them only if it received them before."""
        if self._dialect is Dialect.QEMU_7_2:
            raise LocalProtocolError(
                "QEMU 7.2 ignores zero pages in a packet; send them on main", channel=self._channel
            )
        offsets = self._checked(block, offsets)
        return [
            self._header(self._method, self._capacity, 0, 0, block.encode("ascii"), part, len(part))
            for part in (offsets[at : at + self._capacity] for at in range(0, len(offsets), self._capacity))
        ]

    def _checked(self, block: str, offsets: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        if not 0 < len(block) < 256 or not block.isascii() or "\0" in block:
            raise LocalProtocolError(f"{block!r} is no name of a RAM block", channel=self._channel)
        offsets = np.asarray(offsets, np.uint64)
        if offsets.size and int(np.bitwise_or.reduce(offsets)) & (self._page_bytes - 1):
            raise LocalProtocolError("an offset that is not the start of a page", channel=self._channel)
        return offsets

    def _packet(self, block: str, offsets: npt.NDArray[np.uint64], runs: list[memoryview]) -> Buffers:
        count = len(offsets)
        if self._deflater is None:
            header = self._header(0, self._capacity, count, count * self._page_bytes, block.encode(), offsets, 0)
            return [header, *runs]
        body = self._deflater.deflate(runs[0] if len(runs) == 1 else b"".join(runs))
        if len(body) > MULTIFD_COMPRESSED_LONGEST:
            raise LocalProtocolError(f"a compressed body of {len(body)} bytes", channel=self._channel)
        return [self._header(self._method, self._capacity, count, len(body), block.encode(), offsets, 0), body]

    def _header(
        self,
        flags: int,
        alloc: int,
        normal: int,
        size: int,
        name: bytes,
        offsets: npt.NDArray[np.uint64],
        zero: int,
    ) -> bytes:
        header = bytearray(MULTIFD_HEADER_BYTES + 8 * self._capacity)
        number = next(self._numbers)
        _HEADER.pack_into(header, 0, MULTIFD_MAGIC, MULTIFD_VERSION, flags, alloc, normal, size, number, zero, name)
        fields = offsets.astype(">u8").tobytes()
        header[MULTIFD_HEADER_BYTES : MULTIFD_HEADER_BYTES + len(fields)] = fields
        return bytes(header)
