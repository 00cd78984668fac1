"""The rows that a summary of channels is made of, and what they are together. Plain data, for a table or for JSON."""

from __future__ import annotations

import enum

import msgspec

from virtmig.stream.version_guess import Evidence, VersionGuess, guess_version
from virtmig.stream.wire import TARGET_PAGE_BYTES

COUNTED = (
    "passes are a guess: a new one begins at SECTION_END (the guest has stopped), behind a MULTIFD_FLUSH word, or "
    "where main's pages jump back to a lower place; compress threads mix the order, so their passes are not told "
    "apart; pages of multifd channels belong to the pass of their SYNC"
)


class Role(enum.StrEnum):
    MAIN = "main"
    MULTIFD = "multifd"
    PREEMPT = "preempt"
    RETURN_PATH = "return path"


class Counts(msgspec.Struct):
    """Page records by kind. `normal` and `duplicate` (zero pages) as query-migrate's ram has them; `normal_bytes` is
    normal times the page size; `wire_bytes` is what stood for the contents on the wire, without the records' heads.
    """

    normal: int = 0
    duplicate: int = 0
    xbzrle: int = 0
    compressed: int = 0
    normal_bytes: int = 0
    wire_bytes: int = 0

    @property
    def pages(self) -> int:
        return self.normal + self.duplicate + self.xbzrle + self.compressed

    def add(self, other: Counts) -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def count(self, kind: str, pages: int, wire_bytes: int) -> None:
        setattr(self, kind, getattr(self, kind) + pages)
        self.wire_bytes += wire_bytes
        if kind == "normal":
            self.normal_bytes += pages * TARGET_PAGE_BYTES


class Pass(msgspec.Struct):
    """`kind` is precopy, end (the guest has stopped) or postcopy; `flushes` and `sections` are the MULTIFD_FLUSH words
    and the RAM sections that ended in it.
    """

    kind: str
    offset: int
    counts: Counts
    sections: int = 0
    flushes: int = 0


class Block(msgspec.Struct):
    """`page_size_bytes` only for hugetlb blocks under postcopy, `address` with x-ignore-shared; the rest mapped-ram."""

    name: str
    used_length_bytes: int
    page_size_bytes: int | None = None
    address: int | None = None
    bitmap_offset: int | None = None
    pages_offset: int | None = None
    present_pages: int | None = None


class Entry(msgspec.Struct):
    """A command of main, or a message of the return path; neighbours about one block are one entry with a `count`."""

    offset: int
    name: str
    block: str = ""
    detail: str = ""
    count: int = 1
    ranges: int = 0
    bytes: int = 0


class Field(msgspec.Struct):
    """`value` is hexadecimal, of the first VALUE_BYTES."""

    name: str
    bytes: int
    value: str


class Device(msgspec.Struct):
    """`fields` is None when there was no description of it; `why` then says more, if there is more to say."""

    offset: int
    name: str
    instance_id: int
    version_id: int
    bytes: int
    kind: str = "FULL"
    fields: list[Field] | None = None
    why: str = ""


class Multifd(msgspec.Struct):
    """Packets of one channel. `epochs` are the pages between its SYNCs; the last is what followed the last SYNC."""

    channel_id: int | None = None
    uuid: str = ""
    packets: int = 0
    with_pages: int = 0
    syncs: int = 0
    methods: dict[str, int] = msgspec.field(default_factory=dict)
    body_bytes: int = 0
    device_states: dict[str, int] = msgspec.field(default_factory=dict)
    epochs: list[Counts] = msgspec.field(default_factory=lambda: [Counts()])


class Damage(msgspec.Struct):
    """`found` are the bytes at `offset` in words; `ends_at` is where the channel ends when it is cut off there."""

    offset: int
    message: str
    expected: str
    found: str
    ends_at: int | None = None


class Channel(msgspec.Struct, kw_only=True):
    """One channel, as far as it could be read. `bytes` is how much was read."""

    name: str
    role: Role
    bytes: int
    machine: str | None = None
    uuid: str = ""
    capabilities: list[str] = []
    inferred: dict[str, str] = {}
    counts: Counts
    passes: list[Pass] = []
    blocks: list[Block] = []
    commands: list[Entry] = []
    devices: list[Device] = []
    multifd: Multifd | None = None
    described: bool = False
    ended: bool = False
    notes: list[str] = []
    damage: Damage | None = None
    evidence: list[Evidence] = []


class Report(msgspec.Struct, kw_only=True):
    """Everything about one file or folder. `normal` and `duplicate` are the sums over all channels."""

    source: str
    machine: str | None
    version: VersionGuess
    capabilities: dict[str, str]
    normal: int
    duplicate: int
    ram: Counts
    passes: list[Pass]
    counted: str = COUNTED
    container: dict[str, str | int | bool] = {}
    notes: list[str] = []
    channels: list[Channel]
    damage: list[str]
    whole: bool


def together(source: str, channels: list[Channel], *, container: dict[str, str | int | bool] | None = None) -> Report:
    """One report of all channels of a migration."""
    total = Counts()
    capabilities: dict[str, str] = {}
    for channel in channels:
        total.add(channel.counts)
        capabilities.update(dict.fromkeys(channel.capabilities, "listed in the configuration"))
        for name, why in _inferred(channel).items():
            capabilities.setdefault(name, why)
    damage = [
        f"{channel.name}: offset {channel.damage.offset:#x} ({channel.damage.offset}): {channel.damage.message}"
        for channel in channels
        if channel.damage is not None
    ]
    return Report(
        source=source,
        machine=next((channel.machine for channel in channels if channel.machine), None),
        version=guess_version([evidence for channel in channels for evidence in channel.evidence]),
        capabilities=dict(sorted(capabilities.items())),
        normal=total.normal,
        duplicate=total.duplicate,
        ram=total,
        passes=passes_of(channels),
        container=container or {},
        channels=channels,
        damage=damage,
        whole=not damage,
    )


def passes_of(channels: list[Channel]) -> list[Pass]:
    """The passes of all main channels with the pages of the others added.

    A multifd channel's epoch k goes to the pass in which main's marker k lies: the MULTIFD_FLUSH words where there are
    any, else the ends of RAM sections (7.2, machine types up to 8.0). What has no marker goes to the last pass.
    """
    rows = [
        msgspec.structs.replace(row, counts=msgspec.structs.replace(row.counts))
        for channel in channels
        if channel.role is Role.MAIN
        for row in channel.passes
    ]
    others = [channel for channel in channels if channel.role is not Role.MAIN and channel.counts.pages]
    if not rows and others:
        rows = [Pass("postcopy" if others[0].role is Role.PREEMPT else "unknown", 0, Counts())]
    by_flush = any(row.flushes for row in rows)
    of_marker = [row for row in rows for _ in range(row.flushes if by_flush else row.sections)]
    for channel in others:
        if channel.multifd is None:
            postcopy = [row for row in rows if row.kind == "postcopy"]
            (postcopy or rows)[-1].counts.add(channel.counts)
            continue
        for number, counts in enumerate(channel.multifd.epochs):
            row = of_marker[number] if number < len(of_marker) else (of_marker or rows)[-1]
            row.counts.add(counts)
    return [row for row in rows if row.counts.pages or row.kind == "end"]


def _inferred(channel: Channel) -> dict[str, str]:
    found = dict(channel.inferred)
    if channel.role is Role.MULTIFD:
        found["multifd"] = "multifd channels"
    elif channel.role is Role.PREEMPT:
        found["postcopy-preempt"] = "a preempt channel"
    elif channel.role is Role.RETURN_PATH:
        found["return-path"] = "answers on the return path"
    return found
