"""Migrations that only this host's hook has seen: virsh's, Nova's, those that another host runs.

list, show, logs and explain tell of them beside the records. A sighting whose guest has a record of the same time is
the same migration and is left out.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

from virtmig.errors import RequestError
from virtmig.integrations import hook_files
from virtmig.integrations.hook_log import RESULTS, Seen, migrations, read
from virtmig.integrations.libvirt_hook import TEST_LOG
from virtmig.report.records import Record, all_records

#: how far a hook's clock and phases may lie outside of the record of the same migration
_SLACK_S = 5.0


def all_seen() -> list[Seen]:
    """The newest first; none where the hook's log cannot be read."""
    try:
        seen = migrations(read(os.environ.get(TEST_LOG) or hook_files.log_file()))
    except OSError:
        return []
    return sorted(seen, key=lambda each: -each.began)


def unrecorded(seen: Iterable[Seen], records: Iterable[Record]) -> list[Seen]:
    """Those of `seen` that have no record, in the same order."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        last_s = record.rows[-1].at_s if record.rows else 0.0
        end = float("inf") if record.status == "running" else record.began.time + last_s
        spans.setdefault(record.began.domain, []).append((record.began.time - _SLACK_S, end + _SLACK_S))
    return [each for each in seen if not any(a <= each.began <= b for a, b in spans.get(each.guest, ()))]


def identity(seen: Seen) -> str:
    """In the form of a record's: its time (UTC), and the beginning of the guest's UUID."""
    digits = re.sub("[^0-9a-f]", "", seen.uuid.lower())[:6]
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime(seen.began)) + "-" + digits.ljust(6, "0")


def find(wanted: str) -> Seen | None:
    """By id, the beginning of one, a domain's name (its newest), or `last`. Raises RequestError where two would do.

    The records are read only where the hook has seen something of the kind.
    """
    seen = all_seen()
    if wanted not in ("", "last"):
        seen = [each for each in seen if each.guest == wanted or identity(each).startswith(wanted)]
    seen = unrecorded(seen, all_records()) if seen else []
    begin = [each for each in seen if wanted and identity(each).startswith(wanted)]
    if len(set(map(identity, begin))) > 1:
        some = ", ".join(map(identity, begin[:4]))
        raise RequestError(f"{len(begin)} migrations begin with '{wanted}': {some}", option="id", hint="say more of it")
    return next(iter(begin or seen), None)


def row(seen: Seen) -> tuple[str, ...]:
    """Of list's table."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(seen.began))
    return identity(seen), when, seen.guest, *_hosts(seen), seen.result, "-", "-", "-", "-"


def summary(seen: Seen) -> dict[str, Any]:
    """Of list --json. `hook`: what only a sighting has."""
    source, destination = (host if host != "-" else None for host in _hosts(seen))
    return {
        "id": identity(seen),
        "time": seen.began,
        "domain": seen.guest,
        "source": source,
        "destination": destination,
        "status": seen.result,
        "hook": {"uuid": seen.uuid, "phases": seen.phases, "reason": _reason(seen), "changes": _changes(seen)},
    }


def show(seen: Seen) -> Iterator[tuple[str, str]]:
    """(name, text)"""
    yield "seen by", "libvirt's hook on this host; virtmig did not run it from here"
    yield "phases", ", ".join(seen.phases)
    yield "means", RESULTS[seen.result]
    if _reason(seen):
        yield "reason", _reason(seen)
    for change in _changes(seen):
        yield "change", change


def log_lines(seen: Seen) -> Iterator[str]:
    for each in seen.rows:
        words = [str(each["operation"]), *(str(each.get(name)) for name in ("suboperation", "extra"))]
        said = f": {each['result']}" if each.get("result") else ""
        reason = f" ({each['reason']})" if each.get("reason") else ""
        yield f"{float(each['time']) - seen.began:8.2f} s  hook: {' '.join(words)}{said}{reason}"


def explain(seen: Seen) -> Iterator[str]:
    source, destination = _hosts(seen)
    way = f"came to {destination}" if seen.incoming else f"left {source}"
    yield f"{seen.guest} {way} on {time.strftime('%Y-%m-%d at %H:%M:%S', time.localtime(seen.began))}."
    yield "It was not run by virtmig from this host: what is known is what libvirt told its hook here."
    yield f"{seen.result}: {RESULTS[seen.result]}."
    if _reason(seen):
        yield f"The hook's reason: {_reason(seen)}."
    if changes := _changes(seen):
        yield f"The hook changed its XML for this host: {'; '.join(changes)}."
    yield "Whoever ran it may have a record: virtmig list, or the manager's log, on the other host."


def _hosts(seen: Seen) -> tuple[str, str]:
    """(source, destination); hooks know their own host alone."""
    host = str(seen.rows[0].get("host") or "-")
    return ("-", host) if seen.incoming else (host, "-")


def _reason(seen: Seen) -> str:
    return str(seen.rows[0].get("reason") or "")


def _changes(seen: Seen) -> tuple[str, ...]:
    changes = seen.rows[0].get("changes")
    return tuple(map(str, changes)) if isinstance(changes, list) else ()
