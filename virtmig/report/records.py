"""Records: one JSON line for each thing that happened, in one file a migration; a crash keeps what was.

Folder: $VIRTMIG_RECORDS (empty: none are kept), else /var/lib/virtmig/records of root, ~/.local/state/virtmig/records
of others. A line that cannot be read (the last one after a crash, or one of a newer virtmig) is left out.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from virtmig.agreement import Plan
from virtmig.errors import RequestError
from virtmig.estimate import Estimate
from virtmig.facts import GuestFacts, HostFacts
from virtmig.link.asking import Agreed, Carried, Changed, Exchanged
from virtmig.link.asking import Ended as AgentsEnded
from virtmig.policy import Decision
from virtmig.progress import Outcome, Progress

#: of the format: rows and fields are only ever added
VERSION = 1
#: the environment's variable with the id of the next record, for a process that was started to migrate
RECORD_ID = "VIRTMIG_RECORD_ID"
SUFFIX = ".jsonl"
KEPT_RECORDS = 500
#: of which so many may be refusals, when there are too many: trying in vain must not push out what has happened
KEPT_REFUSALS = 50
KEPT_BYTES = 256 << 20
ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")


#: what is outside is damage: no calendar has such a day, and no migration lasts so long
Time = Annotated[float, msgspec.Meta(ge=0, le=253402300799)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class _Row(msgspec.Struct, frozen=True, kw_only=True, tag_field="row", omit_defaults=True):
    """`at_s`: seconds since the record began."""

    at_s: Seconds = 0.0


class Began(_Row, frozen=True, kw_only=True, omit_defaults=True, tag="began"):
    version: int = VERSION
    id: str
    time: Time  # time.time()
    domain: str
    source: str
    destination: str
    request: dict[str, Any]
    plan: Plan
    source_facts: HostFacts | None = None
    destination_facts: HostFacts | None = None
    guest: GuestFacts | None = None
    changes: tuple[str, ...] = ()  # of the domain XML, with their rules
    estimate: Estimate | None = None  # what was foretold, with --estimate
    pid: int = 0
    boot_id: str = ""  # of the host it ran on: a pid means nothing after a reboot, or elsewhere
    start_ticks: int = 0  # when the process began, in clock ticks since boot: pids are used again


class Sampled(_Row, frozen=True, kw_only=True, omit_defaults=True, tag="sample"):
    progress: Progress
    eta_low_s: float | None = None
    eta_high_s: float | None = None
    converging: bool | None = None


class Decided(_Row, frozen=True, kw_only=True, omit_defaults=True, tag="decision"):
    decision: Decision


class Said(_Row, frozen=True, kw_only=True, omit_defaults=True, tag="message"):
    """What a person was told. With `what`: what somebody else did to the migration, with virsh, the API or a manager.

    `what`: max-downtime (`value` is ms from now on), bandwidth and postcopy-bandwidth (bytes per second, 0: no limit),
    postcopy (no value).
    """

    text: str
    level: str = "info"
    what: str = ""
    value: int | None = None


class Event(_Row, frozen=True, kw_only=True, omit_defaults=True, tag="event"):
    """What libvirt of one host reported: virDomainEventType's name, with its detail."""

    host: str  # source or destination
    what: str
    detail: int = 0


AgentsWord = Exchanged | Agreed | Changed | Carried | AgentsEnded


class Agents(_Row, frozen=True, kw_only=True, omit_defaults=True, tag="agents"):
    """What the source's agent said of itself and of the other one: messages, the agreement, states, the end."""

    said: AgentsWord


class Refused(_Row, frozen=True, kw_only=True, omit_defaults=True, tag="refused"):
    reasons: tuple[tuple[str, str, str], ...]


class Ended(_Row, frozen=True, kw_only=True, omit_defaults=True, tag="ended"):
    outcome: Outcome


Row = Began | Sampled | Decided | Said | Event | Agents | Refused | Ended
_decoder: msgspec.json.Decoder[Row] = msgspec.json.Decoder(Row)
_encoder = msgspec.json.Encoder()


def encode_row(row: Row) -> bytes:
    """One line. None is left out: most fields of a sample are."""
    return _encoder.encode(_without_none(msgspec.to_builtins(row))) + b"\n"


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return value


class Record(msgspec.Struct, frozen=True):
    """A whole record. `ended` is None while it runs, and after a crash."""

    began: Began
    rows: tuple[Row, ...]
    path: Path

    @property
    def id(self) -> str:
        return self.began.id

    @property
    def samples(self) -> list[Sampled]:
        return [row for row in self.rows if isinstance(row, Sampled)]

    @property
    def agreed(self) -> Agreed | None:
        """The last agreement of the agents: each attempt has one."""
        said = [row.said for row in self.rows if isinstance(row, Agents)]
        return next((each for each in reversed(said) if isinstance(each, Agreed)), None)

    @property
    def decisions(self) -> list[Decided]:
        return [row for row in self.rows if isinstance(row, Decided)]

    @property
    def interventions(self) -> list[Said]:
        return [row for row in self.rows if isinstance(row, Said) and row.what]

    @property
    def outcome(self) -> Outcome | None:
        return next((row.outcome for row in reversed(self.rows) if isinstance(row, Ended)), None)

    @property
    def refusals(self) -> tuple[tuple[str, str, str], ...]:
        return next((row.reasons for row in self.rows if isinstance(row, Refused)), ())

    @property
    def sent_bytes(self) -> int | None:
        """By the outcome, which only a completed migration has, else by the last sample."""
        outcome = self.outcome
        if outcome is not None and outcome.processed_bytes:
            return outcome.processed_bytes
        return next(
            (row.progress.processed_bytes for row in reversed(self.samples) if row.progress.processed_bytes), None
        )

    @property
    def status(self) -> str:
        """As list shows it: Outcome's word, refused, running, or broken off."""
        if self.outcome is not None:
            return str(self.outcome.status)
        if self.refusals:
            return "refused"
        return "running" if alive(self.began) else "broken off"


def alive(began: Began) -> bool:
    """Whether the very process that writes this record still runs on this host.

    A record without a boot id is of an older virtmig: its pid is all there is to go by.
    """
    if began.pid <= 0 or (began.boot_id and began.boot_id != boot_id()):
        return False
    ticks = start_ticks(began.pid)
    return ticks is not None and began.start_ticks in (0, ticks)


def boot_id() -> str:
    """Of this host since its last start; "" where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat, clock ticks since boot; None for a process that is not there or has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rfind(b")") + 1 :].split()  # the name may hold blanks and brackets
    return None if len(fields) < 20 or fields[0] in (b"Z", b"X") else int(fields[19])


def records_folder() -> Path | None:
    """None: records are switched off."""
    given = os.environ.get("VIRTMIG_RECORDS")
    if given is not None:
        return Path(given) if given else None
    if os.geteuid() == 0:
        return Path("/var/lib/virtmig/records")
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "virtmig" / "records"


def read_record(path: Path) -> Record | None:
    """None for a file that is no record."""
    rows = list(_rows(path))
    if not rows or not isinstance(rows[0], Began):
        return None
    return Record(rows[0], tuple(rows[1:]), path)


def _rows(path: Path) -> Iterator[Row]:
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    yield _decoder.decode(line)
                except (msgspec.MsgspecError, ValueError, RecursionError):
                    continue
    except OSError:
        return


def all_records(folder: Path | None = None) -> list[Record]:
    """The newest first."""
    where = folder or records_folder()
    found = [read_record(path) for path in _files(where)] if where else []
    return [record for record in found if record is not None]


def find_record(wanted: str, folder: Path | None = None) -> Record:
    """By id, the beginning of one, a domain's name (its newest), or `last`. Raises RequestError with what there is."""
    where = folder or records_folder()
    paths = _files(where) if where else []
    if ID.fullmatch(wanted):
        paths = [path for path in paths if path.stem == wanted]
    if wanted not in ("", "last"):
        beginning = [path.stem for path in paths if path.stem.startswith(wanted)]
        if len(beginning) > 1:
            some = ", ".join(beginning[:4]) + (", ..." if len(beginning) > 4 else "")
            words = f"{len(beginning)} records begin with '{wanted}': {some}"
            raise RequestError(words, option="id", hint="say more of it")
    for path in paths:
        record = read_record(path)
        if record is not None and (wanted == "last" or record.id.startswith(wanted) or wanted == record.began.domain):
            return record
    if where is None:
        raise RequestError("no records are kept: $VIRTMIG_RECORDS is empty", option="id", hint="unset it")
    raise RequestError(f"no record of a migration is called '{wanted}'", option="id", hint="virtmig list")


def _files(folder: Path) -> list[Path]:
    try:
        return sorted((path for path in folder.glob(f"*{SUFFIX}") if ID.fullmatch(path.stem)), reverse=True)
    except OSError:
        return []


def forget_old(folder: Path) -> None:
    """Remove the oldest beyond KEPT_RECORDS and KEPT_BYTES, and refusals first.

    Others may do the same at the same time: a file that is gone or not ours to remove is passed over.
    """
    sizes: dict[Path, int] = {}
    for path in _files(folder):
        with contextlib.suppress(OSError):
            sizes[path] = path.lstat().st_size
    if len(sizes) <= KEPT_RECORDS and sum(sizes.values()) <= KEPT_BYTES:
        return
    refusals = [path for path in sizes if _refused(path)][KEPT_REFUSALS:]
    many, total = len(sizes), sum(sizes.values())
    for path in dict.fromkeys((*reversed(refusals), *reversed(sizes))):  # the oldest first
        if many <= KEPT_RECORDS and total <= KEPT_BYTES:
            return
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            many, total = many - 1, total - sizes[path]


def _refused(path: Path) -> bool:
    """Whether a record ends with a refusal; cheaper than reading it."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (64 << 10)))
        return b'\n{"row":"refused"' in file.read()
    return False
