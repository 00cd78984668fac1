"""`virtmig inspect FILE|FOLDER|-`: what a recording or a saved guest holds, for people. Images: inspect_image.py.

Everything is read once, in pieces of 1 MiB, and nothing of the pages is kept. Only a plain file's end is read ahead:
the JSON description there says where each device's section ends. The counting is in stream/summary.py.
"""

from __future__ import annotations

import sys
import tomllib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec

from virtmig.cli.inspect_files import KNOWN_STARTS, PIECE_BYTES, BrokenSource, Source, head_of, inflated, kind_of_start
from virtmig.cli.inspect_image import inspect_image, is_image, where_it_is_made
from virtmig.cli.inspect_view import clean, event_line, item_words, print_report
from virtmig.errors import DomainXmlError, RemoteProtocolError, RequestError
from virtmig.stream.commands import Order
from virtmig.stream.cursor import Cursor, NeedData
from virtmig.stream.decoder import DESCRIPTION_LIMIT_BYTES, PreemptDecoder, QemuStreamDecoder
from virtmig.stream.device import find_description
from virtmig.stream.events import Description, DeviceSection, EndOfStream, Package
from virtmig.stream.multifd import MultifdDecoder
from virtmig.stream.ram import RamReader
from virtmig.stream.return_path import ReturnPathDecoder
from virtmig.stream.save_file import SaveFormat, SaveHeader, decode_save_header
from virtmig.stream.summary import PACKAGE_HEAD_BYTES, StreamSummary, unpacked
from virtmig.stream.summary_rows import Channel, Damage, Role, together
from virtmig.stream.wire import Command as Number
from virtmig.stream.wire import Item

#: nothing could be inspected: the argument is wrong, not a stream
EXIT_USAGE = 2
#: how much of what was read last is kept, to show the bytes at a damage
_KEPT_PIECES = 3
_SHOWN_BYTES = 16
_COMPRESSED = {SaveFormat.GZIP: "gzip", SaveFormat.BZIP2: "bzip2", SaveFormat.XZ: "xz", SaveFormat.ZSTD: "zstd"}

Located = Iterator[tuple[int, object]]
Sink = Callable[[str, int, object], None]


@dataclass
class _Reading:
    """What the channels of one folder share, and where the events go."""

    sink: Sink | None = None
    ram: RamReader | None = None
    channels: list[Channel] = field(default_factory=list)
    container: dict[str, str | int | bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run_inspect(values: dict[str, Any]) -> int:
    """Print the report (or, with --events, the events) of `file`. 0 whole, 1 damaged or cut off, 2 nothing to read."""
    name = str(values["file"])
    as_json, as_events = bool(values.get("json")), bool(values.get("events"))
    reading = _Reading(_event_sink(as_json) if as_events else None)
    if name == "-":
        name = "standard input"
        pieces = iter(lambda: sys.stdin.buffer.read(PIECE_BYTES), b"")
        _inspect_file(name, Source("main", None, pieces), reading)
    elif is_image(Path(name)):
        if as_events:
            raise _refused(f"'{clean(name)}' is an image of a guest: it has no events", "leave out --events")
        return inspect_image(Path(name), as_json=as_json)
    elif Path(name).is_dir():
        _inspect_folder(Path(name), reading)
    else:
        with _opened(Path(name)) as stream:
            _inspect_file(name, Source("main", stream), reading)
    report = together(name, reading.channels, container=reading.container)
    report.notes = reading.notes
    if as_json and not as_events:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    elif not as_events:
        print_report(report, sys.stdout)
    sys.stdout.flush()
    for damage in report.damage:
        print(f"error: {clean(name)}: {clean(damage)}", file=sys.stderr)
    return 0 if report.whole else 1


def _refused(message: str, hint: str = "") -> RequestError:
    error = RequestError(message, option="file", hint=hint)
    error.exit_status = EXIT_USAGE
    return error


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> RequestError:
    return _refused(f"'{clean(str(path))}' cannot be read: {error.strerror or error}", where_it_is_made(path))


def _event_sink(as_json: bool) -> Sink:
    def show(channel: str, offset: int, event: object) -> None:
        name, words = event_line(event)
        if as_json:
            line = msgspec.json.encode({"channel": channel, "offset": offset, "event": name, "text": words}).decode()
        else:
            line = f"{clean(channel)}  {offset:#012x}  {name:<18} {words}".rstrip()
        sys.stdout.write(line + "\n")

    return show


# -- files and folders -------------------------------------------------------------------------------------------------


def _inspect_folder(folder: Path, reading: _Reading) -> None:
    """A recording as in tests/vectors: CHANNEL.s2d[.xz], CHANNEL.d2s[.xz], or file[.xz]."""
    files: dict[tuple[str, str], Path] = {}
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise _unreadable(folder, error) from None
    for file_name in names:
        plain = file_name.removesuffix(".xz")
        channel, dot, way = plain.rpartition(".")
        if plain == "file":
            files["file", "s2d"] = folder / file_name
        elif dot and way in ("s2d", "d2s"):
            files[channel, way] = folder / file_name
    if not files:
        there = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "it is empty"
        raise _refused(
            f"folder '{clean(str(folder))}' holds no recording: {clean(there)}; "
            "expected CHANNEL.s2d.xz, CHANNEL.d2s.xz or file.xz"
        )
    _read_about(folder / "about.toml", reading)
    for (channel, way), path in sorted(files.items(), key=lambda item: _in_order(*item[0])):
        with _opened(path) as stream:
            source = Source(channel if way == "s2d" else f"{channel} (back)", stream)
            if way == "d2s":
                role = Role.RETURN_PATH
            else:
                role = next((role for role in Role if channel.startswith(role.value)), Role.MAIN)
            _inspect_source(source, reading, role if channel != "file" else None, resumed="-recovery" in channel)


def _in_order(channel: str, way: str) -> tuple[int, str, str]:
    """Main first, since its block list is what the others are checked against."""
    order = ("file", "main", "multifd", "preempt", "main-recovery", "preempt-recovery")
    place = order.index(channel) if channel in order else order.index("multifd") if "multifd" in channel else len(order)
    return place, channel, "" if way == "s2d" else way


def _read_about(path: Path, reading: _Reading) -> None:
    """What the recorder wrote down; for people only, nothing is decoded by it."""
    if not path.is_file():
        return
    try:
        about = tomllib.loads(path.read_text()[: 1 << 20])
    except (ValueError, OSError) as error:
        reading.notes.append(f"about.toml cannot be read: {error}")
        return
    known = ("scenario", "qemu", "machine", "ending")
    reading.container["kind"] = "recording"
    reading.container.update({f"recorded {key}": str(about[key]) for key in known if key in about})


def _inspect_file(name: str, source: Source, reading: _Reading) -> None:
    head = source.head(KNOWN_STARTS)
    if not head:
        raise _refused(f"'{clean(name)}' is empty; expected a migration stream, a save file or a recording's channel")
    _inspect_source(source, reading, None, label=name)


def _inspect_source(
    source: Source, reading: _Reading, role: Role | None, *, label: str = "", resumed: bool = False
) -> None:
    """One file, whatever it is packed in. `role` None: told by its first bytes."""
    packing = kind_of_start(source.head(KNOWN_STARTS))
    if packing in ("xz", "gzip", "bzip2", "zstd"):
        source = inflated(source, packing)
        if label:
            reading.notes.append(f"the file is packed with {packing}; offsets are those of what is inside")
    if role is not None:
        reading.channels.append(_read_channel(source, role, reading, resumed=resumed))
        return
    try:
        head = source.head(KNOWN_STARTS)
    except BrokenSource as broken:
        raise RequestError(f"'{clean(label or source.name)}': {broken}", option="file") from None
    kind = kind_of_start(head)
    if kind == "save":
        source = _save_header(source, reading, label or source.name)
        kind = "main"
    roles = {
        "main": Role.MAIN,
        "resumed": Role.MAIN,
        "multifd": Role.MULTIFD,
        "preempt": Role.PREEMPT,
        "return path": Role.RETURN_PATH,
    }
    if kind not in roles:
        raise _refused(
            f"'{clean(label or source.name)}' is no migration and no saved guest: it begins with {head_of(head)}; "
            "expected QEVM (a stream), LibvirtQemudSave, the multifd magic 11 22 33 44, page records or messages of a "
            "return path"
        )
    if label:
        source.name = roles[kind].value
    reading.channels.append(_read_channel(source, roles[kind], reading, resumed=kind == "resumed"))


def _save_header(source: Source, reading: _Reading, label: str) -> Source:
    """Libvirt's header; the source then stands at the stream, decompressed when libvirt had it compressed."""
    cursor = Cursor("save file")
    pieces = source.pieces()
    header: SaveHeader | None = None
    try:
        for piece in pieces:
            cursor.feed(piece)
            try:
                header = decode_save_header(cursor)
                break
            except NeedData:
                continue
    except (RemoteProtocolError, BrokenSource) as error:
        offset = getattr(error, "offset", None)
        raise _broken_header(label, str(error), offset) from None
    if header is None:
        raise _broken_header(label, "the file ends inside libvirt's header", cursor.available)
    reading.container.update(_header_facts(header))
    if not header.is_complete:
        reading.notes.append("libvirt never finished this file: its magic is LibvirtQemudPart")
    with cursor.peek_view() as view:
        source.push_back(bytes(view))
    if header.format in _COMPRESSED:
        reading.notes.append(f"the stream is compressed with {header.format_name}; its offsets begin at 0 inside of it")
        return inflated(source, _COMPRESSED[SaveFormat(header.format)])
    if header.format not in (SaveFormat.RAW, SaveFormat.SPARSE):
        raise _refused(f"'{clean(label)}' is compressed with {header.format_name}, which cannot be read here",
                       "decompress it first")  # fmt: skip
    return source


def _broken_header(label: str, message: str, offset: int | None) -> RequestError:
    error = RequestError(f"'{clean(label)}': libvirt's header is damaged at offset {offset or 0:#x}: {message}")
    error.exit_status = 1
    return error


def _header_facts(header: SaveHeader) -> dict[str, str | int | bool]:
    from virtmig.domain.document import parse_xml, text_of

    try:
        domain = text_of(parse_xml(header.xml), "name")
    except DomainXmlError as error:
        domain = f"(no name: {error})"
    return {
        "kind": "save file of libvirt",
        "domain": domain,
        "format": header.format_name,
        "header version": header.version,
        "was running": bool(header.was_running),
        "complete": header.is_complete,
        "cookie": bool(header.cookie),
        "stream at": header.stream_offset,
    }


# -- one channel -------------------------------------------------------------------------------------------------------


class _Kept:
    """The pieces read last, to show what is at a damage."""

    def __init__(self, begin: int) -> None:
        self._pieces: deque[tuple[int, bytes]] = deque(maxlen=_KEPT_PIECES)
        self.end = begin

    def add(self, piece: bytes) -> None:
        self._pieces.append((self.end, piece))
        self.end += len(piece)

    def at(self, offset: int) -> bytes | None:
        """The bytes there; None when they are no longer kept."""
        if offset >= self.end:
            return b""
        held = b"".join(piece for begin, piece in self._pieces if begin + len(piece) > offset)
        begin = next((begin for begin, piece in self._pieces if begin + len(piece) > offset), self.end)
        return held[offset - begin :][: _SHOWN_BYTES * 20] if begin <= offset else None


def _read_channel(source: Source, role: Role, reading: _Reading, *, resumed: bool) -> Channel:
    summary = StreamSummary(source.name, role, resumed=resumed)
    kept = _Kept(source.offset)
    try:
        for offset, event in _events(source, role, reading, kept, resumed=resumed):
            summary.add(event, offset)
            if reading.sink is not None:
                reading.sink(source.name, offset, event)
            if isinstance(event, Description):
                _check_description(event, offset, summary, kept.end)
    except RemoteProtocolError as error:
        offset = error.offset if error.offset is not None else kept.end
        summary.fail(_damage(error.message, offset, summary.expecting, source, kept))
    except BrokenSource as broken:
        found = f"trouble at offset {broken.offset:#x} of the file itself"
        summary.fail(Damage(kept.end, str(broken), summary.expecting, found))
    return summary.result(kept.end)


def _check_description(event: Description, offset: int, summary: StreamSummary, end: int) -> None:
    """QEMU loads a stream whose description is cut off, or says otherwise; a file in which it is so is not whole."""
    for words in event.disagreements[:1]:
        more = f", and {len(event.disagreements) - 1} more" if len(event.disagreements) > 1 else ""
        summary.fail(Damage(offset, words + more, "sections as long as the description says", "another length"))
    if not event.complete:
        expected = "the length of the description" if event.head is not None else f"{event.length} bytes of description"
        found = f"{len(event.head if event.head is not None else event.text)} bytes of it, and the end at {end:#x}"
        summary.fail(Damage(offset, "the stream ends inside the description", expected, found, end))


def _damage(message: str, offset: int, expected: str, source: Source, kept: _Kept) -> Damage:
    cut = "ends inside" in message or "ended inside" in message
    there = kept.at(offset)
    if there is None:
        there = source.read_again(offset, _SHOWN_BYTES * 20)
    if there is None:
        found = "bytes that are no longer kept"
    elif not there:
        found = "the end"
    else:
        words = item_words(there) if any(word in expected for word in ("command", "footer", "EOF")) else ""
        found = there[:_SHOWN_BYTES].hex(" ") + (f" ({words})" if words else "")
        if cut:
            found += f", and the end at {kept.end:#x}"
    return Damage(offset, message, expected, found, kept.end if cut else None)


def _events(source: Source, role: Role, reading: _Reading, kept: _Kept, *, resumed: bool) -> Located:
    """The events of one channel with their offsets. Raises RemoteProtocolError, BrokenSource."""
    if role is Role.MAIN:
        yield from _main_events(source, reading, kept, resumed=resumed)
        return
    blocks = dict(reading.ram.known) if reading.ram is not None and reading.ram.known else None
    multifd: MultifdDecoder | None = None
    if role is Role.MULTIFD:
        multifd = MultifdDecoder(channel=source.name, blocks=blocks)
        decoder: MultifdDecoder | PreemptDecoder | ReturnPathDecoder = multifd
    elif role is Role.PREEMPT:
        decoder = PreemptDecoder(source.name, known=blocks)
    else:
        decoder = ReturnPathDecoder(channel=source.name, blocks=blocks)

    def step() -> Located:
        events = decoder.events()
        while True:
            begin = decoder.cursor.offset if isinstance(decoder, PreemptDecoder) else decoder.offset
            event = next(events, None)
            if event is None:
                return
            yield (getattr(event, "offset", begin) if multifd is not None else begin), event

    for piece in source.pieces():
        kept.add(piece)
        decoder.feed(piece)
        yield from step()
    decoder.end()
    if multifd is None or kept.end:  # a connection on which nothing came is no damage
        yield from step()


def _main_events(source: Source, reading: _Reading, kept: _Kept, *, resumed: bool) -> Located:
    decoder = _main_decoder(source, resumed, reading.ram)
    decoder.cursor = Cursor(source.name, source.offset)
    reading.ram = decoder.ram
    for piece in source.pieces():
        kept.add(piece)
        decoder.feed(piece)
        yield from _main_step(decoder)
    decoder.end()
    yield from _main_step(decoder)


def _main_decoder(source: Source, resumed: bool, ram: RamReader | None) -> QemuStreamDecoder:
    tail = b"" if resumed else source.tail(DESCRIPTION_LIMIT_BYTES)
    found = find_description(tail)
    del tail
    try:
        saved = found[1] if found is not None else None
        return QemuStreamDecoder(source.name, recovery=resumed, ram=ram if resumed else None, saved=saved)
    except RemoteProtocolError:  # that description is no help; its own event says what is wrong with it
        return QemuStreamDecoder(source.name, recovery=resumed, ram=ram if resumed else None)


def _main_step(decoder: QemuStreamDecoder) -> Located:
    """What can be read now, packages opened. An error inside a package comes behind the events before it."""
    events = decoder.events()
    behind = 0  # where the last event ended that was not read on its own (streams without footers)
    while True:
        begin, postcopy = decoder.cursor.offset, decoder.order.postcopy
        try:
            event = next(events, None)
        except RemoteProtocolError:
            yield from _in_broken_package(decoder, begin, postcopy)
            raise
        if event is None:
            return
        if isinstance(event, DeviceSection):
            begin = event.begins_at
            behind = begin + 14 + len(event.idstr) + len(event.data)
        elif decoder.cursor.offset == begin and isinstance(event, EndOfStream):
            begin = behind
        elif decoder.cursor.offset == begin and isinstance(event, Description):
            begin = behind + 1
        yield begin, event
        if isinstance(event, Package):
            yield from unpacked(event, begin)


def _in_broken_package(decoder: QemuStreamDecoder, begin: int, postcopy: str) -> Located:
    """The events of a package before its damage; its decoder gives all or none."""
    buffer, at = decoder.cursor.window()
    at -= decoder.cursor.offset - begin
    head = bytes(buffer[at : at + PACKAGE_HEAD_BYTES]) if at >= 0 else b""
    if len(head) < PACKAGE_HEAD_BYTES or head[:3] != bytes([Item.COMMAND]) + Number.PACKAGED.to_bytes(2, "big"):
        return
    length = int.from_bytes(head[5:], "big")
    body = bytes(buffer[at + PACKAGE_HEAD_BYTES : at + PACKAGE_HEAD_BYTES + length])
    inner = QemuStreamDecoder(decoder.cursor.channel, recovery=True, ram=RamReader(known=decoder.ram.known))
    inner.cursor = Cursor(decoder.cursor.channel, begin + PACKAGE_HEAD_BYTES)
    inner.order = Order()
    inner.order.return_path, inner.order.postcopy = True, postcopy
    inner.sections, inner.footers = dict(decoder.sections), decoder.footers
    inner.feed(body)
    try:
        yield from _main_step(inner)
    except RemoteProtocolError:
        return
