"""What was sent of an image, where to, and how it ended: an image is one guest, and two of it must not run unseen.

    FOLDER/sent.json     every sending: address, when, how, its state
           manifest.json is locked (flock(2)) while somebody sends

A sending is written before anything is connected, and again, on the disk, before the first byte that lets the
destination run the guest. Whoever is killed after that leaves "sending" behind, which says: it may run there.

    starting -> sending -> completed
                        -> split -> sending -> ...      postcopy: recovered by --recover
                        -> unknown                      all was sent, nobody answered
             -> failed-before-run

A checkpoint whose source was resumed is a copy from the start: nothing here knows of that guest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal

import msgspec

from virtmig.engine.interrupted import moment_text
from virtmig.engine.manifest import MANIFEST, open_file, read_file
from virtmig.engine.send_settings import SendSettings
from virtmig.errors import ImageError, MigrationError
from virtmig.progress import Whereabouts
from virtmig.stream.wire import Dialect

SENT = "sent.json"
FORMAT = "virtmig-sent"
_LIMIT_BYTES = 1 << 20
#: older sendings that are over are forgotten first
_MOST_SENDINGS = 256

Mode = Literal["precopy", "postcopy"]
State = Literal["starting", "sending", "completed", "split", "unknown", "failed-before-run"]
#: the guest may be where it was sent
_MAY_RUN: tuple[State, ...] = ("sending", "completed", "split", "unknown")

_AGAIN = (
    "--again sends it all the same: a second copy of one guest, with its addresses and on its disks; only when the "
    "first has ended, or has disks and a network of its own. The guest that a checkpoint was taken from is such a copy "
    "too when it was resumed: nothing is known of it here"
)
_NO_RECORD = "--again sends it without a record; or copy the image to a place that can be written"


class Sending(msgspec.Struct):
    """One sending. Times in seconds of the epoch: `began`, the last change of `state`, and since when `pid` is at it.

    `qemu` (its Dialect) and `preempt` are facts of the destination, once the guest runs there: a recovery without the
    preempt channel that it has, or over one that it opens at another time, would wedge or crash it. `words`: how it
    failed.
    """

    id: str
    address: str
    mode: Mode
    state: State
    began: float
    changed: float
    since: float
    pid: int
    host: str
    qemu: Dialect
    preempt: bool
    words: str = ""
    recoveries: int = 0

    def __str__(self) -> str:
        return f"to {self.address} at {moment_text(self.began)} ({self.mode}, {self.state})"


class _Record(msgspec.Struct):
    format: str = FORMAT
    version: int = 1
    sendings: list[Sending] = []


def _begin(address: str, settings: SendSettings) -> Sending:
    now = time.time()
    mode: Mode = "postcopy" if settings.postcopy or settings.recover else "precopy"
    return Sending(
        uuid.uuid4().hex, address, mode, "split" if settings.recover else "starting", now, now, now, os.getpid(),
        os.uname().nodename, settings.destination, settings.preempt,
    )  # fmt: skip


def sendings(folder: Path) -> tuple[Sending, ...]:
    """All that is known, the oldest first. Raises ImageError when the record cannot be read."""
    return tuple(_read(folder).sendings)


class SentImage:
    """The right to send an image, and the record of it: `with` it, and call `may_run` before the guest can run.

    What it ended with is seen from the exception. `warn` is told what could not be written after that point: the guest
    is more important than its record.
    """

    def __init__(
        self,
        folder: Path,
        address: str,
        settings: SendSettings,
        *,
        again: bool = False,
        warn: Callable[[str], None] = lambda words: None,
    ) -> None:
        """Raises ImageError: somebody sends it now, it may run elsewhere, or there is nothing to recover."""
        self._folder = folder
        self._warn = warn
        self._lock = _lock(folder)
        try:
            self._record = _read(folder, again=again)
            self._recorded, self._may_run, self._recovering = True, False, settings.recover
            new = _begin(address, settings)
            self.sending = self._recovered(new, again) if settings.recover else self._new(new, again)
            if not settings.recover:
                self._write_or_refuse("starting", without=again)
        except BaseException:
            os.close(self._lock)
            raise

    def settings(self, asked: SendSettings) -> SendSettings:
        """What a recovery must do alike, as the first sending did."""
        sending = self.sending
        return msgspec.structs.replace(asked, destination=sending.qemu, preempt=sending.preempt)

    def __enter__(self) -> SentImage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._ended(error)
        finally:
            os.close(self._lock)

    def may_run(self) -> None:
        """The destination can run the guest from what is sent next. Raises ImageError: nothing must be sent then."""
        if self._recovering:
            self._note("sending", "")
        elif self._recorded:
            self._write_or_refuse("sending", without=False)
        self._may_run = True

    def _ended(self, error: BaseException | None) -> None:
        if error is None:
            self._note("completed", "")
        elif not isinstance(error, MigrationError):
            return  # a defect of ours: what stands there says that nobody knows
        elif error.guest is Whereabouts.SOURCE or not self._may_run:
            if not self._recovering:
                self._note("failed-before-run", error.message)
        elif error.guest is Whereabouts.SPLIT:
            self._note("split", error.message)
        elif error.guest is Whereabouts.UNKNOWN:
            self._note("unknown", error.message)

    # -- who may ---------------------------------------------------------------------------------------------------

    def _new(self, sending: Sending, again: bool) -> Sending:
        found = [each for each in self._record.sendings if each.state in _MAY_RUN]
        if found and not again:
            last = found[-1]
            guest = {"completed": Whereabouts.DESTINATION, "split": Whereabouts.SPLIT}.get(last.state)
            way = [_AGAIN]
            if last.mode == "postcopy" and last.state != "completed":
                way.insert(0, f"'virtmig send --recover {self._folder} ADDRESS' goes on with it")
            more = f", and {len(found) - 1} times before" if len(found) > 1 else ""
            raise ImageError(
                f"the guest of '{self._folder}' may run elsewhere: it was sent {last}{more}",
                hint="\n".join(way),
                guest=guest or Whereabouts.UNKNOWN,
            )
        self._record.sendings.append(sending)
        over = [each for each in self._record.sendings if each.state not in _MAY_RUN and each is not sending]
        for each in over[: max(0, len(self._record.sendings) - _MOST_SENDINGS)]:
            self._record.sendings.remove(each)
        return sending

    def _recovered(self, new: Sending, again: bool) -> Sending:
        broken = [
            each for each in self._record.sendings if each.mode == "postcopy" and each.state in ("sending", "split")
        ]
        if broken:
            sending = broken[-1]
            sending.address, sending.since, sending.pid, sending.host = new.address, new.since, new.pid, new.host
            sending.recoveries += 1
            return sending
        if not again:
            last = self._record.sendings[-1] if self._record.sendings else None
            known = f"the last sending of it was {last}" if last is not None else "it was never sent from here"
            raise ImageError(
                f"no postcopy of '{self._folder}' was interrupted: {known}",
                hint="recover from the folder that was sent; another guest's pages would destroy the paused one\n"
                "--again takes this image all the same: only when its record was lost, and it is that guest",
            )
        self._record.sendings.append(new)
        return new

    # -- the file --------------------------------------------------------------------------------------------------

    def _write_or_refuse(self, state: State, *, without: bool) -> None:
        """`without`: from a folder that cannot be written it is sent without a record."""
        self.sending.state, self.sending.changed = state, time.time()
        try:
            self._write()
        except OSError as error:
            read_only = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
            if read_only and without:
                self._warn(f"'{self._folder}' cannot be written: that it is sent is not recorded")
                self._recorded = False
                return
            raise ImageError(
                f"'{self._folder / SENT}' cannot be written: {error.strerror}: what is sent is recorded there",
                hint=_NO_RECORD if read_only else "make room, or repair its file system",
            ) from None

    def _note(self, state: State, words: str) -> None:
        self.sending.state, self.sending.changed, self.sending.words = state, time.time(), words
        if not self._recorded:
            return
        try:
            self._write()
        except OSError as error:
            self._warn(f"'{self._folder / SENT}' cannot be written: {error.strerror}: it does not say '{state}'")

    def _write(self) -> None:
        data = msgspec.json.format(msgspec.json.encode(self._record), indent=1) + b"\n"
        new = self._folder / f".{SENT}.new"
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(new, self._folder / SENT)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(folder: Path, *, again: bool = False) -> _Record:
    path = folder / SENT
    if not os.path.lexists(path):
        return _Record()
    try:
        record = msgspec.json.decode(read_file(path, _LIMIT_BYTES, f"'{path}' is damaged"), type=_Record)
        if record.format != FORMAT or record.version != 1:
            raise ImageError(f"'{path}' is damaged: it is no {FORMAT} 1")
    except (msgspec.MsgspecError, RecursionError, ImageError) as error:
        if again:
            return _Record()
        words = str(error) if isinstance(error, ImageError) else f"'{path}' is damaged: {error}"
        raise ImageError(f"{words}: nobody knows whether the guest runs elsewhere", hint=_AGAIN) from None
    return record


def _lock(folder: Path) -> int:
    """The manifest's descriptor, locked: the one file that is there always, and never replaced."""
    path = folder / MANIFEST
    try:
        fd = open_file(path, os.O_RDWR)  # a lock over NFS needs that
    except ImageError:
        fd = open_file(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise ImageError(f"'{path}' cannot be locked: {error.strerror}") from None
        who = "by another process"
        with contextlib.suppress(ImageError, IndexError):
            last = sendings(folder)[-1]
            who = f"by process {last.pid} on {last.host}, to {last.address}, since {moment_text(last.since)}"
        raise ImageError(f"'{folder}' is being sent: {who}", hint="let it finish, or stop it") from None
    return fd
