"""`virtmig receive` and `virtmig send`: the engine's two ends, for a person or a script."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from virtmig.cli.signals import stop_on_signals
from virtmig.engine.transport import STALL_S, Address, Stop
from virtmig.errors import MigrationAborted
from virtmig.progress import Whereabouts

if TYPE_CHECKING:
    from virtmig.engine.outgoing import SendProgress

_MIB = 1 << 20


class _Asked:
    """A signal stops what can be stopped safely; in a postcopy only a second one does: it leaves a split guest."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self.split: Callable[[], bool] = lambda: False
        self._warned = False

    def follow(self, progress: SendProgress) -> None:
        """Of a guest that is sent: once it runs there, stopping splits it."""
        if progress.guest_runs and progress.stage != "finishing":
            self.split = lambda: True

    def ask(self, why: str) -> None:
        if self.split() and not self._warned:
            self._warned = True
            words = f"virtmig: {why}: the guest is between two places; once more, and it stays until it is recovered\n"
            with contextlib.suppress(OSError):  # in a signal handler nothing may raise
                os.write(2, words.encode())
            return
        guest = Whereabouts.SPLIT if self.split() else Whereabouts.SOURCE
        self._stop.request(MigrationAborted(f"stopped by {why}", guest=guest))


class _Say:
    """Lines for a person on stderr, or JSON lines on stdout."""

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self._json = json
        self._quiet = quiet

    def event(self, name: str, words: str, **facts: object) -> None:
        if self._json:
            print(msgspec.json.encode({"event": name, **facts}).decode(), flush=True)
        elif not self._quiet:
            print(words, file=sys.stderr, flush=True)


def run_receive(values: dict[str, Any], *, quiet: bool) -> int:
    """Exit status 0 when the image is whole and the source knows."""
    from virtmig.cli.receive_command import run

    stop = Stop()
    with stop_on_signals(_Asked(stop)) as asked:
        return run(values, stop, asked, quiet=quiet)


def run_send(values: dict[str, Any], *, quiet: bool) -> int:
    """Exit status 0 when the QEMU has confirmed the whole guest."""
    from virtmig.engine.image import Image
    from virtmig.engine.outgoing import SendSettings, send_image
    from virtmig.stream.wire import Dialect

    say = _Say(json=bool(values.get("json")), quiet=quiet)
    address = Address.parse(str(values["address"]))
    folder = Path(str(values["folder"]))
    bandwidth = values.get("bandwidth")
    settings = SendSettings(
        postcopy=bool(values.get("postcopy")) or bool(values.get("recover")),
        preempt=bool(values.get("postcopy-preempt")),
        multifd_channels=int(values.get("parallel-connections") or 0),
        compression=str(values.get("comp-methods") or "none"),
        destination=Dialect(str(values.get("qemu") or Dialect.QEMU_11_1)),
        recover=bool(values.get("recover")),
        bandwidth_bytes_per_s=int(bandwidth) * _MIB if bandwidth else None,
        stall_s=float(values.get("stall-timeout") or STALL_S),
    )
    stop = Stop()
    with stop_on_signals(_Asked(stop)) as asked, Image(folder) as image:
        if values.get("verify"):
            image.verify()
        result = send_image(image, address, settings, stop, progress=asked.follow)
    say.event("sent", f"the guest of {folder} is at {address}", folder=str(folder), address=str(address),
              result=msgspec.to_builtins(result))  # fmt: skip
    return 0
