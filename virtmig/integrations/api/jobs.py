"""A migration that the API starts: a ticket on the disk first, then `virtmig migrate` in a process of its own.

The ticket holds the idempotency key's digest and the request; it is on the disk before the process is made, and the
process writes its number into the ticket's .pid file before it becomes virtmig (a line of /bin/sh). Whoever finds a
ticket without a number and without a lock therefore knows that nothing was started. The lock is on the open .log file,
which the process inherits: it is held as long as the process lives, whatever becomes of the API. A shell waits for it
and writes its exit status into the .rc file: where a record stops early, that tells whether the process was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from virtmig.errors import MigrationError
from virtmig.report.records import RECORD_ID
from virtmig.request import MigrationRequest

VERSION = 1
#: tickets kept after their migrations have ended; as many as there are records
KEPT_TICKETS = 500
#: of what a process said on standard error
_SAID_LONGEST_BYTES = 8192

#: $0 is the ticket's path without its end; the inner shell keeps its number when it becomes virtmig
_SCRIPT = """trap : TERM INT HUP
sh -c 'echo $$ > "$0.pid" && exec "$@"' "$0" "$@"
echo $? > "$0.rc"
"""


class KeyConflict(MigrationError):
    """The idempotency key was used for another request."""


class NotKept(MigrationError):
    """No ticket can be written: nothing was started."""


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of the API. `key` and `body` are digests; `of` is the migration that this one recovers."""

    id: str
    time: float
    request: dict[str, Any]
    source_uri: str = ""
    key: str = ""
    body: str = ""
    of: str = ""
    version: int = VERSION


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A ticket and what became of its process. `said`: its last words on standard error.

    `exit_code`: as the shell gives it, 128 and more for a signal; None: it runs, or the shell was killed too.
    """

    ticket: Ticket
    pid: int
    running: bool
    said: str = ""
    exit_code: int | None = None


class Jobs:
    """The tickets beside the records in `folder`; more than one API may share it."""

    def __init__(self, folder: Path, *, command: tuple[str, ...] = (sys.executable, "-m", "virtmig.cli.main")) -> None:
        self.records = folder
        self.folder = folder / "api"
        self.command = command
        self._thread_lock = threading.Lock()
        self._ended: dict[str, Job] = {}

    # -- starting ---------------------------------------------------------------------------------------------------

    def start(
        self,
        request: MigrationRequest,
        *,
        source_uri: str = "",
        key: str = "",
        body: bytes = b"",
        of: str = "",
        files: Mapping[str, str] | None = None,
    ) -> tuple[Job, bool]:
        """The job of this key, and whether it was started just now. `files`: option -> its content.

        Raises KeyConflict, and NotKept when the disk takes no ticket; then nothing was started.
        """
        try:
            with self._locked():
                found = self._of_key(key, body)
                if found is not None and self._was_started(found):
                    return self._job(found), False
                ticket = found or self._write(request, source_uri, key, body, of, files or {})
                self._spawn(ticket)
                return self._job(ticket), True
        except OSError as error:
            raise NotKept(
                f"{self.folder}: {error.strerror or error}: a migration is only started when its ticket can be kept",
                hint="make room, or make the folder writable for the API's user; nothing was started",
            ) from None

    def known(self, key: str, body: bytes) -> Job | None:
        """The job that was started with this key; raises KeyConflict. For an answer before anything is asked."""
        found = self._of_key(key, body)
        return self._job(found) if found is not None and self._was_started(found) else None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone in this folder, among threads and among processes."""
        self.records.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with self._thread_lock, open(self.folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _of_key(self, key: str, body: bytes) -> Ticket | None:
        if not key:
            return None
        digest = _digest(key.encode())
        for path in self.folder.glob(f"*.{digest}.json"):
            ticket = _read(path)
            if ticket is not None:
                if ticket.body != _digest(body):
                    raise KeyConflict(
                        f"this idempotency key was used for another request, migration {ticket.id}",
                        hint="a new key for a new request; the same request for the same key",
                    )
                return ticket
        return None

    def _write(
        self, request: MigrationRequest, source_uri: str, key: str, body: bytes, of: str, files: Mapping[str, str]
    ) -> Ticket:
        now = time.time()
        ticket_id = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now)) + f"-{secrets.token_hex(3)}"
        values = {name: request[name] for name in request}
        for name, content in files.items():
            path = self.folder / f"{ticket_id}.{name}.xml"
            _write_whole(path, content.encode())
            values[name] = str(path)
        ticket = Ticket(
            id=ticket_id,
            time=now,
            request=values,
            source_uri=source_uri,
            key=_digest(key.encode()) if key else "",
            body=_digest(body) if key else "",
            of=of,
        )
        _write_whole(self.folder / f"{ticket_id}.{ticket.key or 'none'}.json", msgspec.json.encode(ticket))
        self._forget_old()
        return ticket

    def _spawn(self, ticket: Ticket) -> None:
        request = MigrationRequest(ticket.request)
        words = shlex.split(request.replace(quiet=True).virtmig_line(ticket.source_uri))[1:]
        (self.folder / f"{ticket.id}.rc").unlink(missing_ok=True)
        log = os.open(self._log(ticket.id), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(log, fcntl.LOCK_EX)  # a look at it by `_is_locked` is over at once
            process = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT, str(self.folder / ticket.id), *self.command, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**os.environ, "VIRTMIG_RECORDS": str(self.records), RECORD_ID: ticket.id},
                start_new_session=True,
                umask=0o077,
            )
        finally:
            os.close(log)
        threading.Thread(target=process.wait, name=f"wait-{process.pid}", daemon=True).start()

    # -- looking ----------------------------------------------------------------------------------------------------

    def all(self) -> list[Job]:
        """The newest first."""
        paths = sorted(self.folder.glob("*.json"), reverse=True)
        return [job for path in paths if (job := self._job_of(path)) is not None]

    def now(self, job: Job) -> Job:
        """The same one as it is now."""
        return self._job(job.ticket) if job.running or not job.pid else job

    def _job_of(self, path: Path) -> Job | None:
        known = self._ended.get(path.name)
        if known is not None:
            return known
        ticket = _read(path)
        if ticket is None:
            return None
        job = self._job(ticket)
        if job.pid and not job.running:
            self._ended[path.name] = job
        return job

    def _job(self, ticket: Ticket) -> Job:
        running = self._is_locked(ticket.id)
        pid = self._pid(ticket.id)
        if running:
            return Job(ticket=ticket, pid=pid, running=True)
        return Job(ticket=ticket, pid=pid, running=False, said=self._said(ticket.id),
                   exit_code=self.exit_code(ticket.id))  # fmt: skip

    def exit_code(self, ticket_id: str) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / f"{ticket_id}.rc").read_text())
        return None

    def ask_to_stop(self, job: Job) -> bool:
        """SIGTERM, before there is anything to abort; the process ends safely by itself. False: it has ended."""
        pid_fd = -1
        try:
            pid_fd = os.pidfd_open(job.pid)
            # looked at after the process is held: its number cannot have gone to another one in between
            if not self._is_locked(job.ticket.id) or self._pid(job.ticket.id) != job.pid:
                return False
            signal.pidfd_send_signal(pid_fd, signal.SIGTERM)
            return True
        except OSError:
            return False
        finally:
            if pid_fd >= 0:
                os.close(pid_fd)

    def _was_started(self, ticket: Ticket) -> bool:
        return bool(self._pid(ticket.id)) or self._is_locked(ticket.id)

    def _pid(self, ticket_id: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / f"{ticket_id}.pid").read_text())
        return 0

    def _log(self, ticket_id: str) -> Path:
        return self.folder / f"{ticket_id}.log"

    def _is_locked(self, ticket_id: str) -> bool:
        try:
            with open(self._log(ticket_id), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True

    def _said(self, ticket_id: str) -> str:
        try:
            with open(self._log(ticket_id), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _SAID_LONGEST_BYTES))
                return file.read().decode("utf-8", "replace").strip()
        except OSError:
            return ""

    def _forget_old(self) -> None:
        """The oldest beyond KEPT_TICKETS whose processes have ended."""
        paths = sorted(self.folder.glob("*.json"), reverse=True)
        for path in paths[KEPT_TICKETS:]:
            ticket_id = path.name.partition(".")[0]
            if not self._is_locked(ticket_id):
                self._ended.pop(path.name, None)
                for each in self.folder.glob(f"{ticket_id}.*"):
                    each.unlink(missing_ok=True)


def _read(path: Path) -> Ticket | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Ticket)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:40]


def _write_whole(path: Path, data: bytes) -> None:
    """On the disk under its name, or not at all. Raises OSError."""
    part = path.with_name(f".{path.name}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(part, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
