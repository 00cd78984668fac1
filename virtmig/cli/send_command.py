"""`virtmig send`: a guest from a folder into a QEMU, for a person or a script."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from virtmig.cli.event_lines import EventLines
from virtmig.engine.image import Image
from virtmig.engine.outgoing import SendSettings, send_image
from virtmig.engine.sent import SentImage
from virtmig.engine.transport import STALL_S, Address, Stop
from virtmig.errors import MigrationError
from virtmig.stream.wire import Dialect

_MIB = 1 << 20


class Asked(Protocol):
    """Who hears the signals; `split` tells it when only a second one may stop."""

    split: Callable[[], bool]


def run(values: dict[str, Any], stop: Stop, asked: Asked, *, quiet: bool) -> int:
    """Exit status 0 when the QEMU has confirmed the whole guest."""
    lines = EventLines(json=bool(values.get("json")), quiet=quiet)
    try:
        return _send(values, lines, stop, asked)
    except MigrationError as error:
        lines.event("failed", message=error.message, hint=error.hint, guest=error.guest and str(error.guest))
        raise


def _send(values: dict[str, Any], lines: EventLines, stop: Stop, asked: Asked) -> int:
    folder, address = Path(str(values["folder"])), Address.parse(str(values["address"]))
    settings = _settings(values)

    def may_run() -> None:
        """From here on it may run there: a first signal only warns."""
        sent.may_run()
        asked.split = lambda: True

    def warn(words: str) -> None:
        lines.event("warning", f"warning: {words}", message=words)

    with contextlib.ExitStack() as stack:
        image = stack.enter_context(Image(folder))
        again = bool(values.get("again"))
        sent = stack.enter_context(SentImage(folder, str(address), settings, again=again, warn=warn))
        if values.get("verify"):
            image.verify()
        result = send_image(image, address, sent.settings(settings), stop, may_run=may_run)
    lines.event(
        "sent",
        f"the guest of {folder} is at {address}",
        folder=str(folder),
        address=str(address),
        id=sent.sending.id,
        result=msgspec.to_builtins(result),
    )
    return 0


def _settings(values: dict[str, Any]) -> SendSettings:
    bandwidth = values.get("bandwidth")
    return SendSettings(
        postcopy=bool(values.get("postcopy")) or bool(values.get("recover")),
        preempt=bool(values.get("postcopy-preempt")),
        multifd_channels=int(values.get("parallel-connections") or 0),
        compression=str(values.get("comp-methods") or "none"),
        destination=Dialect(str(values.get("qemu") or Dialect.QEMU_11_1)),
        recover=bool(values.get("recover")),
        bandwidth_bytes_per_s=int(bandwidth) * _MIB if bandwidth else None,
        stall_s=float(values.get("stall-timeout") or STALL_S),
    )
