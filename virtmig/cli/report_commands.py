"""`virtmig list`, `show`, `logs`, `explain`, `compare`, `replay`: what happened, from the records."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from virtmig.cli import sightings
from virtmig.errors import RequestError
from virtmig.integrations.hook_log import Seen
from virtmig.quantities import duration_text, size_text
from virtmig.report.explain import compare, explain, log_lines, policy_from_toml, replay
from virtmig.report.records import Record, all_records, encode_row, find_record
from virtmig.report.redact import redacted

if TYPE_CHECKING:
    from virtmig.cli.main import GlobalOptions

_HEADINGS = ("id", "when", "domain", "from", "to", "status", "guest", "took", "sent", "downtime")


def run_list(values: dict[str, Any], options: GlobalOptions) -> int:
    """The newest first, what only the hook has seen among them; --json: one object a line."""
    wanted = str(values.get("domain") or "")
    records = all_records()
    known: list[Record | Seen] = [record for record in records if not wanted or record.began.domain == wanted]
    seen = [each for each in sightings.all_seen() if not wanted or each.guest == wanted]
    known += sightings.unrecorded(seen, records)
    known.sort(key=_time, reverse=True)
    found = known[: int(values.get("limit") or 20)]
    if values.get("json"):
        for each in found:
            print(msgspec.json.encode(_summary(each)).decode())
        return 0
    _print_table([_HEADINGS, *map(_row, found)])
    return 0


def _time(known: Record | Seen) -> float:
    return known.began.time if isinstance(known, Record) else known.began


def _find(wanted: str) -> Record | Seen:
    """The record, or what only the hook has seen; by a domain's name or `last` the newer of them."""
    try:
        record = find_record(wanted)
    except RequestError:
        two_would_do = any(record.id.startswith(wanted) for record in all_records())
        if two_would_do or (seen := sightings.find(wanted)) is None:
            raise
        return seen
    if wanted and record.id.startswith(wanted):
        return record
    seen = sightings.find(wanted)
    return record if seen is None or seen.began < record.began.time else seen


def _print_table(rows: list[tuple[str, ...]]) -> None:
    clean = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(row[at]) for row in clean) for at in range(len(clean[0]))]
    for row in clean:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def printable(text: str) -> str:
    """Names and messages come from guests, hosts and files: nothing in them may command the terminal."""
    text = text.replace("\n", "\n" + " " * 12)
    return "".join(each if each.isprintable() or each == "\n" else f"\\x{ord(each):02x}" for each in text)


def _row(record: Record | Seen) -> tuple[str, ...]:
    if isinstance(record, Seen):
        return sightings.row(record)
    outcome = record.outcome
    return (
        record.id,
        time.strftime("%Y-%m-%d %H:%M", time.localtime(record.began.time)),
        record.began.domain,
        record.began.source,
        record.began.destination,
        record.status,
        str(outcome.guest) if outcome else "-",
        duration_text(outcome.elapsed_s) if outcome else "-",
        size_text(record.sent_bytes) if record.sent_bytes else "-",
        f"{outcome.downtime_ms} ms" if outcome and outcome.downtime_ms is not None else "-",
    )


def _summary(record: Record | Seen) -> dict[str, Any]:
    if isinstance(record, Seen):
        return sightings.summary(record)
    began, outcome = record.began, record.outcome
    return {
        "id": record.id,
        "time": began.time,
        "domain": began.domain,
        "source": began.source,
        "destination": began.destination,
        "status": record.status,
        "request": began.request,
        "outcome": outcome,
        "refusals": record.refusals,
    }


def run_show(values: dict[str, Any], options: GlobalOptions) -> int:
    """One record: a summary and the plan; --json: every row; --redact: without names and addresses."""
    record = find_record(str(values["id"])) if values.get("redact") else _find(str(values["id"]))
    if isinstance(record, Seen):
        return _show_seen(record, json_wanted=bool(values.get("json")))
    if values.get("redact"):
        sys.stdout.writelines(line.decode() for line in redacted(record))
        return 0
    if values.get("json"):
        sys.stdout.writelines(encode_row(row).decode() for row in (record.began, *record.rows))
        return 0
    asked = (f"--{name}" if value is True else f"--{name} {value}" for name, value in record.began.request.items())
    rows = [
        *zip(_HEADINGS, _row(record), strict=True),
        ("record", str(record.path)),
        ("transport", f"{record.began.plan.transport}: {record.began.plan.transport_reason}"),
        ("asked", " ".join(asked)),
    ]
    if record.outcome is not None and record.outcome.error:
        rows.append(("error", record.outcome.error))
    rows += [("refused", reason + (f" -> {way_out}" if way_out else "")) for _, reason, way_out in record.refusals]
    _print_named(rows)
    return 0


def _print_named(rows: Iterable[tuple[str, str]]) -> None:
    for name, text in rows:
        print(f"{name:<10} {printable(text)}")


def _show_seen(seen: Seen, *, json_wanted: bool) -> int:
    if json_wanted:
        for each in seen.rows:
            print(msgspec.json.encode(each).decode())
        return 0
    _print_named((*zip(_HEADINGS, _row(seen), strict=True), *sightings.show(seen)))
    return 0


def run_logs(values: dict[str, Any], options: GlobalOptions) -> int:
    known = _find(str(values["id"]))
    lines = log_lines(known) if isinstance(known, Record) else sightings.log_lines(known)
    print("\n".join(map(printable, lines)))
    return 0


def run_explain(values: dict[str, Any], options: GlobalOptions) -> int:
    known = _find(str(values["id"]))
    lines = explain(known) if isinstance(known, Record) else sightings.explain(known)
    print("\n".join(map(printable, lines)))
    return 0


def run_compare(values: dict[str, Any], options: GlobalOptions) -> int:
    one, other = find_record(str(values["id"])), find_record(str(values["other"]))
    _print_table([("", one.id, other.id, "ratio"), *compare(one, other)])
    return 0


def run_replay(values: dict[str, Any], options: GlobalOptions) -> int:
    """What another policy would have decided on the same curve."""
    record = find_record(str(values["id"]))
    path = Path(str(values["policy"]))
    try:
        policy = policy_from_toml(path.read_bytes())
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", option="policy") from None
    except msgspec.MsgspecError as error:
        raise RequestError(f"{path}: {error}", option="policy", hint="the fields of a policy, in TOML") from None
    found = replay(record, policy)
    for second, decision in found:
        print(f"{second:8.2f} s  {decision.action}: {decision.reason}")
    if not record.samples:
        print("nothing can be told: the record has no samples")
    elif not found:
        print("nothing: this policy would have let it go on")
    did = [row for row in record.decisions if row.decision.notable]
    print("what was decided: " + ("; ".join(f"{row.at_s:.2f} s {row.decision.action}" for row in did) or "nothing"))
    return 0


def run_report(values: dict[str, Any], options: GlobalOptions) -> int:
    """Prints the file's name."""
    from virtmig.report.html import write_report

    record = find_record(str(values["id"]))
    path = Path(str(values.get("output") or f"{record.id}.html"))
    try:
        write_report(record, path)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}", option="output") from None
    print(path)
    return 0
