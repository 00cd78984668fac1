"""`virtmig list`, `show`, `logs`, `explain`, `compare`, `replay`: what happened, from the records."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from virtmig.errors import RequestError
from virtmig.quantities import duration_text, size_text
from virtmig.report.explain import compare, explain, log_lines, policy_from_toml, replay
from virtmig.report.records import Record, all_records, encode_row, find_record, redacted

if TYPE_CHECKING:
    from virtmig.cli.main import GlobalOptions

_HEADINGS = ("id", "when", "domain", "from", "to", "status", "guest", "took", "sent", "downtime")


def run_list(values: dict[str, Any], options: GlobalOptions) -> int:
    """The newest first; --json: one object a line."""
    wanted = str(values.get("domain") or "")
    found = [record for record in all_records() if not wanted or record.began.domain == wanted]
    found = found[: int(values.get("limit") or 20)]
    if values.get("json"):
        for record in found:
            print(msgspec.json.encode(_summary(record)).decode())
        return 0
    rows = [_HEADINGS, *(_row(record) for record in found)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEADINGS))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(record: Record) -> tuple[str, ...]:
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
        size_text(outcome.processed_bytes) if outcome and outcome.processed_bytes else "-",
        f"{outcome.downtime_ms} ms" if outcome and outcome.downtime_ms is not None else "-",
    )


def _summary(record: Record) -> dict[str, Any]:
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
    record = find_record(str(values["id"]))
    if values.get("redact"):
        sys.stdout.writelines(line.decode() for line in redacted(record))
        return 0
    if values.get("json"):
        sys.stdout.writelines(encode_row(row).decode() for row in (record.began, *record.rows))
        return 0
    for name, text in zip(_HEADINGS, _row(record), strict=True):
        print(f"{name:<10} {text}")
    print(f"{'record':<10} {record.path}")
    print(f"{'transport':<10} {record.began.plan.transport}: {record.began.plan.transport_reason}")
    asked = (f"--{name}" if value is True else f"--{name} {value}" for name, value in record.began.request.items())
    print(f"{'asked':<10} {' '.join(asked)}")
    if record.outcome is not None and record.outcome.error:
        print(f"{'error':<10} {record.outcome.error}")
    for _, reason, way_out in record.refusals:
        print(f"{'refused':<10} {reason}" + (f" -> {way_out}" if way_out else ""))
    return 0


def run_logs(values: dict[str, Any], options: GlobalOptions) -> int:
    print("\n".join(log_lines(find_record(str(values["id"])))))
    return 0


def run_explain(values: dict[str, Any], options: GlobalOptions) -> int:
    print("\n".join(explain(find_record(str(values["id"])))))
    return 0


def run_compare(values: dict[str, Any], options: GlobalOptions) -> int:
    one, other = find_record(str(values["id"])), find_record(str(values["other"]))
    rows = [("", one.id, other.id, "ratio"), *compare(one, other)]
    widths = [max(len(row[at]) for row in rows) for at in range(4)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
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
    if not found:
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
