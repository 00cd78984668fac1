"""`virtmig receive`: a guest from a QEMU into a folder, for a person or a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from virtmig.cli.event_lines import EventLines
from virtmig.engine.image import ImageWriter, Manifest
from virtmig.engine.incoming import UNTOLD, Incoming, Received
from virtmig.engine.interrupted import interrupted, place_of, words
from virtmig.engine.landing import ImageLanding
from virtmig.engine.transport import STALL_S, Address, Listener, Stop
from virtmig.errors import MigrationError
from virtmig.progress import Whereabouts
from virtmig.quantities import size_text
from virtmig.stream.events import DeviceSection

_RESUME = "at the source: migrate -r URI, or QMP migrate with resume: true (migrate-pause first if it is not paused)"


class Asked(Protocol):
    """Who hears the signals; `split` tells it when only a second one may stop."""

    split: Callable[[], bool]


def run(values: dict[str, Any], stop: Stop, asked: Asked, *, quiet: bool) -> int:
    """Exit status 0 when the image is whole and the source knows, or was not needed any more."""
    lines = EventLines(json=bool(values.get("json")), quiet=quiet)
    try:
        return _Receive(values, lines, stop, asked).run()
    except MigrationError as error:
        lines.event("failed", message=error.message, hint=error.hint, guest=error.guest and str(error.guest))
        raise


class _Receive:
    def __init__(self, values: dict[str, Any], lines: EventLines, stop: Stop, asked: Asked) -> None:
        self._values = values
        self._lines = lines
        self._stop = stop
        self._asked = asked
        self._address = Address.parse(str(values["address"]))
        self._asked_for = Path(str(values["into"]))
        self._folder = place_of(self._asked_for)[0]

    def run(self) -> int:
        if not self._values.get("recover"):
            return self._receive(ImageLanding(self._asked_for))
        landing, manifest, sections = ImageLanding.recover(self._asked_for)
        if landing.writer.arrived:
            return self._finish(landing, manifest)
        return self._receive(landing, (manifest, sections))

    def _finish(self, landing: ImageLanding, manifest: Manifest) -> int:
        """All had come before it was interrupted: nobody is waited for."""
        try:
            landing.finish(manifest)
        except MigrationError as error:
            landing.keep()
            error.guest = Whereabouts.UNKNOWN
            error.hint = f"all of the guest is in '{landing.writer.partial}': --recover again"
            raise
        self._lines.event(
            "finished",
            f"all of the guest had come: it is at rest in {self._folder}; {UNTOLD}",
            folder=str(self._folder),
            source=UNTOLD,
        )
        return 0

    def _receive(self, landing: ImageLanding, again: tuple[Manifest, list[DeviceSection]] | None = None) -> int:
        listener, incoming = None, None
        try:
            listener = Listener(self._address, self._stop)
            incoming = Incoming(
                listener,
                landing,
                self._stop,
                multifd_channels=int(self._values.get("parallel-connections") or 0),
                stall_s=float(self._values.get("stall-timeout") or STALL_S),
                recover_s=float(self._values["recover-timeout"]) if self._values.get("recover-timeout") else None,
                switchover_ack=True if self._values.get("switchover-ack") else None,
                tell=self._tell,
            )
            if again is not None:
                incoming.continue_from(*again)
            self._begin(listener, incoming, landing.writer)
        except MigrationError as error:
            if listener is not None:
                listener.close()
            if again is None:
                landing.abandon()
            else:
                landing.keep()
            error.guest = Whereabouts.SPLIT if again is not None else error.guest
            self._place(error, None, landing.writer)
            raise
        try:
            self._received(incoming.run())
        except MigrationError as error:
            self._place(error, incoming, landing.writer)
            raise
        finally:
            listener.close()
        return 0

    def _begin(self, listener: Listener, incoming: Incoming, writer: ImageWriter) -> None:
        self._asked.split = lambda: incoming.loading.split
        for each in interrupted(self._folder):
            if each.folder != writer.partial and each.holder is None:
                way = f"'{self._command(each.folder)}' goes on with it" if each.manifest else f"rm -r '{each.folder}'"
                self._lines.event(
                    "leftover",
                    f"an interrupted receive is in {each.folder}: {words(each)}; {way}",
                    folder=str(each.folder),
                    recoverable=each.manifest is not None,
                    arrived=each.arrived,
                )
        address = str(listener.address)
        if not self._lines.event("listening", f"listening on {address}", address=address) and self._values.get("json"):
            raise MigrationError("standard output takes no lines: nobody would hear of the guest")

    def _command(self, into: Path) -> str:
        return f"virtmig receive {self._values['address']} --into {into} --recover"

    def _tell(self, name: str, words: str, **facts: str | int) -> None:
        if name == "paused":
            words = f"paused: {words}; the guest is split; {_RESUME}"
            facts["guest"] = Whereabouts.SPLIT
        elif name == "no-room":
            words = f"waiting: {words}"
        self._lines.event(name, words, **facts)

    def _received(self, received: Received) -> None:
        channels = f"{len(received.channels)} channel{'s' if len(received.channels) > 1 else ''}"
        self._lines.event(
            "received",
            f"the guest is at rest in {self._folder}: {size_text(received.bytes_received)} over {channels} in "
            f"{received.elapsed_s:.1f} s; its source stands still and may be resumed",
            folder=str(self._folder),
            **{name: getattr(received, name) for name in received.__slots__},
        )

    def _place(self, error: MigrationError, incoming: Incoming | None, writer: ImageWriter) -> None:
        """Where the guest is, behind what happened; what to do, in front of what else may help."""
        hints = [error.hint] if error.hint else []
        others = [each for each in interrupted(self._folder) if each.manifest and each.folder != writer.partial]
        recover = self._command(writer.partial if others else self._folder)
        if error.guest is Whereabouts.SPLIT:
            where = "the guest is split: stopped at its source, not whole here"
            hints.insert(0, f"the source still has every page: '{recover}', then {_RESUME}")
        elif error.guest is Whereabouts.UNKNOWN and writer.arrived and not writer.committed:
            where = "all of the guest is here, and its source has not heard so"
            hints[:0] = [f"'{recover}' makes it whole without its source", UNTOLD]
        elif error.guest is Whereabouts.UNKNOWN:
            where = "the guest's source has not heard whether it is here"
            hints[:0] = [] if writer.committed else [f"the source has sent all and cannot send it again; {UNTOLD}"]
        elif incoming is not None and incoming.begun:
            where = "the guest stays at its source"
        else:
            where = "no guest has come"
        error.message = f"{error.message}; {where}"
        error.args = (error.message,)
        error.hint = "\n".join(hints)
