"""What a client of this host and its agent say to each other: JSON, one message a line, on the agent's local socket.

A client asks one thing per connection. `begin` opens a session to another host's agent; the connection then tells what
happens until it is over, and closing it early gives the session up while no byte of the guest has moved.
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta

from virtmig.errors import RemoteProtocolError
from virtmig.facts import GuestFacts, HostFacts
from virtmig.link.messages import Answer, Attachment, ChannelName, Reason, Values

LINE_LONGEST_BYTES = 2 << 20
#: a session's state from the moment on at which the source lets go of the guest
HANDOVER = "handover"
Text = Annotated[str, Meta(max_length=4096)]


class _Ask(msgspec.Struct, frozen=True, kw_only=True, tag_field="ask", tag=str.lower):
    pass


class Facts(_Ask, frozen=True):
    """What this host is and can do, as its agent sees it."""


class Sessions(_Ask, frozen=True):
    """Those that run, and those that were broken off."""


class Begin(_Ask, frozen=True):
    """Shake hands with the agent at `destination`. `facts` are the source's as its libvirt tells them.

    `only_handshake`: end it when everything is open; no QEMU is involved.
    """

    destination: Text
    request: Values
    guest: GuestFacts
    facts: HostFacts | None = None
    fixed: tuple[str, ...] = ()
    only_handshake: bool = False


class GiveUp(_Ask, frozen=True):
    """In the connection of a Begin: end this session. `guest` is where the guest is, as far as the client knows."""

    reason: Text = ""
    guest: str = "unknown"


Asked = Facts | Sessions | Begin | GiveUp


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One session of this host, also after its agent has ended."""

    session: str
    role: str  # source or destination
    domain: str
    uuid: str = ""
    peer: str = ""
    destination: str = ""
    request: dict[str, Any] = {}
    source_uri: str = ""
    state: str = ""
    reasons: tuple[str, ...] = ()
    handed_over: bool = False  # the guest may run at the destination: do not resume the source without asking there
    began: float = 0.0  # time.time()
    changed: float = 0.0
    pid: int = 0


class _Said(msgspec.Struct, frozen=True, kw_only=True, tag_field="said", tag=str.lower):
    pass


class HostSaid(_Said, frozen=True, tag="facts"):
    facts: HostFacts
    implementation: str = ""
    details: Any = None


class SessionsSaid(_Said, frozen=True, tag="sessions"):
    sessions: tuple[SessionRecord, ...]


class Exchanged(_Said, frozen=True, tag="message"):
    """A message of the handshake, without proofs and secrets. `ms` since it began."""

    source: bool  # who said it
    name: str
    ms: float
    content: Any = None


class Agreed(_Said, frozen=True, tag="agreed"):
    """Everything is open. QEMU and libvirt are to use `attachment`."""

    session: str
    answer: Answer
    channels: tuple[ChannelName, ...]
    peer: str
    ms: float
    attachment: Attachment | None = None
    round_trips: int = 0


class Refused(_Said, frozen=True, tag="refused"):
    reasons: tuple[Reason, ...]
    by_peer: bool = True


class Changed(_Said, frozen=True, tag="state"):
    state: str
    words: str = ""


class Carried(_Said, frozen=True, tag="carried"):
    """Bytes that each channel has brought from this host's QEMU and to it, since the session began; once a second."""

    channels: dict[str, tuple[int, int]]
    ms: float


class Ended(_Said, frozen=True, tag="ended"):
    state: str
    reasons: tuple[Reason, ...] = ()
    guest: str = "unknown"


class Problem(_Said, frozen=True, tag="error"):
    """It could not be done. `kind` is the name of the exception."""

    text: str
    hint: str = ""
    kind: str = "ChannelError"


Said = HostSaid | SessionsSaid | Exchanged | Agreed | Refused | Changed | Carried | Ended | Problem
ASKED: tuple[type[Asked], ...] = get_args(Asked)

_encoder = msgspec.json.Encoder()
_asked: msgspec.json.Decoder[Asked] = msgspec.json.Decoder(Asked)
_said: msgspec.json.Decoder[Said] = msgspec.json.Decoder(Said)


def encode_line(message: Asked | Said) -> bytes:
    return _encoder.encode(message) + b"\n"


def decode_asked(line: bytes) -> Asked:
    """Raises RemoteProtocolError."""
    try:
        return _asked.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"not a question to an agent: {error}") from None


def decode_said(line: bytes) -> Said:
    """Raises RemoteProtocolError."""
    try:
        return _said.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"not an agent's answer: {error}") from None


class Lines:
    """Bytes to lines. Raises RemoteProtocolError for one that has no end within the bound."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        self._kept += data
        *whole, rest = bytes(self._kept).split(b"\n")
        self._kept = bytearray(rest)
        if len(rest) > LINE_LONGEST_BYTES:
            raise RemoteProtocolError(f"a line of more than {LINE_LONGEST_BYTES} bytes")
        return [line for line in whole if line.strip()]
