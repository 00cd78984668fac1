"""Proofs: HMAC-SHA256 over what both sides know, under a label that says who proves what. Comparing is constant-time.

    responder's Hello    key     "virtmig responder" || initiator's nonce || responder's nonce || SHA-256(Hello frame)
    initiator's Proposal key     "virtmig initiator" || transcript of both Hello frames
    session secret       key     "virtmig secret"    || transcript up to and with Agreement
    a channel            secret  label || session || name || both nonces (|| u32 attempt || u64 received up to)

A transcript is the SHA-256 of whole frames in the order they were sent; a Proposal's own proof counts in it as well.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass, field

from virtmig.errors import LocalProtocolError
from virtmig.link.messages import ChannelName

RESPONDER = b"virtmig responder"
INITIATOR = b"virtmig initiator"
SECRET = b"virtmig secret"
OPEN = b"virtmig open"
OPENED = b"virtmig opened"
RESUME = b"virtmig resume"
RESUMED = b"virtmig resumed"
#: shorter keys can be guessed from one recorded handshake
KEY_SHORTEST_BYTES = 16


def same(one: bytes, other: bytes) -> bool:
    """Compared in constant time."""
    return hmac.compare_digest(one, other)


def check_key(key: bytes) -> bytes:
    """Raises LocalProtocolError for a pre-shared key that is too short to prove anything; empty means none."""
    if key and len(key) < KEY_SHORTEST_BYTES:
        raise LocalProtocolError(
            f"a pre-shared key of {len(key)} bytes", hint=f"use at least {KEY_SHORTEST_BYTES} random bytes"
        )
    return key


def responder_proof(key: bytes, initiator_nonce: bytes, responder_nonce: bytes, hello_frame: bytes) -> bytes:
    """That the responder has the key; `hello_frame` is the initiator's Hello, as it arrived."""
    return _hmac(key, RESPONDER, initiator_nonce, responder_nonce, hashlib.sha256(hello_frame).digest())


def initiator_proof(key: bytes, transcript: bytes) -> bytes:
    """That the initiator has the key, and that both saw the same two Hellos."""
    return _hmac(key, INITIATOR, transcript)


def session_secret(key: bytes, transcript: bytes) -> bytes:
    """The secret of the channels where a key is in use: whoever saw another handshake has another secret."""
    return _hmac(key, SECRET, transcript)


@dataclass(frozen=True, slots=True)
class ChannelProofs:
    """Proofs for the channels of one session."""

    secret: bytes = field(repr=False)
    session: bytes
    initiator_nonce: bytes
    responder_nonce: bytes

    def of(self, label: bytes, channel: ChannelName) -> bytes:
        """For OpenChannel (OPEN) and ChannelOpened (OPENED)."""
        return _hmac(self.secret, label, *self._named(channel))

    def of_attempt(self, label: bytes, channel: ChannelName, attempt: int, received_up_to: int) -> bytes:
        """For Resume (RESUME) and ResumeAccepted (RESUMED)."""
        return _hmac(self.secret, label, *self._named(channel), struct.pack(">IQ", attempt, received_up_to))

    def _named(self, channel: ChannelName) -> tuple[bytes, ...]:
        role = channel.role.encode()
        name = struct.pack(">B", len(role)) + role + struct.pack(">I", channel.index)
        return self.session, name, self.initiator_nonce, self.responder_nonce


def _hmac(key: bytes, label: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, label + b"".join(parts), "sha256")
