"""The source's side of a handshake: it begins, proposes, consents, dials every channel, and dials again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import ClassVar

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.facts import GuestFacts
from virtmig.link import states
from virtmig.link.frames import Control, encode_message
from virtmig.link.handshake import Handshake
from virtmig.link.judge import objections
from virtmig.link.messages import (
    CONTROL,
    SECRET_BYTES,
    Agreement,
    AllOpen,
    Answer,
    Attached,
    Attachment,
    ChannelName,
    ChannelOpened,
    Hello,
    Message,
    OpenChannel,
    Proposal,
    Reason,
    Refuse,
    Resume,
    ResumeAccepted,
    Value,
    channel_order,
)
from virtmig.link.proofs import OPEN, OPENED, RESUME, RESUMED, initiator_proof, responder_proof, same
from virtmig.link.side import (
    Action,
    Close,
    Dial,
    Established,
    Heard,
    Opened,
    Send,
    Terms,
    common_version,
    objections_to,
)
from virtmig.link.states import State, Table

Consent = Callable[[Proposal, Answer], list[Reason]]


class Initiator(Handshake):
    """The source's side. `consent` says what it cannot accept in an answer."""

    table: ClassVar[Table] = states.INITIATOR
    finishes_first: ClassVar[bool] = True

    def __init__(
        self,
        terms: Terms,
        control: Hashable,
        now: float,
        *,
        request: Mapping[str, Value],
        guest: GuestFacts,
        fixed: tuple[str, ...] = (),
        attachments: tuple[Attachment, ...] = (),
        consent: Consent = objections,
        peer: str = "",
    ) -> None:
        super().__init__(terms, control, now, peer=peer)
        self._request, self._guest, self._fixed, self._consent = dict(request), guest, fixed, consent
        self._attachments = attachments
        self._attached: list[ChannelName] = []
        self._hello_frame = b""
        self._opened: set[ChannelName] = set()
        self._all_confirmed = False
        self._attempts: dict[ChannelName, int] = {}
        self._dialled: dict[Hashable, tuple[ChannelName, int]] = {}  # 0: OpenChannel; else the attempt of a Resume

    def begin(self, now: float) -> list[Action]:
        """Say Hello."""
        self._next("begin")
        hello = self._hello()
        actions = self._say(hello)
        self._hello_frame = encode_message(hello)
        self._enter("begin", now)
        return actions

    def _negotiate(self, message: Message, control: Control, now: float) -> list[Action]:
        if isinstance(message, Hello):
            self._check_due("hello", message)
            return self._peers_hello(message, control, now)
        if isinstance(message, Answer):
            self._check_due("answer", message)
            return self._peers_answer(message, control, now)
        if isinstance(message, Agreement):
            self._check_due("agreement", message)
            return self._peers_agreement(message, control, now)
        if isinstance(message, AllOpen):
            self._check_due("all confirmed", message)
            if self._all_confirmed or message.channels != len(self.channels):
                raise RemoteProtocolError(f"all-open of {message.channels} channels, {len(self.channels)} were agreed")
            self._all_confirmed = True
            self._enter("all confirmed", now)
            return self._if_all_open(now)
        raise self._unexpected(message)

    def _peers_hello(self, hello: Hello, control: Control, now: float) -> list[Action]:
        reasons = objections_to(hello, self.terms)
        key = self.terms.key
        if key and not reasons:
            due = responder_proof(key, self._nonce, hello.nonce, self._hello_frame)
            if not same(hello.proof, due):
                reasons = [Reason("key", "the destination did not prove that it has the pre-shared key")]
        if reasons:
            return self.refuse(reasons, now)
        self._transcript.update(control.frame)
        version = common_version(self.terms.versions, hello)
        assert version is not None
        self.proposal = Proposal(
            version=version,
            request=self._request,
            guest=self._guest,
            fixed=self._fixed,
            attachments=self._attachments,
            window_bytes=self.terms.window_bytes,
            proof=initiator_proof(key, self._transcript.digest()) if key else b"",
        )
        self.peer_hello = hello
        actions = [Heard(hello), *self._say(self.proposal)]
        self._enter("hello", now)
        return actions

    def _peers_answer(self, answer: Answer, control: Control, now: float) -> list[Action]:
        assert self.proposal is not None
        self._transcript.update(control.frame)
        self.answer = answer
        if answer.refusals:
            return [Heard(answer), *self._over("refuse", now, answer.refusals)]
        if reasons := self._consent(self.proposal, answer):
            return [Heard(answer), *self.refuse(reasons, now)]
        self._enter("answer", now)
        return [Heard(answer)]

    def _peers_agreement(self, agreement: Agreement, control: Control, now: float) -> list[Action]:
        assert self.answer is not None
        assert self.proposal is not None
        assert self.peer_hello is not None
        if agreement.channels != channel_order(self.answer.channels):
            raise RemoteProtocolError("the agreement's channels are not those of the answer, in order")
        if agreement.window_bytes > self.proposal.window_bytes:
            raise RemoteProtocolError(f"a window of {agreement.window_bytes} bytes, more than was proposed")
        if len(agreement.secret) != (0 if self.terms.key else SECRET_BYTES):
            raise RemoteProtocolError(f"a secret of {len(agreement.secret)} bytes")
        self._transcript.update(control.frame)
        self._agreed(agreement, self._nonce, self.peer_hello.nonce)
        self._enter("agreement", now)
        return [Heard(agreement), *(Dial(channel) for channel in self.channels)]

    # -- channels --------------------------------------------------------------------------------------------------

    def attached(self, channel: ChannelName, now: float) -> list[Action]:
        """This host's QEMU has connected for this channel: the peer is told, once more after a broken control."""
        if channel not in self.channels:
            raise LocalProtocolError(f"{channel} was not agreed")
        self._enter("attached", now)
        self._attached.append(channel)
        return self._send(_attached(channel))

    def _mended(self, channel: ChannelName, connection: Hashable, received_up_to: int, now: float) -> list[Action]:
        actions = super()._mended(channel, connection, received_up_to, now)
        if channel == CONTROL and not self.finished_here:
            for each in self._attached:
                actions += self._send(_attached(each))
        return actions

    def connected(
        self, channel: ChannelName, connection: Hashable, now: float, received_up_to: int = 0
    ) -> list[Action]:
        """What Dial asked for is there. `received_up_to`: how far this side has received, when the channel goes on."""
        if self._proofs is None:
            raise LocalProtocolError(f"{channel} cannot be opened in state {str(self.state)!r}")
        dialled = {known for known, _ in self._dialled.values()}
        if self.state is State.OPENING and channel in self.channels and channel not in self._opened | dialled:
            self._dialled[connection] = channel, 0
            proof = self._proofs.of(OPEN, channel)
            opening = OpenChannel(
                session=self.session,
                role=channel.role,  # type: ignore[arg-type]  # not CONTROL: that is never agreed
                index=channel.index,
                proof=proof,
            )
            return [Send(connection, opening, encode_message(opening))]
        if self.state is State.RECONNECTING and channel in self._broken and channel not in dialled:
            attempt = self._attempts[channel] = self._attempts.get(channel, 0) + 1
            self._dialled[connection] = channel, attempt
            resume = Resume(
                session=self.session,
                role=channel.role,
                index=channel.index,
                attempt=attempt,
                received_up_to=received_up_to,
                proof=self._proofs.of_attempt(RESUME, channel, attempt, received_up_to),
            )
            return [Send(connection, resume, encode_message(resume))]
        return [Close(connection)]  # no longer needed: it finished, failed or came back in the meantime

    def receive_on(self, connection: Hashable, control: Control, now: float) -> list[Action]:
        """A message on a connection that `connected` named. Raises RemoteProtocolError."""
        dialled = self._dialled.get(connection)
        if dialled is None or self._proofs is None:
            return []  # closed in the meantime
        channel, attempt = dialled
        message = control.message
        if isinstance(message, Refuse):
            if attempt and channel not in self._broken:
                del self._dialled[connection]
                return [Close(connection)]
            text = "; ".join(row.reason for row in message.reasons)
            return self.fail(f"the destination refused {channel}: {text}", now)
        if isinstance(message, ChannelOpened) and not attempt and message.channel == channel:
            self._check_proof(message.proof, self._proofs.of(OPENED, channel), channel, control)
            del self._dialled[connection]
            self._connections[channel] = connection
            self._opened.add(channel)
            self._enter("channel opened", now)
            return [Opened(channel, connection), *self._if_all_open(now)]
        if isinstance(message, ResumeAccepted) and attempt and (message.channel, message.attempt) == dialled:
            due = self._proofs.of_attempt(RESUMED, channel, attempt, message.received_up_to)
            self._check_proof(message.proof, due, channel, control)
            del self._dialled[connection]
            if channel not in self._broken:
                return [Close(connection)]
            self._enter("resumed", now)
            return self._mended(channel, connection, message.received_up_to, now)
        raise RemoteProtocolError(
            f"{channel}: an answer to something else", channel=str(channel), offset=control.offset
        )

    def _check_proof(self, proof: bytes, due: bytes, channel: ChannelName, control: Control) -> None:
        if not same(proof, due):
            text = f"{channel}: whoever answers does not know the session's secret"
            raise RemoteProtocolError(text, channel=str(channel), offset=control.offset)

    def _if_all_open(self, now: float) -> list[Action]:
        if not self._all_confirmed or len(self._opened) < len(self.channels):
            return []
        self._enter("all open", now)
        return [Established()]

    def lost(self, connection: Hashable, now: float, why: str = "closed by the peer") -> list[Action]:
        """As on any side; a connection that was just dialled is dialled again while reconnecting."""
        if connection not in self._dialled:
            return super().lost(connection, now, why)
        channel, attempt = self._dialled.pop(connection)
        if attempt:
            return [Dial(channel)] if channel in self._broken else []
        return self.fail(f"the connection of {channel} was lost while it was opened: {why}", now)

    def _break(self, channel: ChannelName) -> list[Action]:
        return [*super()._break(channel), Dial(channel)]

    def _waiting(self) -> list[Hashable]:
        connections = list(self._dialled)
        self._dialled.clear()
        return connections


def _attached(channel: ChannelName) -> Attached:
    return Attached(role=channel.role, index=channel.index)  # type: ignore[arg-type]  # CONTROL is never agreed
