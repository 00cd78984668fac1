"""What a receive keeps beside its place until it is whole, who works on it, and which one a person means.

    .NAME.ID.incoming/lock           held by flock(2), with the pid, the host and since when
                      incoming.json  a postcopy: the device state is safe, the source has the rest of the memory
                      arrived.json   all of it is here: the source is not needed any more

NAME is the folder that was asked for. A folder without any of these two is of a precopy that was killed: its guest
never left the source, and nothing needs it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from virtmig.engine.manifest import Manifest, decode_manifest, open_file
from virtmig.errors import ImageError

LOCK = "lock"
PARTIAL = "incoming.json"
ARRIVED = "arrived.json"
_FOLDER = re.compile(r"\.(?P<name>.+)\.(?P<id>[^.]+)\.incoming", re.DOTALL)
_LOCK_LIMIT_BYTES = 4096
#: a look at the lock takes it for a moment
_LOCK_TRIES, _LOCK_PAUSE_S = 5, 0.02


class Holder(msgspec.Struct, frozen=True):
    """The process that receives into a folder. `since` in seconds of the epoch."""

    pid: int
    host: str
    since: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


_NOBODY_KNOWS = Holder(0, "an unknown host", 0.0)


@dataclass(frozen=True, slots=True)
class Interrupted:
    """One folder. `manifest` None: there is nothing to go on with. `damage`: why what is there cannot be read."""

    folder: Path
    manifest: Manifest | None
    arrived: bool
    holder: Holder | None
    damage: str
    since: float

    @property
    def identity(self) -> str:
        match = _FOLDER.fullmatch(self.folder.name)
        return match["id"] if match is not None else self.folder.name


def folder_name(name: str, identity: str) -> str:
    return f".{name}.{identity}.incoming"


def place_of(asked: Path) -> tuple[Path, Path | None]:
    """The place that a path means, and the interrupted folder when it names that one itself."""
    match = _FOLDER.fullmatch(asked.name)
    if match is None:
        return asked.absolute(), None
    return asked.absolute().with_name(match["name"]), asked.absolute()


def interrupted(place: Path) -> list[Interrupted]:
    """What is beside `place` and was on its way there, the oldest first. Also what another process works on now."""
    beside = place.absolute().parent
    found = []
    with contextlib.suppress(OSError):
        for folder in beside.iterdir():
            match = _FOLDER.fullmatch(folder.name)
            if match is not None and match["name"] == place.name and folder.is_dir():
                found.append(look(folder))
    return sorted(found, key=lambda each: (each.since, each.folder.name))


def look(folder: Path) -> Interrupted:
    """One such folder as it is now."""
    manifest, damage, since = None, "", 0.0
    arrived = (folder / ARRIVED).exists()
    with contextlib.suppress(OSError):
        since = folder.stat().st_mtime
    path = folder / (ARRIVED if arrived else PARTIAL)
    if os.path.lexists(path):
        try:
            manifest = decode_manifest(path)
        except ImageError as error:
            damage = str(error)
    return Interrupted(folder, manifest, arrived, _holder(folder / LOCK), damage, since)


def _holder(path: Path) -> Holder | None:
    try:
        fd = open_file(path)
    except ImageError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _written(fd)
    except OSError:
        return None
    finally:
        os.close(fd)


def _written(fd: int) -> Holder:
    try:
        return msgspec.json.decode(os.pread(fd, _LOCK_LIMIT_BYTES, 0), type=Holder)
    except (OSError, msgspec.MsgspecError):
        return _NOBODY_KNOWS


def hold(folder: Path) -> int:
    """The lock of a folder, as a descriptor that keeps it. Raises ImageError that names who has it, since when."""
    path = folder / LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise ImageError(f"'{path}': {error.strerror}") from None
    try:
        for left in reversed(range(_LOCK_TRIES)):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise held(folder, _written(fd)) from None
                time.sleep(_LOCK_PAUSE_S)
        if not os.path.exists(path) or os.stat(path).st_ino != os.fstat(fd).st_ino:
            raise ImageError(f"'{folder}' is not there any more: another process has just finished it")
        os.ftruncate(fd, 0)
        os.pwrite(fd, msgspec.json.encode(Holder(os.getpid(), os.uname().nodename, time.time())), 0)
    except (OSError, ImageError) as error:
        os.close(fd)
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"'{path}' cannot be locked: {error.strerror}") from None
    return fd


def held(folder: Path, holder: Holder) -> ImageError:
    return ImageError(
        f"{holder} receives into '{folder}' since {moment_text(holder.since)}",
        hint="let it finish, or stop it; or name another folder",
    )


def moment_text(seconds: float) -> str:
    """A time of this host's clock, for a person."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def choose(asked: Path) -> Interrupted:
    """The one that can be gone on with. Raises ImageError when there is none, several, or when somebody works on it."""
    place, named = place_of(asked)
    there = interrupted(place)
    found = [each for each in there if each.manifest is not None and named in (None, each.folder)]
    free = [each for each in found if each.holder is None]
    if len(free) == 1:
        return free[0]
    if not found:
        damaged = next((each for each in there if each.damage and named in (None, each.folder)), None)
        if damaged is not None:
            raise ImageError(damaged.damage)
        raise ImageError(
            f"no interrupted postcopies into '{place}'",
            hint="the folder that was given to `virtmig receive` when it was interrupted",
        )
    if not free:
        raise held(found[0].folder, found[0].holder or _NOBODY_KNOWS)
    listed = [f"  {each.identity}  {words(each)}" for each in free]
    folders = [f"  --into '{each.folder}'" for each in free]
    raise ImageError(
        "\n".join([f"{len(free)} interrupted postcopies into '{place}':", *listed]),
        hint="\n".join(["name the folder of the one that is meant:", *folders]),
    )


def words(each: Interrupted) -> str:
    """What it is, in a few words: machine, RAM, when, and what it lacks."""
    manifest = each.manifest
    if manifest is None:
        return f"{moment_text(each.since)}, {each.damage or 'nothing that can be gone on with'}"
    lacks = "all of it is here" if each.arrived else "its source has the rest"
    return (
        f"{manifest.machine or 'no machine type'}, {manifest.ram_bytes >> 20} MiB of RAM, "
        f"{moment_text(each.since)}, {lacks}"
    )
