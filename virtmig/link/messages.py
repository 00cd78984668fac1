"""The control messages between two hosts, typed: one msgspec Struct each, in msgpack, told apart by the key "message".

Every field has a bound and is checked both ways: what a peer sends wrong is RemoteProtocolError, what we would send
wrong is LocalProtocolError. Keys that nobody knows are ignored; that is how a message grows without a new version.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.facts import GuestFacts, HostFacts

NONCE_BYTES = 32
PROOF_BYTES = 32
SECRET_BYTES = 32
SESSION_BYTES = 16
#: facts of one host or one guest, encoded; capabilities of a host with all of QEMU's machine types take about 40 KiB
FACTS_LONGEST_BYTES = 192 * 1024
#: main, 255 parallel (libvirt's u8), priority, and as many disks again
CHANNELS_MOST = 512
WINDOW_SMALLEST_BYTES = 64 * 1024
WINDOW_LARGEST_BYTES = 1 << 30

Name = Annotated[str, Meta(max_length=64)]
Label = Annotated[str, Meta(max_length=128)]
Text = Annotated[str, Meta(max_length=1024)]
#: the longest value of an option is the text of a domain XML
LongText = Annotated[str, Meta(max_length=256 * 1024)]
Names = Annotated[tuple[Name, ...], Meta(max_length=64)]
U16 = Annotated[int, Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
U64 = Annotated[int, Meta(ge=0)]  # msgpack itself ends at 64 bits
WindowBytes = Annotated[int, Meta(ge=WINDOW_SMALLEST_BYTES, le=WINDOW_LARGEST_BYTES)]
Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Proof = Annotated[bytes, Meta(min_length=PROOF_BYTES, max_length=PROOF_BYTES)]
ProofOrNone = Annotated[bytes, Meta(max_length=PROOF_BYTES)]  # empty where no key is in use
SecretOrNone = Annotated[bytes, Meta(max_length=SECRET_BYTES)]
Session = Annotated[bytes, Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
Index = Annotated[int, Meta(ge=0, lt=CHANNELS_MOST)]
Value = bool | int | LongText | Annotated[tuple[Text, ...], Meta(max_length=256)]
Values = Annotated[dict[Name, Value], Meta(max_length=256)]

#: in the order in which channels are opened
Role = Literal["main", "parallel", "priority", "storage"]
ROLES: tuple[Role, ...] = get_args(Role)
#: what can be resumed: every channel, and the control connection itself
ResumedRole = Literal["control", "main", "parallel", "priority", "storage"]
Outcome = Literal["accepted", "adjusted", "refused"]


class ChannelName(msgspec.Struct, frozen=True):
    """One channel of a session: its role, and which one of that role."""

    role: ResumedRole
    index: Index = 0

    def __str__(self) -> str:
        return f"{self.role} {self.index}" if self.role in ("parallel", "storage") else self.role


CONTROL = ChannelName("control")


class ChannelCount(msgspec.Struct, frozen=True):
    role: Role
    count: Annotated[int, Meta(ge=1, le=CHANNELS_MOST)]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the destination says to one feature or option. `asked` and `given` are there when it was adjusted."""

    feature: Name
    outcome: Outcome
    reason: Text
    way_out: Text = ""
    asked: Text = ""
    given: Text = ""


class Reason(msgspec.Struct, frozen=True):
    """Why something was refused, and what to try instead."""

    feature: Name
    reason: Text
    way_out: Text = ""


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """Where both QEMUs meet their agents, as libvirt is told it: one migrate URI that is right on both hosts.

    `place` names the file system (unix:) or the network (tcp:) that `uri` lives in at the source: where the destination
    finds the same, both QEMUs would meet each other there and not their agents.
    """

    uri: Text
    listen_address: Text = ""
    disks_uri: Text = ""
    place: Text = ""


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="message"):
    pass


class Hello(_Message, frozen=True, tag="hello"):
    """The first message each way. `mandatory`: features of this protocol that the peer must know.

    `proof` is the responder's, and empty without a pre-shared key; `keyed` says that this side demands one.
    """

    version_lowest: U16
    version_highest: U16
    implementation: Label
    nonce: Nonce
    facts: HostFacts
    features: Names = ()
    mandatory: Names = ()
    keyed: bool = False
    proof: ProofOrNone = b""


class Proposal(_Message, frozen=True, tag="proposal"):
    """What the source asks for. `fixed`: options that may not be adjusted; under --strict none may.

    `attachments` are what the source can offer, the best first. `version` is the one to be spoken from here on; `proof`
    is the initiator's, as in Hello.
    """

    version: U16
    request: Values
    guest: GuestFacts
    window_bytes: WindowBytes
    fixed: Annotated[tuple[Name, ...], Meta(max_length=256)] = ()
    attachments: Annotated[tuple[Attachment, ...], Meta(max_length=8)] = ()
    proof: ProofOrNone = b""


class Answer(_Message, frozen=True, tag="answer"):
    """What the destination says to it, feature by feature. `settled` is the request as it would be carried out.

    `attachment` is one of those offered, with the listen address that this side needs; none where none was offered.
    """

    verdicts: Annotated[tuple[Verdict, ...], Meta(max_length=256)]
    settled: Values = {}
    channels: Annotated[tuple[ChannelCount, ...], Meta(max_length=len(ROLES))] = ()
    limits: Annotated[dict[Name, U64], Meta(max_length=64)] = {}
    warnings: Annotated[tuple[Reason, ...], Meta(max_length=64)] = ()
    attachment: Attachment | None = None

    @property
    def refusals(self) -> tuple[Reason, ...]:
        return tuple(Reason(row.feature, row.reason, row.way_out) for row in self.verdicts if row.outcome == "refused")


class Agreement(_Message, frozen=True, tag="agreement"):
    """A session exists. `channels` in the order of opening. `secret` is empty where a pre-shared key gives it."""

    session: Session
    channels: Annotated[tuple[ChannelName, ...], Meta(min_length=1, max_length=CHANNELS_MOST)]
    window_bytes: WindowBytes
    secret: SecretOrNone = b""

    def __repr__(self) -> str:
        """Without the secret: messages are logged."""
        return f"Agreement(session={self.session!r}, channels={self.channels!r}, window_bytes={self.window_bytes})"


class OpenChannel(_Message, frozen=True, tag="open-channel"):
    """The first message on a channel's own connection."""

    session: Session
    role: Role
    index: Index
    proof: Proof

    @property
    def channel(self) -> ChannelName:
        return ChannelName(self.role, self.index)


class ChannelOpened(_Message, frozen=True, tag="channel-opened"):
    """The destination's confirmation, on the channel, with a proof of its own."""

    role: Role
    index: Index
    proof: Proof

    @property
    def channel(self) -> ChannelName:
        return ChannelName(self.role, self.index)


class AllOpen(_Message, frozen=True, tag="all-open"):
    """On control: the destination has confirmed every channel."""

    channels: Annotated[int, Meta(ge=1, le=CHANNELS_MOST)]


class Refuse(_Message, frozen=True, tag="refuse"):
    """No, before anything was touched; every reason at once."""

    reasons: Annotated[tuple[Reason, ...], Meta(min_length=1, max_length=64)]


class Failed(_Message, frozen=True, tag="failed"):
    """It went wrong, and why; `guest` says where the guest is, as far as this side knows (a Whereabouts)."""

    reason: Text
    guest: Name = "unknown"


class Finished(_Message, frozen=True, tag="finished"):
    """This side has received all it expects and everything it wrote was acknowledged."""


class Ping(_Message, frozen=True, tag="ping"):
    number: U32


class Pong(_Message, frozen=True, tag="pong"):
    number: U32


class Attached(_Message, frozen=True, tag="attached"):
    """On control, from the source: its QEMU has opened this connection, and may stay silent on it."""

    role: Role
    index: Index

    @property
    def channel(self) -> ChannelName:
        return ChannelName(self.role, self.index)


class Resume(_Message, frozen=True, tag="resume"):
    """The first message on a connection that takes the place of a broken one. `attempt` only ever grows."""

    session: Session
    role: ResumedRole
    index: Index
    attempt: Annotated[int, Meta(ge=1, le=0xFFFF_FFFF)]
    received_up_to: U64
    proof: Proof

    @property
    def channel(self) -> ChannelName:
        return ChannelName(self.role, self.index)


class ResumeAccepted(_Message, frozen=True, tag="resume-accepted"):
    """The other side's position, for the same attempt."""

    role: ResumedRole
    index: Index
    attempt: Annotated[int, Meta(ge=1, le=0xFFFF_FFFF)]
    received_up_to: U64
    proof: Proof

    @property
    def channel(self) -> ChannelName:
        return ChannelName(self.role, self.index)


Message = (
    Hello
    | Proposal
    | Answer
    | Agreement
    | OpenChannel
    | ChannelOpened
    | AllOpen
    | Refuse
    | Failed
    | Finished
    | Ping
    | Pong
    | Attached
    | Resume
    | ResumeAccepted
)
MESSAGES: tuple[type[Message], ...] = get_args(Message)

_encoder = msgspec.msgpack.Encoder()
_decoders = {kind: msgspec.msgpack.Decoder(kind) for kind in MESSAGES}


def _decode(kind: type[Message], payload: bytes | bytearray | memoryview) -> Message:
    """With what the types alone cannot say: raises ValueError as they do."""
    message = _decoders[kind].decode(payload)
    if isinstance(message, Hello):
        if message.version_lowest > message.version_highest:
            raise ValueError(f"versions {message.version_lowest} to {message.version_highest}")
        _check_facts(message.facts)
    elif isinstance(message, Proposal):
        _check_facts(message.guest)
    return message


def _check_facts(facts: HostFacts | GuestFacts) -> None:
    length = len(_encoder.encode(facts))
    if length > FACTS_LONGEST_BYTES:
        raise ValueError(f"facts of {length} bytes, at most {FACTS_LONGEST_BYTES} are accepted")


def encode_payload(message: Message) -> bytes:
    """The msgpack of a message. Raises LocalProtocolError where a field is out of its bounds."""
    try:
        payload = _encoder.encode(message)
        _decode(type(message), payload)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError) as error:
        raise LocalProtocolError(f"{_name(type(message))}: {error}") from None
    return payload


def decode_payload(kind: type[Message], payload: bytes | bytearray | memoryview) -> Message:
    """One message of a kind that the frame has named. Raises RemoteProtocolError without channel and offset."""
    try:
        return _decode(kind, payload)
    except RecursionError:
        raise RemoteProtocolError(f"{_name(kind)}: nested too deeply") from None
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise RemoteProtocolError(f"{_name(kind)}: {error}") from None


def _name(kind: type[Message]) -> str:
    return str(kind.__struct_config__.tag)


def clip(text: str, longest: int = 1024) -> str:
    """`text` within the bound of a Text (or of `longest` characters), the cut marked."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def channel_order(counts: Iterable[ChannelCount]) -> tuple[ChannelName, ...]:
    """Every channel by name, in the order of opening: main, parallel 0..N-1, priority, storage 0..M-1."""
    found = {row.role: row.count for row in counts}
    return tuple(ChannelName(role, index) for role in ROLES for index in range(found.get(role, 0)))
