"""The destination's side of a handshake: it answers, agrees, accepts channels in order, and accepts them again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import ClassVar

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.link import states
from virtmig.link.frames import Control, encode_message
from virtmig.link.handshake import Handshake
from virtmig.link.judge import Hosts, Judge
from virtmig.link.messages import (
    CONTROL,
    SECRET_BYTES,
    SESSION_BYTES,
    WINDOW_LARGEST_BYTES,
    WINDOW_SMALLEST_BYTES,
    Agreement,
    AllOpen,
    Answer,
    Attached,
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
    channel_order,
)
from virtmig.link.proofs import OPEN, OPENED, RESUME, RESUMED, initiator_proof, responder_proof, same
from virtmig.link.side import Action, Close, Established, Heard, Opened, Send, Terms, common_version, objections_to
from virtmig.link.states import State, Table


class Responder(Handshake):
    """The destination's side. Without `judge` the caller sees Heard(proposal) and calls `give_answer` itself."""

    table: ClassVar[Table] = states.RESPONDER
    finishes_first: ClassVar[bool] = False

    def __init__(
        self, terms: Terms, control: Hashable, now: float, *, judge: Judge | None = None, peer: str = ""
    ) -> None:
        super().__init__(terms, control, now, peer=peer)
        self._judge = judge
        self._held: dict[ChannelName, Hashable] = {}  # proved, and waiting for its turn
        self._opened = 0
        self._attempts: dict[ChannelName, int] = {}

    def _negotiate(self, message: Message, control: Control, now: float) -> list[Action]:
        if isinstance(message, Hello):
            self._check_due("hello", message)
            return self._peers_hello(message, control, now)
        if isinstance(message, Proposal):
            self._check_due("proposal", message)
            return self._peers_proposal(message, control, now)
        if isinstance(message, Attached):
            self._check_due("attached", message)
            if message.channel not in self.channels:
                raise RemoteProtocolError(f"{message.channel} was not agreed")
            self._enter("attached", now)
            return [Heard(message)]
        raise self._unexpected(message)

    def _peers_hello(self, hello: Hello, control: Control, now: float) -> list[Action]:
        if reasons := objections_to(hello, self.terms):
            return self.refuse(reasons, now)
        key = self.terms.key
        self._transcript.update(control.frame)
        self.peer_hello = hello
        proof = responder_proof(key, hello.nonce, self._nonce, control.frame) if key else b""
        actions = [Heard(hello), *self._say(self._hello(proof))]
        self._enter("hello", now)
        return actions

    def _peers_proposal(self, proposal: Proposal, control: Control, now: float) -> list[Action]:
        assert self.peer_hello is not None
        key = self.terms.key
        if key and not same(proposal.proof, initiator_proof(key, self._transcript.digest())):
            return self.refuse([Reason("key", "the source did not prove that it has the pre-shared key")], now)
        if proposal.version != common_version(self.terms.versions, self.peer_hello):
            raise RemoteProtocolError(f"version {proposal.version} is not the highest that both speak")
        self._transcript.update(control.frame)
        self.proposal = proposal
        self._enter("proposal", now)
        actions: list[Action] = [Heard(proposal)]
        if self._judge is not None:
            hosts = Hosts(self.peer_hello.facts, self.terms.facts)
            actions += self.give_answer(self._judge(proposal, hosts), now)
        return actions

    def give_answer(self, answer: Answer, now: float) -> list[Action]:
        """Answer the proposal; with refusals in it that is the end, without them there is an Agreement."""
        self._next("agree")
        assert self.proposal is not None
        assert self.peer_hello is not None
        refusals = answer.refusals
        channels = channel_order(answer.channels)
        if not refusals and (not channels or channels[0].role != "main"):
            raise LocalProtocolError("an answer without refusals and without a main channel")
        if refusals:
            self.answer = answer
            return self._over("refuse", now, refusals, self._say(answer))
        window = min(self.proposal.window_bytes, self.terms.window_bytes)
        agreement = Agreement(
            session=self.terms.random(SESSION_BYTES),
            channels=channels,
            window_bytes=max(WINDOW_SMALLEST_BYTES, min(WINDOW_LARGEST_BYTES, window)),
            secret=b"" if self.terms.key else self.terms.random(SECRET_BYTES),
        )
        actions = [*self._say(answer), *self._say(agreement)]
        self.answer = answer
        self._agreed(agreement, self.peer_hello.nonce, self._nonce)
        self._enter("agree", now)
        return actions

    # -- channels --------------------------------------------------------------------------------------------------

    def open_channel(self, connection: Hashable, message: OpenChannel, now: float, *, peer: str = "") -> list[Action]:
        """A connection that began with OpenChannel for this session. Refusing it does not touch the session."""
        channel, proofs = message.channel, self._proofs
        problem = ""
        if proofs is None or not same(message.session, self.session) or peer != self.peer:
            problem = "no such session for this peer"
        elif not same(message.proof, proofs.of(OPEN, channel)):
            problem = "the proof is wrong"
        elif channel not in self.channels:
            problem = f"{channel} was not agreed"
        elif channel in self._connections or channel in self._held or self.state not in (State.AGREED, State.OPENING):
            problem = f"{channel} cannot be opened in state {str(self.state)!r}, or was opened before"
        if problem:
            return self._refuse_connection(connection, problem)
        self._held[channel] = connection
        actions: list[Action] = []
        while self._opened < len(self.channels) and (turn := self.channels[self._opened]) in self._held:
            actions += self._confirm(turn, now)
        return actions

    def _confirm(self, channel: ChannelName, now: float) -> list[Action]:
        assert self._proofs is not None
        connection = self._connections[channel] = self._held.pop(channel)
        opened = ChannelOpened(role=channel.role, index=channel.index, proof=self._proofs.of(OPENED, channel))  # type: ignore[arg-type]
        self._opened += 1
        self._enter("channel opened", now)
        actions: list[Action] = [Send(connection, opened, encode_message(opened)), Opened(channel, connection)]
        if self._opened == len(self.channels):
            actions += self._send(AllOpen(channels=self._opened))
            self._enter("all open", now)
            actions.append(Established())
        return actions

    def resume(
        self,
        connection: Hashable,
        message: Resume,
        now: float,
        *,
        received_up_to: Callable[[], int] = lambda: 0,
        peer: str = "",
    ) -> list[Action]:
        """A connection that began with Resume. The old one, when it still seems to live, is closed.

        `received_up_to` is called once the peer has proved itself: how far this side has received on that channel,
        after which nothing more may be read from the old connection.
        """
        channel, proofs = message.channel, self._proofs
        problem = ""
        if proofs is None or not same(message.session, self.session) or peer != self.peer:
            problem = "no such session for this peer"
        elif not same(message.proof, proofs.of_attempt(RESUME, channel, message.attempt, message.received_up_to)):
            problem = "the proof is wrong"
        elif channel != CONTROL and channel not in self.channels:
            problem = f"{channel} was not agreed"
        elif message.attempt <= self._attempts.get(channel, 0):
            problem = f"attempt {message.attempt} to resume {channel} was made before"
        elif (self.state, "resumed") not in self.table:
            problem = f"{channel} cannot be resumed in state {str(self.state)!r}"
        if problem or proofs is None:
            return self._refuse_connection(connection, problem)
        actions: list[Action] = []
        if channel in self._connections:
            actions.append(Close(self._connections[channel]))
        self._attempts[channel] = message.attempt
        received = received_up_to()
        accepted = ResumeAccepted(
            role=channel.role,
            index=channel.index,
            attempt=message.attempt,
            received_up_to=received,
            proof=proofs.of_attempt(RESUMED, channel, message.attempt, received),
        )
        actions.append(Send(connection, accepted, encode_message(accepted)))
        self._enter("resumed", now)
        return actions + self._mended(channel, connection, message.received_up_to, now)

    def lost(self, connection: Hashable, now: float, why: str = "closed by the peer") -> list[Action]:
        """As on any side; a channel that waits for its turn counts like one that was open."""
        held = next((name for name, known in self._held.items() if known == connection), None)
        if held is None:
            return super().lost(connection, now, why)
        del self._held[held]
        return self.fail(f"the connection of {held} was lost while it waited for its turn: {why}", now)

    def _refuse_connection(self, connection: Hashable, problem: str) -> list[Action]:
        refusal = Refuse(reasons=(Reason("channel", problem, ""),))
        return [Send(connection, refusal, encode_message(refusal)), Close(connection)]

    def _waiting(self) -> list[Hashable]:
        connections = list(self._held.values())
        self._held.clear()
        return connections
