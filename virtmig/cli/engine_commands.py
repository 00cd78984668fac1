"""`virtmig receive` and `virtmig send`: the engine's two ends, for a person or a script."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from virtmig.cli.signals import stop_on_signals
from virtmig.engine.transport import Stop
from virtmig.errors import MigrationAborted
from virtmig.progress import Whereabouts


class _Asked:
    """A signal stops what can be stopped safely; in a postcopy only a second one does: it leaves a split guest."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self.split: Callable[[], bool] = lambda: False
        self._warned = False

    def ask(self, why: str) -> None:
        if self.split() and not self._warned:
            self._warned = True
            words = f"virtmig: {why}: the guest is between two places; once more, and it stays until it is recovered\n"
            with contextlib.suppress(OSError):  # in a signal handler nothing may raise
                os.write(2, words.encode())
            return
        guest = Whereabouts.SPLIT if self.split() else Whereabouts.SOURCE
        self._stop.request(MigrationAborted(f"stopped by {why}", guest=guest))


def run_receive(values: dict[str, Any], *, quiet: bool) -> int:
    """Exit status 0 when the image is whole and the source knows."""
    from virtmig.cli.receive_command import run

    stop = Stop()
    with stop_on_signals(_Asked(stop)) as asked:
        return run(values, stop, asked, quiet=quiet)


def run_send(values: dict[str, Any], *, quiet: bool) -> int:
    """Exit status 0 when the QEMU has confirmed the whole guest."""
    from virtmig.cli.send_command import run

    stop = Stop()
    with stop_on_signals(_Asked(stop)) as asked:
        return run(values, stop, asked, quiet=quiet)
