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
from virtmig.engine.transport import STALL_S, Address, Listener, Stop
from virtmig.errors import MigrationAborted, MigrationError
from virtmig.progress import Whereabouts
from virtmig.quantities import size_text

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
    say = _Say(json=bool(values.get("json")), quiet=quiet)
    stop = Stop()
    with stop_on_signals(_Asked(stop)) as asked:
        return _receive(values, say, stop, asked)


def _receive(values: dict[str, Any], say: _Say, stop: Stop, asked: _Asked) -> int:
    from virtmig.engine.incoming import Incoming
    from virtmig.engine.landing import ImageLanding

    address = Address.parse(str(values["address"]))
    folder = Path(str(values["into"]))
    again = ImageLanding.recover(folder) if values.get("recover") else None
    landing = again[0] if again else ImageLanding(folder)
    try:
        listener = Listener(address, stop)
    except MigrationError:
        if again is None:
            landing.abandon()
        raise
    try:
        incoming = Incoming(
            listener,
            landing,
            stop,
            multifd_channels=int(values.get("parallel-connections") or 0),
            stall_s=float(values.get("stall-timeout") or STALL_S),
            recover_s=float(values["recover-timeout"]) if values.get("recover-timeout") else None,
        )
        asked.split = lambda: incoming.loading.split
        if again is not None:
            incoming.continue_from(again[1], again[2])
        say.event("listening", f"listening on {listener.address}", address=str(listener.address))
        received = incoming.run()
    except MigrationError as error:
        if error.guest is Whereabouts.SPLIT:
            error.hint = (
                f"the source still has every page: 'virtmig receive {values['address']} --into {folder} --recover', "
                "then 'migrate -r' (resume) at the source"
            )
        say.event("failed", "", message=str(error), guest=str(error.guest))
        raise
    finally:
        listener.close()
    say.event(
        "received",
        f"the guest is at rest in {folder}: {size_text(received.bytes_received)} over {len(received.channels)} "
        f"channel{'s' if len(received.channels) > 1 else ''} in {received.elapsed_s:.1f} s; "
        "its source stands still and may be resumed",
        folder=str(folder),
        **{name: getattr(received, name) for name in received.__slots__},
    )
    return 0


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
