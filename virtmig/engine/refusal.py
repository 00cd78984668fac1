"""Why a destination did not take a guest: how far it came, where the guest is, and what to do, for a person.

A QEMU tells its reason on its own standard error only; to us it closes the connection, or waits without a word. But it
answers a PING behind each part of the stream's beginning, so the first part without an answer is what it refused:

    OPENING   the header with the machine type      answered by PONG 1
    CHANNELS  multifd and preempt                   PINGS_SETTLED
    POSTCOPY  POSTCOPY_ADVISE                       PING_ADVISED
    BLOCKS    the list of RAM blocks                PING_LISTED
    PAGES     the memory and the devices            SHUT 0
"""

from __future__ import annotations

import enum
import shlex
from dataclasses import dataclass
from pathlib import Path

from virtmig.engine.answers import Silent
from virtmig.engine.manifest import Manifest
from virtmig.engine.send_settings import SendSettings
from virtmig.engine.transport import Address
from virtmig.errors import ChannelError, MigrationError, RemoteProtocolError
from virtmig.progress import Whereabouts
from virtmig.quantities import size_text
from virtmig.stream.wire import Dialect

# values of our own, beside QEMU's 1 to 4 and 0x42
PING_ADVISED, PING_LISTED = 0x51, 0x52
#: in a row: each answer takes the main loop of a QEMU round once, where it turns away a connection too many
PINGS_SETTLED = (0x53, 0x54, 0x55)

_ASK = (
    "ask that QEMU's monitor: query-status says 'running' or 'paused' when the guest has arrived, 'inmigrate' while it "
    "loads or waits for something; when that QEMU has ended, nothing runs there. Until that is known, start it nowhere"
)


class Part(enum.IntEnum):
    """What the destination had not answered when it failed."""

    CONNECTION = 0
    OPENING = 1
    CHANNELS = 2
    POSTCOPY = 3
    BLOCKS = 4
    PAGES = 5


@dataclass(frozen=True, slots=True)
class Sent:
    """What went out, and to whom. `folder` is the image's."""

    manifest: Manifest
    folder: Path
    address: Address
    settings: SendSettings

    def recover_command(self) -> str:
        settings = self.settings
        words = ["virtmig", "send", "--recover", str(self.folder), str(self.address)]
        words += ["--qemu", str(settings.destination)] if settings.destination is not Dialect.QEMU_11_1 else []
        words += ["--postcopy-preempt"] if settings.preempt else []
        return shlex.join(words)


def not_started(error: MigrationError, sent: Sent, part: Part) -> None:
    """It failed before the guest could run there."""
    error.guest = Whereabouts.SOURCE
    why, hints = "", [error.hint]
    if isinstance(error, ChannelError | RemoteProtocolError):
        why, more = _refused(sent, part, silent=isinstance(error, Silent))
        hints += more
    _say(error, why, "the guest has not started there", [*hints, "the image is as it was and can be sent again"])


def nobody_knows(error: MigrationError, sent: Sent) -> None:
    """The whole of a precopy went out, and no answer came."""
    error.guest = Whereabouts.UNKNOWN
    _say(error, "", "all of the guest was sent, and whether it runs there is unknown", [error.hint, _ASK])


def split(error: MigrationError, sent: Sent, *, loaded: bool) -> None:
    """A postcopy broke after RUN. `loaded`: the destination has said that its devices are."""
    error.guest = Whereabouts.SPLIT
    hints = [error.hint]
    if not loaded and not sent.settings.preempt:
        hints.append("if that QEMU has postcopy-preempt on, it waits for that channel: --postcopy-preempt is missing")
    hints.append(f"the guest pauses at its next missing page; migrate-recover there, then '{sent.recover_command()}'")
    if not loaded:
        # between LISTEN and RUN a broken connection is no pause: QEMU exits, 7.2 may crash or stand still
        hints.append(
            "if that QEMU has ended or hangs in 'inmigrate', its guest never ran: end it, and send the image --again"
        )
    _say(error, "", "the guest is split", hints)


def not_recovered(error: MigrationError, sent: Sent, *, connected: bool, told: bool) -> None:
    """A recovery failed. `connected` to somebody; `told`: it has said which pages it has, so it was paused."""
    error.guest = Whereabouts.SPLIT
    why, hints = "", [error.hint]
    if not connected:
        hints.append("tell its monitor first: migrate-recover with that address; query-migrate says postcopy-paused")
    elif not told:
        why = "it has not said which pages it has"
        hints.append(
            "is it the QEMU that was paused in this postcopy? One that was started anew has nothing to go on with: it "
            "ends with 'Not a migration stream' or 'unknown channel magic'"
        )
        if not sent.settings.preempt:
            hints.append("if its postcopy-preempt is on, add --postcopy-preempt")
        blocks = ", ".join(f"{block.name} {size_text(block.length)}" for block in sent.manifest.blocks[:4])
        hints.append(f"is it the same guest? This image has {blocks}")
    hints.append(f"migrate-recover there, then '{sent.recover_command()}'")
    _say(error, why, "the guest stays as it was: split, and paused at its next missing page", hints)


def _refused(sent: Sent, part: Part, *, silent: bool) -> tuple[str, list[str]]:
    settings, manifest = sent.settings, sent.manifest
    count = settings.multifd_channels
    if part is Part.CONNECTION:
        return "", []
    channels = f"its multifd must be on, with multifd-channels {count} as --parallel-connections says"
    if part in (Part.OPENING, Part.CHANNELS):
        hints = []
        if count:
            hints.append(channels)
        elif silent:
            hints.append("if its multifd is on it waits for the channels: say --parallel-connections N as there")
        if settings.preempt:
            hints.append("its postcopy-preempt must be on before migrate-incoming; or leave out --postcopy-preempt")
        elif silent:
            hints.append("if its postcopy-preempt is on it waits for that channel: say --postcopy --postcopy-preempt")
        if part is Part.CHANNELS:
            return "that QEMU expects other channels", hints
        if manifest.machine and not silent:
            hints.append(f"its machine type must be {manifest.machine} (-M)")
        what = "does not begin with the stream" if silent else "has not taken the beginning of the stream"
        return f"that QEMU {what}", hints
    if part is Part.POSTCOPY:
        return "it takes no postcopy", ["set its postcopy-ram before migrate-incoming; or leave out --postcopy"]
    if part is Part.BLOCKS:
        blocks = sorted(manifest.blocks, key=lambda block: -block.length)
        named = ", ".join(f"{block.name} {size_text(block.length)}" for block in blocks[:4])
        rest = f" and {len(blocks) - 4} more" if len(blocks) > 4 else ""
        layout = f"the guest has {named}{rest}: start that QEMU with the same -m, -M and devices"
        if count:  # it may have answered before it looked at a connection too many
            return "its memory is not laid out as the guest's, or it expects other channels", [layout, channels]
        return "its memory is not laid out as the guest's", [layout]
    hints = ["that QEMU's standard error says why; its command line must be the source's, with -incoming defer"]
    if count:
        hints = [f"its multifd-compression must be {settings.compression}", channels, *hints]
    return "", hints


def _say(error: MigrationError, why: str, where: str, hints: list[str]) -> None:
    error.message = "; ".join(part for part in (error.message, why, where) if part)
    error.args = (error.message,)
    error.hint = "\n".join(dict.fromkeys(line for hint in hints for line in hint.splitlines() if line))
