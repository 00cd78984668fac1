"""`virtmig inspect FOLDER` of a guest at rest: what `virtmig receive` keeps, whole, on its way, or interrupted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from virtmig.cli.inspect_view import clean, pairs, table
from virtmig.engine.image import DESCRIPTION, DEVICES, Image
from virtmig.engine.interrupted import ARRIVED, PARTIAL, Interrupted, interrupted, look, moment_text
from virtmig.engine.manifest import CHUNK_BYTES, MANIFEST, BlockFile, Manifest, open_file, read_file
from virtmig.engine.memory import holes_and_data
from virtmig.errors import ImageError
from virtmig.quantities import size_text
from virtmig.stream.wire import Item

#: what `virtmig send` writes down: where the image went
SENT = "sent.json"
_SENT_LIMIT_BYTES = 1 << 20
#: of damages, so many are shown
_MOST_DAMAGES = 20


class BlockReport(msgspec.Struct, frozen=True):
    """One RAM block. `held_bytes` is what its file does not leave out as holes, `summed_pieces` those with a sum."""

    name: str
    file: str
    bytes: int
    page_size_bytes: int
    held_bytes: int | None
    summed_pieces: int


class SectionReport(msgspec.Struct, frozen=True):
    """One device section. `came`: before RAM, before the switchover, or at it."""

    kind: str
    name: str
    instance_id: int
    version_id: int
    bytes: int
    came: str


class ImageReport(msgspec.Struct, frozen=True, kw_only=True):
    """`state` is whole, being received, interrupted, arrived (all is here, not yet committed) or damaged."""

    source: str
    state: str
    machine: str | None
    uuid: str
    created: str | None
    origin: dict[str, str | int]
    ram_bytes: int
    blocks: list[BlockReport]
    devices: list[SectionReport]
    description_bytes: int
    sums: str
    sent: dict[str, Any] | None
    held_by: str | None
    damage: list[str]


def is_image(folder: Path) -> bool:
    """A folder of `virtmig receive`, in whatever state; a recording has none of these files."""
    names = (MANIFEST, PARTIAL, ARRIVED)
    return folder.is_dir() and (
        any(os.path.lexists(folder / name) for name in names)
        or (folder.name.endswith(".incoming") and os.path.lexists(folder / "ram-0"))
    )


def where_it_is_made(place: Path) -> str:
    """A hint for who looks for an image that has not got its name yet."""
    found = interrupted(place)
    return f"a guest on its way there is in {found[-1].folder}" if found else ""


def inspect_image(folder: Path, *, as_json: bool) -> int:
    """Print the report. 0 whole, 1 damaged or not whole. Raises ImageError when its manifest cannot be believed."""
    report = report_of(folder)
    if as_json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        for line in _lines(report):
            sys.stdout.write(clean(line).rstrip() + "\n")
    sys.stdout.flush()
    for words in report.damage:
        print(f"error: {clean(report.source)}: {clean(words)}", file=sys.stderr)
    return 0 if report.state == "whole" else 1


def report_of(folder: Path) -> ImageReport:
    """Everything of an image, its RAM read once against its sums."""
    if os.path.lexists(folder / MANIFEST) and not folder.name.endswith(".incoming"):
        return _whole(folder)
    return _partial(folder, look(folder.absolute()))


def _whole(folder: Path) -> ImageReport:
    with Image(folder) as image:
        damage = list(islice(image.damages(), _MOST_DAMAGES))
        pieces = sum(len(block.crc32) for block in image.manifest.blocks)
        match = f"{pieces} pieces of {CHUNK_BYTES >> 20} MiB match, all others are zero"
        sums = "do not match" if damage else match
        return _report(folder, image.manifest, "damaged" if damage else "whole", sums, damage=damage)


def _partial(folder: Path, found: Interrupted) -> ImageReport:
    manifest, damage = found.manifest, [found.damage] if found.damage else []
    state = "being received" if found.holder is not None else "arrived" if found.arrived else "interrupted"
    held_by = f"{found.holder} since {moment_text(found.holder.since)}" if found.holder is not None else None
    if manifest is None:
        manifest = Manifest("", 0, None, "", 0.0, (), 0, 0, 0, 0)
        if found.holder is None and not damage:
            damage = ["a precopy that did not come to its end: its guest never left the source, it can be removed"]
    return _report(folder, manifest, state, "not made yet", damage=damage, held_by=held_by)


def _report(
    folder: Path, manifest: Manifest, state: str, sums: str, *, damage: list[str], held_by: str | None = None
) -> ImageReport:
    before = manifest.sections_before_ram
    early = before + manifest.sections_before_switch
    devices = [
        SectionReport(
            Item(entry.kind).name, entry.idstr, entry.instance_id, entry.version_id, entry.length,
            "before RAM" if number < before else "before the switchover" if number < early else "at the switchover",
        )
        for number, entry in enumerate(manifest.sections)
    ]  # fmt: skip
    return ImageReport(
        source=str(folder), state=state, machine=manifest.machine, uuid=manifest.uuid,
        created=moment_text(manifest.created) if manifest.created else None, origin=manifest.origin,
        ram_bytes=manifest.ram_bytes, blocks=[_block(folder, block) for block in manifest.blocks], devices=devices,
        description_bytes=manifest.description_bytes, sums=sums, sent=_sent(folder, damage), held_by=held_by,
        damage=damage,
    )  # fmt: skip


def _block(folder: Path, block: BlockFile) -> BlockReport:
    held = None
    try:
        fd = open_file(folder / block.file)
    except ImageError:
        pass
    else:
        held = sum(end - start for start, end in holes_and_data(fd, block.length))
        os.close(fd)
    return BlockReport(block.name, block.file, block.length, block.page_size, held, len(block.crc32))


def _sent(folder: Path, damage: list[str]) -> dict[str, Any] | None:
    path = folder / SENT
    if not os.path.lexists(path):
        return None
    try:
        return msgspec.json.decode(read_file(path, _SENT_LIMIT_BYTES, f"'{path}'"), type=dict[str, Any])
    except (ImageError, msgspec.MsgspecError, RecursionError) as error:
        damage.append(f"{SENT} cannot be read: {error}")
        return None


def _lines(report: ImageReport) -> Iterator[str]:
    yield report.source
    yield from pairs(_head(report))
    if report.sent is not None:
        yield ""
        yield "sent"
        yield from pairs((name, _short(value)) for name, value in report.sent.items())
    if report.blocks:
        yield ""
        yield "RAM blocks"
        rows = [(block.name, str(block.bytes), _held(block), block.file, _page_words(block)) for block in report.blocks]
        yield from table(("name", "bytes", "held", "file", ""), rows)
    if report.devices:
        yield ""
        yield f"device sections, in the order they came ({DEVICES})"
        sections = [
            (each.name, str(each.instance_id), str(each.version_id), str(each.bytes),
             "" if each.kind == "SECTION_FULL" else each.kind, "" if each.came == "at the switchover" else each.came)
            for each in report.devices
        ]  # fmt: skip
        yield from table(("section", "instance", "version", "bytes", "kind", "came"), sections)
    yield ""
    yield from (f"damaged: {words}" for words in report.damage)
    if report.state == "whole":
        yield "whole: read to the end, every sum matches"


def _head(report: ImageReport) -> Iterator[tuple[str, str]]:
    yield "kind", "image of a guest, as virtmig receive keeps it"
    yield "state", _STATES[report.state]
    if report.held_by is not None:
        yield "held by", report.held_by
    yield "machine", report.machine or "not said"
    if report.uuid:
        yield "uuid", report.uuid
    if report.created is not None:
        yield "created", report.created
    yield "RAM", f"{report.ram_bytes} bytes ({size_text(report.ram_bytes)}) in {len(report.blocks)} blocks"
    for name, value in report.origin.items():
        yield name.replace("_", " "), str(value)
    yield "sums", report.sums
    if report.description_bytes:
        yield "description", f"{report.description_bytes} bytes of QEMU's JSON ({DESCRIPTION})"


_STATES = {
    "whole": "whole",
    "damaged": "damaged",
    "being received": "not whole: it is being received",
    "arrived": "all of it is here, its receive was interrupted: virtmig receive --recover makes it whole",
    "interrupted": "not whole: its receive was interrupted",
}


def _held(block: BlockReport) -> str:
    return "not there" if block.held_bytes is None else size_text(block.held_bytes)


def _page_words(block: BlockReport) -> str:
    return f"pages of {size_text(block.page_size_bytes)}" if block.page_size_bytes != 4096 else ""


def _short(value: object) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 200 else f"{text[:200]}..."
