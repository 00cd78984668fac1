"""Server-sent events of one migration, read from its record: an event's id is where its row ends in the file.

Nothing is queued for a reader. Each has a place in the file, and a slow one gets fewer samples: what it was not sent
is counted in a `dropped` event. One that takes nothing at all is let go; its browser comes back with Last-Event-ID.

    migration   the whole resource, when the stream begins
    sample      numbers of one moment          decision    what was decided, with its reason
    message     a sentence, with its level     dropped     {"samples": n} were left out
    end         the whole resource, the last event
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec

from virtmig.cli.display import NOVA_STATUS
from virtmig.integrations.api.history import rows_from
from virtmig.integrations.api.migrations import Found, shown
from virtmig.report.records import Decided, Row, Said, Sampled

TURN_S = 0.25
KEEP_ALIVE_S = 15.0
#: a reader that takes nothing for so long is let go
STALLED_S = 30.0
#: samples sent at once: what a chart has columns for
MOST_SAMPLES = 1000
#: rows read at once, so that one stream holds up no thread for long
_MOST_ROWS = 20_000

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def event(name: str, data: object, at: int | None = None) -> bytes:
    """One event as it goes over the wire (WHATWG HTML, 9.2.6); JSON has no raw line breaks."""
    head = f"id: {at}\n" if at is not None else ""
    return f"{head}event: {name}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"


def _row_event(row: Row, at: int) -> bytes:
    if isinstance(row, Sampled):
        progress = {key: value for key, value in msgspec.structs.asdict(row.progress).items() if value is not None}
        more = {"eta_low_s": row.eta_low_s, "eta_high_s": row.eta_high_s, "converging": row.converging}
        data = {"at_s": row.at_s, "status": NOVA_STATUS[row.progress.phase], **progress, **more}
        return event("sample", data, at)
    if isinstance(row, Decided):
        decision = row.decision
        data = {"at_s": row.at_s, "action": decision.action, "value": decision.value, "reason": decision.reason}
        return event("decision", data, at)
    if isinstance(row, Said):
        return event("message", {"at_s": row.at_s, "level": row.level, "text": row.text}, at)
    return b""


def batch(path: Path, offset: int) -> tuple[bytes, int]:
    """The events behind `offset`, and where they end; of too many samples every nth and the last."""
    rows: list[tuple[int, Row]] = []
    for at, row in rows_from(path, offset):
        offset = at
        if row is not None:
            rows.append((at, row))
        if len(rows) >= _MOST_ROWS:
            break
    samples = [number for number, (_, row) in enumerate(rows) if isinstance(row, Sampled)]
    step = -(-len(samples) // MOST_SAMPLES) or 1
    kept = set(samples[::-step])
    out = [
        _row_event(row, at)
        for number, (at, row) in enumerate(rows)
        if number in kept or not isinstance(row, Sampled)
    ]  # fmt: skip
    if dropped := len(samples) - len(kept):
        out.insert(0, event("dropped", {"samples": dropped}))
    return b"".join(out), offset


def begins_at(path: Path | None, last_event_id: str) -> int:
    """Where to go on; the beginning when the id is none of this record's."""
    if path is None or not last_event_id.isascii() or not last_event_id.isdecimal() or len(last_event_id) > 15:
        return 0
    offset = int(last_event_id)
    try:
        with open(path, "rb") as file:
            file.seek(max(0, offset - 1))
            return offset if offset and file.read(1) == b"\n" else 0
    except OSError:
        return 0


class EventStream:
    """An ASGI response. `again` gives the migration as it is now."""

    def __init__(self, found: Found, again: Callable[[Found], Found], offset: int, let_go: Callable[[], None]) -> None:
        self._found = found
        self._again = again
        self._offset = offset
        self._let_go = let_go

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_gone(receive))
        try:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
                       (b"x-accel-buffering", b"no")]  # fmt: skip
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for chunk in self._chunks():
                if gone.done():
                    return
                body = {"type": "http.response.body", "body": chunk, "more_body": True}
                await asyncio.wait_for(send(body), STALLED_S)
            await asyncio.wait_for(send({"type": "http.response.body", "body": b""}), STALLED_S)
        except TimeoutError:
            abort = scope.get("virtmig.abort")
            if abort is not None:
                abort()
        finally:
            gone.cancel()
            self._let_go()

    async def _chunks(self) -> AsyncIterator[bytes]:
        """An empty chunk is a look at whether the reader is still there."""
        found = self._found
        yield b"retry: 2000\n\n" + event("migration", shown(found))
        quiet_s = 0.0
        while True:
            # asked before reading: rows written in between belong to the next turn
            over = not found.running and not found.queued
            data = b""
            if found.head is not None:
                data, self._offset = await anyio.to_thread.run_sync(batch, found.head.path, self._offset)
            if not data and over:
                yield event("end", shown(found), self._offset)
                return
            quiet_s = 0.0 if data else quiet_s + TURN_S
            if quiet_s >= KEEP_ALIVE_S:
                data, quiet_s = b": still here\n\n", 0.0
            yield data
            if not over:
                await asyncio.sleep(TURN_S)
            found = await anyio.to_thread.run_sync(self._again, found)


async def _gone(receive: Receive) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass
