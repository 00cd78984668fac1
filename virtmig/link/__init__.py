"""virtmig's own protocol between hosts: bytes to events, events to bytes. No socket, no clock, no thread.

PROTOCOL.md    all of it in one page
messages.py    the control messages, typed and bounded
frames.py      what stands before each of them, and before each piece of a channel's bytes
proofs.py      who has the key, and which connection belongs to a session
states.py      the states of a handshake and their transition tables
judge.py       the destination's answer to a proposal, and the source's consent
side.py        what both sides do alike: deadlines, pings, ends, broken connections
handshake.py   what was said on the way to a session; initiator.py the source's part, responder.py the destination's
channel.py     a resumable byte channel: what is not acknowledged is kept, and sent again
"""
