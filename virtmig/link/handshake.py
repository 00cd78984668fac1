"""The handshake of each side: the source begins and dials (Initiator), the destination judges and accepts (Responder).

    source                          destination
    Hello                     ->
                              <-    Hello (proof of the key)            or Refuse
    Proposal (proof)          ->
                              <-    Answer, Agreement                   or Answer with refusals
    OpenChannel, each on its own connection ->
                              <-    ChannelOpened on each, in order; AllOpen on control with the last

All channels are dialled at once, so that a handshake takes three round trips for any number of them, and those of
connecting twice; they are confirmed in the agreed order, and one that arrives before its turn waits. Nothing of the
guest is sent before Established.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

from virtmig.errors import RemoteProtocolError
from virtmig.link.frames import encode_message
from virtmig.link.messages import Agreement, Answer, Hello, Message, Proposal
from virtmig.link.proofs import ChannelProofs, session_secret
from virtmig.link.side import Action, Side, Terms


class Handshake(Side):
    """What both sides do with what was said: the transcript, and the secret that comes of it."""

    def __init__(self, terms: Terms, control: Hashable, now: float, *, peer: str = "") -> None:
        super().__init__(terms, control, now, peer=peer)
        self.proposal: Proposal | None = None
        self.answer: Answer | None = None
        self._transcript = hashlib.sha256()

    def _say(self, message: Message) -> list[Action]:
        """Send, and remember in the transcript."""
        actions = self._send(message)
        self._transcript.update(encode_message(message))
        return actions

    def _hello(self, proof: bytes = b"") -> Hello:
        terms = self.terms
        return Hello(
            version_lowest=terms.versions[0],
            version_highest=terms.versions[1],
            implementation=terms.implementation,
            nonce=self._nonce,
            facts=terms.facts,
            features=terms.features,
            mandatory=terms.mandatory,
            keyed=bool(terms.key),
            proof=proof,
        )

    def _agreed(self, agreement: Agreement, initiator_nonce: bytes, responder_nonce: bytes) -> None:
        """Called when the transcript ends with the Agreement."""
        key = self.terms.key
        secret = session_secret(key, self._transcript.digest()) if key else agreement.secret
        self._proofs = ChannelProofs(secret, agreement.session, initiator_nonce, responder_nonce)
        self.session, self.channels = agreement.session, agreement.channels
        self.window_bytes = agreement.window_bytes

    def _unexpected(self, message: Message) -> RemoteProtocolError:
        name = message.__struct_config__.tag
        return RemoteProtocolError(f"{name!r} is not the peer's to send on control")
