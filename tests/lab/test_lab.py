"""The lab comes up, carries guests between its hosts by plain virsh, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.lab import GuestFactory
from virtmig.errors import LabError
from virtmig.lab import hosts
from virtmig.lab import lab as lab_module
from virtmig.lab.guest import GuestSettings
from virtmig.lab.lab import FULL, SESSION, Lab, _lock, choose_form, default_folder
from virtmig.lab.link import Shape

WAYS = {
    "direct": ["--live"],
    "p2p": ["--live", "--p2p"],
    "parallel": ["--live", "--parallel", "--parallel-connections", "4"],
    "p2p parallel": ["--live", "--p2p", "--parallel", "--parallel-connections", "4"],
}
POSTCOPY = {
    "postcopy": ["--live", "--postcopy", "--postcopy-after-precopy"],
    "p2p postcopy": ["--live", "--p2p", "--postcopy", "--postcopy-after-precopy"],
}


@pytest.fixture
def place() -> Iterator[Path]:
    """A short folder that does not exist yet."""
    folder = Path(f"/tmp/vml-t{os.getpid()}")
    yield folder
    assert not folder.exists()
    assert not Path(f"{folder}.lock").exists()
    assert not processes_of(folder)


def processes_of(folder: Path) -> list[str]:
    """Command lines and environments that speak of the folder: keepers, session daemons, the wire."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if f"{folder}/".encode() in words and int(process.name) != os.getpid():
            found.append(words.split(b"\0")[0].decode())
    return found


def there_and_back(lab: Lab, guest: GuestFactory, words: list[str]) -> None:
    made = guest(memory_mib=48, dirty_mib_s=8.0, in_lab=lab)
    for source, destination in (lab.hosts, lab.hosts[::-1]):
        before = lab.heartbeat(source, made.name) or 0
        lab.virsh(source, "migrate", *words, made.name, destination.uri)
        assert made.only_on(destination)
        made.check(destination)
        assert (lab.heartbeat(destination, made.name) or 0) > before


@pytest.mark.lab
@pytest.mark.root
@pytest.mark.parametrize("way", [next(iter(WAYS)), *POSTCOPY, *(pytest.param(way, marks=pytest.mark.slow)
                                                                 for way in list(WAYS)[1:])])  # fmt: skip
def test_plain_virsh_in_the_full_form(full_lab: Lab, guest: GuestFactory, way: str) -> None:
    there_and_back(full_lab, guest, {**WAYS, **POSTCOPY}[way])


@pytest.mark.lab
@pytest.mark.parametrize("way", [way if number < 2 else pytest.param(way, marks=pytest.mark.slow)
                                 for number, way in enumerate(WAYS)])  # fmt: skip
def test_plain_virsh_in_the_session_form(session_lab: Lab, guest: GuestFactory, way: str) -> None:
    """No --migrateuri: the hosts say themselves where they are reached."""
    there_and_back(session_lab, guest, WAYS[way])


@pytest.mark.lab
def test_session_form_through_a_unix_socket(session_lab: Lab, guest: GuestFactory) -> None:
    socket = session_lab.b.folder / "run" / "migrate.sock"
    there_words = ["--live", "--p2p", "--migrateuri", f"unix://{socket}"]
    made = guest(in_lab=session_lab)
    session_lab.virsh(session_lab.a, "migrate", *there_words, made.name, session_lab.b.uri)
    assert made.only_on(session_lab.b)
    made.check(session_lab.b)


@pytest.mark.lab
@pytest.mark.root
def test_data_goes_over_the_wire_by_default(full_lab: Lab, guest: GuestFactory) -> None:
    made = guest(memory_mib=32)

    def sent_bytes() -> int:
        # sysfs shows the network namespace it was mounted in: ask the device
        ask = full_lab.a.command(["ip", "-s", "-j", "link", "show", "lab0"])
        return int(json.loads(subprocess.run(ask, capture_output=True, text=True).stdout)[0]["stats64"]["tx"]["bytes"])

    before = sent_bytes()
    full_lab.virsh(full_lab.a, "migrate", "--live", "--p2p", made.name, full_lab.b.uri)
    assert sent_bytes() - before > 28 << 20
    assert made.only_on(full_lab.b)


@pytest.mark.lab
def test_persistent_guest(lab: Lab, guest: GuestFactory) -> None:
    made = guest(memory_mib=16, persistent=True)
    assert made.domain(lab.a).isPersistent()
    assert not guest(memory_mib=16).domain(lab.a).isPersistent()
    assert lab.where(made.name) == {"a": "running (booted)", "b": "absent"}


# -- up and down -----------------------------------------------------------------------------------------------------


@pytest.mark.lab
def test_up_open_down_and_down_again(place: Path) -> None:
    lab = Lab.up(place, user="nobody" if os.getuid() == 0 else "", form=SESSION)
    try:
        with pytest.raises(LabError, match="already up"):
            Lab.up(place)
        again = Lab.opened(place)
        again.start_guest(GuestSettings(name="one", memory_mib=16))
        assert again.where("one")["a"] == "running (booted)"
        assert Lab.opened(place).guest("one").memory_mib == 16
        with pytest.raises(LabError, match="no guest two"):
            again.guest("two")
        again.remove_guest("one")
        again.remove_guest("one")
        assert again.where("one") == {"a": "absent", "b": "absent"}
        again.start_guest(GuestSettings(name="left", memory_mib=16))
    finally:
        Lab.opened(place).down()
    lab.down()
    with pytest.raises(LabError, match="no lab is up"):
        Lab.opened(place)


@pytest.mark.lab
def test_daemon_that_does_not_start_is_reported_with_its_log_and_nothing_stays(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = hosts._conf
    monkeypatch.setattr(hosts, "_conf", lambda settings: plain(settings) + "max_queued = no such thing\n")
    with pytest.raises(LabError, match=r"ended at once: .*expecting a value"):
        Lab.up(place, user="nobody" if os.getuid() == 0 else "", form=SESSION)


@pytest.mark.lab
@pytest.mark.root
def test_wire_that_cannot_be_laid_leaves_nothing(full_lab: Lab, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise LabError("no wire")

    monkeypatch.setattr(lab_module.Link, "connect", refuse)
    with pytest.raises(LabError, match="no wire"):
        Lab.up(place, form=FULL)


def test_second_up_at_the_same_time_is_told(place: Path) -> None:
    with _lock(place), pytest.raises(LabError, match="another command is busy"), _lock(place):
        pass


def test_lock_is_held_by_one_at_a_time(place: Path) -> None:
    owner = threading.Lock()

    def take() -> int:
        taken = 0
        for _ in range(300):
            with contextlib.suppress(LabError), _lock(place):  # LabError: another one has it
                assert owner.acquire(blocking=False), "two owners at once"
                owner.release()
                taken += 1
        return taken

    with ThreadPoolExecutor(4) as pool:
        assert sum(future.result() for future in [pool.submit(take) for _ in range(4)]) > 0


def test_lock_that_is_a_link_is_not_followed(place: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = Path(f"{place}.lock")
    lock.symlink_to(victim)
    try:
        with pytest.raises(LabError, match="cannot lock"), _lock(place):
            pass
    finally:
        lock.unlink()
    assert victim.read_text() == "precious"


@pytest.mark.lab
@pytest.mark.root
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_folder_of_somebody_else_is_refused(full_lab: Lab, place: Path, tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        place.mkdir()
        os.chown(place, 65534, 65534)
    else:
        place.symlink_to(tmp_path)
    try:
        with pytest.raises(LabError, match="belongs to somebody else"):
            Lab.up(place, form=FULL)
    finally:
        place.unlink() if place.is_symlink() else place.rmdir()


@pytest.mark.lab
def test_long_folder_is_refused_with_the_reason(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="108 bytes"):
        Lab.up(tmp_path / ("x" * 60))


@pytest.mark.lab
def test_session_form_has_no_link_to_shape(lab: Lab, place: Path) -> None:
    with pytest.raises(LabError, match="full form"):
        Lab.up(place, form=SESSION, shape=Shape(delay_ms=1))


def test_forms() -> None:
    assert choose_form("auto") == (FULL if os.getuid() == 0 else SESSION)
    assert choose_form(SESSION) == SESSION
    with pytest.raises(LabError, match="no form"):
        choose_form("half")


def test_damaged_state_file(tmp_path: Path) -> None:
    (tmp_path / "lab.json").write_text("{")
    with pytest.raises(LabError, match="damaged"):
        Lab.opened(tmp_path)


def test_default_folder() -> None:
    assert default_folder() == Path(f"/tmp/vmlab-{os.getuid()}")
    assert default_folder("x") == Path(f"/tmp/vmlab-{os.getuid()}-x")
