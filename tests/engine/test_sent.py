"""One image is one guest: what was sent where is on the disk before it can run, and decides what may be sent next."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.engine.test_outgoing import folder_of  # noqa: F401
from tests.support.destination_peer import destination_peer
from virtmig.engine.image import Image
from virtmig.engine.manifest import MANIFEST
from virtmig.engine.outgoing import SendSettings, send_image
from virtmig.engine.sent import SENT, SentImage, sendings
from virtmig.engine.transport import Stop
from virtmig.errors import ChannelError, ImageError, MigrationError
from virtmig.progress import Whereabouts
from virtmig.stream.return_path import Shut
from virtmig.stream.wire import Dialect

PRECOPY = SendSettings(stall_s=20)
POSTCOPY = SendSettings(postcopy=True, preempt=True, destination=Dialect.QEMU_7_2, stall_s=20)
RECOVER = SendSettings(recover=True)
THERE = "tcp:host-b:4444"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / MANIFEST).write_bytes(b"{}")
    return tmp_path


def states(folder: Path) -> list[str]:
    return [each.state for each in sendings(folder)]


def send(folder: Path, settings: SendSettings, error: BaseException | None = None, *, again: bool = False) -> None:
    with SentImage(folder, THERE, settings, again=again) as sent:
        sent.may_run()
        if error is not None:
            raise error


def test_what_is_written_when(folder: Path) -> None:
    with SentImage(folder, THERE, PRECOPY) as sent:
        assert states(folder) == ["starting"]
        sent.may_run()
        (written,) = sendings(folder)
        assert (written.state, written.address, written.mode, written.pid) == ("sending", THERE, "precopy", os.getpid())
        assert len(written.id) == 32
    assert states(folder) == ["completed"]
    assert sorted(os.listdir(folder)) == [MANIFEST, SENT]


@pytest.mark.parametrize(
    ("settings", "guest", "state"),
    [
        (PRECOPY, Whereabouts.SOURCE, "failed-before-run"),
        (PRECOPY, Whereabouts.UNKNOWN, "unknown"),
        (POSTCOPY, Whereabouts.SPLIT, "split"),
        (PRECOPY, None, "sending"),
    ],
)
def test_how_it_ended(settings: SendSettings, guest: Whereabouts | None, state: str, folder: Path) -> None:
    error = MigrationError("broken", guest=guest) if guest is not None else KeyboardInterrupt()
    with pytest.raises(type(error)):
        send(folder, settings, error)
    assert states(folder) == [state]


def test_before_it_could_run_it_may_be_sent_again(folder: Path) -> None:
    with pytest.raises(MigrationError), SentImage(folder, THERE, POSTCOPY):
        raise MigrationError("nobody listens", guest=Whereabouts.SOURCE)
    send(folder, POSTCOPY)
    assert states(folder) == ["failed-before-run", "completed"]


@pytest.mark.parametrize(
    ("settings", "error", "guest", "way"),
    [
        (PRECOPY, None, Whereabouts.DESTINATION, "second copy"),
        (PRECOPY, MigrationError("", guest=Whereabouts.UNKNOWN), Whereabouts.UNKNOWN, "second copy"),
        (POSTCOPY, MigrationError("", guest=Whereabouts.SPLIT), Whereabouts.SPLIT, "virtmig send --recover"),
        (POSTCOPY, KeyboardInterrupt(), Whereabouts.UNKNOWN, "virtmig send --recover"),
    ],
)
def test_a_second_copy_is_refused_unless_asked_for(
    settings: SendSettings, error: BaseException | None, guest: Whereabouts, way: str, folder: Path
) -> None:
    try:
        send(folder, settings, error)
    except (MigrationError, KeyboardInterrupt) as raised:
        assert raised is error
    with pytest.raises(ImageError, match=f"may run elsewhere: it was sent to {THERE} at 20") as refused:
        send(folder, PRECOPY)
    assert refused.value.guest is guest
    assert way in refused.value.hint
    assert "--again" in refused.value.hint
    assert len(sendings(folder)) == 1
    send(folder, PRECOPY, again=True)
    assert len(sendings(folder)) == 2


def test_a_recovery_does_as_the_first_sending_did(folder: Path) -> None:
    with pytest.raises(MigrationError):
        send(folder, POSTCOPY, MigrationError("", guest=Whereabouts.SPLIT))
    with SentImage(folder, "tcp:host-b:4445", RECOVER) as sent:
        settings = sent.settings(RECOVER)
        sent.may_run()
    assert settings == SendSettings(recover=True, preempt=True, destination=Dialect.QEMU_7_2)
    (written,) = sendings(folder)
    assert (written.state, written.address, written.recoveries) == ("completed", "tcp:host-b:4445", 1)


def test_a_recovery_that_does_not_begin_stays_possible(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        send(folder, POSTCOPY, KeyboardInterrupt())
    with pytest.raises(MigrationError), SentImage(folder, THERE, RECOVER):
        raise MigrationError("nobody listens", guest=Whereabouts.SPLIT)
    assert states(folder) == ["sending"]
    with pytest.raises(MigrationError):
        send(folder, RECOVER, MigrationError("broken again", guest=Whereabouts.SPLIT))
    assert states(folder) == ["split"]


@pytest.mark.parametrize("before", [None, PRECOPY, POSTCOPY], ids=["nothing", "precopy", "completed"])
def test_nothing_to_recover(before: SendSettings | None, folder: Path) -> None:
    if before is not None:
        send(folder, before)
    with pytest.raises(ImageError, match=r"no postcopy .* was interrupted") as refused:
        send(folder, RECOVER)
    assert "--again" in refused.value.hint
    send(folder, RECOVER, again=True)
    assert states(folder)[-1] == "completed"


def test_two_at_once(folder: Path) -> None:
    with SentImage(folder, THERE, PRECOPY), pytest.raises(ImageError) as refused:
        send(folder, PRECOPY, again=True)
    assert f"is being sent: by process {os.getpid()} on " in refused.value.message
    assert f", to {THERE}, since 20" in refused.value.message


def test_the_lock_is_the_manifests(folder: Path) -> None:
    fd = os.open(folder / MANIFEST, os.O_RDONLY)
    try:
        with SentImage(folder, THERE, PRECOPY), pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"sendings":[{}]}', b'{"format":"x"}', b"[" * 100_000, b"\xff"])
def test_a_damaged_record_says_that_nobody_knows(content: bytes, folder: Path) -> None:
    (folder / SENT).write_bytes(content)
    if content == b"{}":
        content = b'{"version": 2}'
        (folder / SENT).write_bytes(content)
    with pytest.raises(ImageError, match="nobody knows whether the guest runs elsewhere"):
        send(folder, PRECOPY)
    assert (folder / SENT).read_bytes() == content
    send(folder, PRECOPY, again=True)
    assert states(folder) == ["completed"]


def test_the_record_is_bounded(folder: Path) -> None:
    for _ in range(3):
        with pytest.raises(MigrationError), SentImage(folder, THERE, PRECOPY):
            raise MigrationError("", guest=Whereabouts.SOURCE)
    record = msgspec.json.decode((folder / SENT).read_bytes())
    record["sendings"] *= 100
    (folder / SENT).write_bytes(msgspec.json.encode(record))
    send(folder, PRECOPY)
    assert len(sendings(folder)) == 256
    assert states(folder)[-1] == "completed"


@pytest.fixture
def read_only(folder: Path) -> Iterator[Path]:
    """A file system that is mounted read-only."""
    if os.geteuid():
        pytest.skip("only root can mount")
    with pytest.raises(MigrationError):
        send(folder, POSTCOPY, MigrationError("", guest=Whereabouts.SPLIT))
    if subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.root
def test_a_folder_that_cannot_be_written(read_only: Path) -> None:
    with pytest.raises(ImageError, match="may run elsewhere"):
        send(read_only, PRECOPY)
    words: list[str] = []
    with SentImage(read_only, THERE, PRECOPY, again=True, warn=words.append) as sent:
        sent.may_run()
    assert len(words) == 1
    assert "is not recorded" in words[0]
    with SentImage(read_only, THERE, RECOVER, warn=words.append) as sent:  # the guest is more than its record
        sent.may_run()
    assert states(read_only) == ["split"]
    assert "does not say 'completed'" in words[-1]


@pytest.mark.root
def test_a_new_image_that_cannot_be_written(read_only: Path) -> None:
    subprocess.run(["mount", "-o", "remount,bind,rw", read_only], check=True)
    (read_only / SENT).unlink()
    subprocess.run(["mount", "-o", "remount,bind,ro", read_only], check=True)
    with pytest.raises(ImageError, match="Read-only file system: what is sent is recorded there") as refused:
        send(read_only, PRECOPY)
    assert "--again sends it without a record" in refused.value.hint


# -- with a destination ------------------------------------------------------------------------------------------------


@pytest.fixture
def image(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:  # noqa: F811
    copy = tmp_path / "image"
    subprocess.run(["cp", "-a", "--sparse=always", folder_of("7.2-plain"), copy], check=True)
    return copy


@pytest.mark.parametrize("settings", [PRECOPY, SendSettings(postcopy=True, stall_s=20)], ids=["precopy", "postcopy"])
def test_sending_is_on_the_disk_before_the_first_byte_that_lets_it_run(settings: SendSettings, image: Path) -> None:
    seen: list[str] = []

    with destination_peer(end=Shut(0)) as (peer, address):
        with SentImage(image, str(address), settings) as sent, Image(image) as opened:

            def may_run() -> None:
                assert not peer.ran.is_set()
                assert not peer.ended.is_set()
                seen.extend(states(image))
                sent.may_run()
                seen.extend(states(image))

            send_image(opened, address, settings, Stop(), may_run=may_run)
        assert peer.ended.is_set()
    assert seen == ["starting", "sending"]
    assert states(image) == ["completed"]


def test_nothing_runs_when_that_cannot_be_written(image: Path) -> None:
    def full() -> None:
        raise ImageError("no space left")

    with destination_peer() as (peer, address), Image(image) as opened:
        with pytest.raises(ImageError, match="no space left") as failure:
            send_image(opened, address, SendSettings(postcopy=True), Stop(), may_run=full)
        assert failure.value.guest is Whereabouts.SOURCE
    assert not peer.ran.is_set()


def test_a_sender_that_was_killed_may_have_let_it_run(image: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from virtmig.engine.image import Image\n"
        "from virtmig.engine.outgoing import SendSettings, send_image\n"
        "from virtmig.engine.sent import SentImage\n"
        "from virtmig.engine.transport import Address, Stop\n"
        "settings, folder = SendSettings(postcopy=True, bandwidth_bytes_per_s=1000), Path(sys.argv[1])\n"
        "with SentImage(folder, sys.argv[2], settings) as sent, Image(folder) as image:\n"
        "    send_image(image, Address.parse(sys.argv[2]), settings, Stop(), may_run=sent.may_run)\n"
    )
    with destination_peer() as (peer, address):
        with subprocess.Popen([sys.executable, "-c", code, str(image), str(address)]) as process:
            assert peer.ran.wait(20)
            process.kill()
        assert states(image) == ["sending"]
    with pytest.raises(ImageError, match="may run elsewhere"):
        send(image, PRECOPY)
    with pytest.raises(ChannelError), SentImage(image, THERE, RECOVER):
        raise ChannelError("so far it may go", guest=Whereabouts.SPLIT)
