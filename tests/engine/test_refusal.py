"""Why a destination did not take a guest is named, with the way out and the place of the guest; no page kills us."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.engine.test_outgoing import POSTCOPY, arrived, folder_of, multifd, send  # noqa: F401
from tests.support.destination_peer import destination_peer
from tests.support.emulators import dialect
from tests.support.images import own_emulator, recording, waiting
from tests.support.recorder import Emulator
from virtmig.engine.image import Image
from virtmig.engine.manifest import read_manifest
from virtmig.engine.outgoing import Outgoing, SendSettings
from virtmig.engine.refusal import Part, Sent, not_started
from virtmig.engine.transport import Address, Stop
from virtmig.errors import ChannelError, GuestMemoryError, MigrationError
from virtmig.progress import Whereabouts
from virtmig.stream.return_path import Shut
from virtmig.stream.wire import Dialect

FolderOf = Callable[[str], Path]
LAZY: dict[str, Any] = {"postcopy": True}
TWO: dict[str, Any] = {"multifd_channels": 2}
COMPAT = pytest.mark.compat


@pytest.mark.parametrize(
    ("capabilities", "channels", "changed", "settings", "says"),
    [
        ((), 0, ("-m", "128M"), {}, "the guest has pc.ram 64"),
        ((), 0, ("-m", "128M"), LAZY, "set its postcopy-ram before"),
        pytest.param(("postcopy-ram",), 0, ("-m", "128M"), LAZY, "start that QEMU with the same -m", marks=COMPAT),
        ((), 0, ("-M", "q35"), {}, "its machine type must be pc-i440fx"),
        (("multifd",), 2, (), {}, "if its multifd is on it waits for the channels"),
        pytest.param(("multifd",), 3, (), TWO, "with multifd-channels 2 as --parallel-connections", marks=COMPAT),
        (("multifd",), 1, (), TWO, "with multifd-channels 2 as --parallel-connections"),
        ((), 0, (), TWO, "its multifd must be on"),
        (("multifd",), 2, (), {**TWO, "compression": "zlib"}, "multifd-compression must be zlib"),
        (("postcopy-ram",), 0, (), {"recover": True}, "is it the QEMU that was paused"),
    ],
    ids=["memory", "no postcopy-ram", "memory postcopy", "machine", "multifd on", "fewer channels", "more channels",
         "multifd off", "compression", "recover into a fresh one"],
)  # fmt: skip
def test_another_set_up_than_the_guests_is_named(
    capabilities: tuple[str, ...], channels: int, changed: tuple[str, ...], settings: dict[str, Any], says: str,
    emulator: Emulator, folder_of: FolderOf,  # noqa: F811
) -> None:  # fmt: skip
    name = f"{emulator.version_name}-plain"
    parameters = {"multifd_channels": channels} if channels else {}
    with waiting(emulator, recording(name), *capabilities, changed=changed, **parameters) as waits:
        silent = channels > settings.get("multifd_channels", 0)  # it waits for more channels
        with pytest.raises(MigrationError) as failure:
            send(folder_of(name), waits.address, destination=dialect(emulator), stall_s=1 if silent else 20, **settings)
        assert says in failure.value.hint, (failure.value.message, failure.value.hint)
        recovering = "recover" in settings
        assert failure.value.guest is (Whereabouts.SPLIT if recovering else Whereabouts.SOURCE)
        assert ("stays as it was: split" if recovering else "has not started there") in failure.value.message
        assert not any(event["event"] == "RESUME" for event in waits.qemu.qmp.events)


def test_nobody_waits_for_a_recovery(folder_of: FolderOf) -> None:  # noqa: F811
    with pytest.raises(ChannelError) as failure:
        send(folder_of("7.2-plain"), Address("127.0.0.1", 9), recover=True)
    assert failure.value.guest is Whereabouts.SPLIT
    assert "migrate-recover" in failure.value.hint


@pytest.mark.parametrize(
    ("end", "guest", "message", "hint"),
    [
        (None, Whereabouts.UNKNOWN, "whether it runs there is unknown", "query-status says"),
        (Shut(1), Whereabouts.SOURCE, "has not started there", "can be sent again"),
    ],
)
def test_the_end_of_a_precopy(
    end: Shut | None,
    guest: Whereabouts,
    message: str,
    hint: str,
    folder_of: FolderOf,  # noqa: F811
) -> None:
    with destination_peer(end=end) as (peer, address):
        with pytest.raises(ChannelError) as failure:
            send(folder_of("7.2-plain"), address, stall_s=1)
        assert peer.ended.is_set()
    assert failure.value.guest is guest
    assert message in failure.value.message
    assert hint in failure.value.hint


@pytest.mark.parametrize(
    ("answers", "settings", "says"),
    [
        (0, {}, "does not begin with the stream"),
        (1, {"postcopy": True}, "it takes no postcopy"),
        (1, {}, "not laid out as the guest's"),
        (2, {"postcopy": True}, "not laid out as the guest's"),
    ],
)
def test_the_part_without_an_answer_is_what_was_refused(
    answers: int,
    settings: dict[str, Any],
    says: str,
    folder_of: FolderOf,  # noqa: F811
) -> None:
    with destination_peer(answers=answers) as (peer, address):
        with pytest.raises(ChannelError, match=says) as failure:
            send(folder_of("7.2-plain"), address, stall_s=0.5, **settings)
        assert not peer.ran.is_set()
    assert failure.value.guest is Whereabouts.SOURCE


@pytest.mark.parametrize("part", [Part.CHANNELS, Part.BLOCKS, Part.PAGES])
def test_channels_too_many_may_be_noticed_late(part: Part, folder_of: FolderOf) -> None:  # noqa: F811
    """A busy QEMU answers a PING before it looks at a connection that waits."""
    folder = folder_of("7.2-plain")
    error = ChannelError("multifd 1: writing: Connection reset by peer")
    not_started(error, Sent(read_manifest(folder), folder, Address.parse("tcp:127.0.0.1:1"), SendSettings(**TWO)), part)
    assert "with multifd-channels 2 as --parallel-connections" in error.hint
    assert error.guest is Whereabouts.SOURCE


# -- the image's files -------------------------------------------------------------------------------------------------


@pytest.fixture
def image(folder_of: FolderOf, tmp_path: Path) -> Path:  # noqa: F811
    copy = tmp_path / "image"
    subprocess.run(["cp", "-a", "--sparse=always", folder_of("7.2-plain"), copy], check=True)
    return copy


@pytest.mark.parametrize("stage", ["connecting", "pages"])
@pytest.mark.parametrize(
    "settings",
    [{}, TWO, {**TWO, "compression": "zstd"}, LAZY],
    ids=["precopy", "multifd", "compressed", "postcopy"],
)
def test_a_file_that_is_cut_off_is_an_error_and_no_signal(settings: dict[str, Any], stage: str, image: Path) -> None:
    """Nor is what was behind its end sent as zero."""

    def cut(report: Any) -> None:
        if report.stage == stage:
            os.truncate(image / "ram-0", 1 << 16)

    with (
        destination_peer(accepts=settings.get("multifd_channels", 0)) as (peer, address),
        pytest.raises(GuestMemoryError, match=r"RAM block 'pc.ram' cannot be sent: it ends at 0x") as failure,
    ):
        # a background so slow that it goes on after the first report of pages
        send(image, address, progress=cut, destination=Dialect.QEMU_11_1, bandwidth_bytes_per_s=2_000_000, **settings)
    assert not peer.ended.is_set()
    split = "postcopy" in settings and stage == "pages"
    assert failure.value.guest is (Whereabouts.SPLIT if split else Whereabouts.SOURCE)


def test_a_postcopy_is_recovered_when_the_file_is_back(image: Path) -> None:
    whole = (image / "ram-0").read_bytes()

    def cut(report: Any) -> None:
        if report.guest_runs:
            os.truncate(image / "ram-0", 1 << 20)

    emulator = own_emulator()
    told = dialect(emulator)
    if emulator.version_name != "7.2":
        pytest.skip("the image is of 7.2")
    with waiting(emulator, recording("7.2-plain"), *POSTCOPY[0]) as waits:
        with pytest.raises(GuestMemoryError):
            send(image, waits.address, progress=cut, destination=told, bandwidth_bytes_per_s=2_000_000, postcopy=True)
        (image / "ram-0").write_bytes(whole)
        send(image, waits.recover(), destination=told, recover=True)
        arrived(waits)


# -- machine types that do not say which QEMU they are of --------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "each"),
    [("pc-i440fx-7.2", True), ("pc-q35-8.1", False), ("isapc", False), ("pc-q35-rhel9.4.0", None), ("pc-noble", None)],
)
def test_which_rule_of_syncs(machine: str, each: bool | None, folder_of: FolderOf) -> None:  # noqa: F811
    with Image(folder_of("7.2-plain")) as image:
        image.manifest = msgspec.structs.replace(image.manifest, machine=machine)
        stop, address = Stop(), Address("127.0.0.1", 9)
        new = Outgoing(image, address, SendSettings(multifd_channels=2, destination=Dialect.QEMU_10_0), stop, None)
        old = Outgoing(image, address, SendSettings(multifd_channels=2, destination=Dialect.QEMU_7_2), stop, None)
        assert new._sync_each_section() is each
        assert old._sync_each_section() is True
        del new, old


@pytest.mark.compat
@pytest.mark.parametrize("method", ["none", "zstd"])
@pytest.mark.parametrize("name", ["own", "7.2-plain"])
def test_multifd_with_either_rule_of_syncs(
    name: str,
    method: str,
    emulator: Emulator,
    folder_of: FolderOf,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With its own newest machine type a QEMU counts MULTIFD_FLUSH, with that of 7.2 each section."""
    if dialect(emulator) is Dialect.QEMU_7_2:
        pytest.skip("7.2 has one rule only, and does not know MULTIFD_FLUSH")
    monkeypatch.setattr(Outgoing, "_sync_each_section", lambda self: None)
    name = f"{emulator.version_name}-plain" if name == "own" else name
    capabilities, parameters, settings = multifd(4, method)
    with waiting(emulator, recording(name), *capabilities, **parameters) as waits:
        send(folder_of(name), waits.address, destination=dialect(emulator), **settings)
        arrived(waits)


@pytest.mark.parametrize("lazy", [False, pytest.param(True, marks=COMPAT)], ids=["precopy", "postcopy"])
def test_sections_around_the_start_of_ram_keep_their_place(
    lazy: bool,
    emulator: Emulator,
    folder_of: FolderOf,  # noqa: F811
    tmp_path: Path,
) -> None:
    name = f"{emulator.version_name}-plain"
    copy = tmp_path / "image"
    subprocess.run(["cp", "-a", "--sparse=always", folder_of(name), copy], check=True)
    manifest = msgspec.json.decode((copy / "manifest.json").read_bytes())
    manifest |= {"sections_before_ram": 1, "sections_before_switch": 1}
    (copy / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    with waiting(emulator, recording(name), *(POSTCOPY[0] if lazy else ())) as waits:
        send(copy, waits.address, destination=dialect(emulator), postcopy=lazy)
        arrived(waits)
