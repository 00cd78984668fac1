"""The states of the handshake and what leads from one to the next, as tables, one for each side.

CONNECTED -> HELLO -> PROPOSED -> AGREED -> OPENING -> ESTABLISHED -> RUNNING -> FINISHED. Before ESTABLISHED either
side may refuse, with reasons: REFUSED. Before RUNNING a lost connection is a failure: nothing of the guest was sent.
While RUNNING it leads to RECONNECTING, and from there back, or to FAILED. The initiator is the source, which dials; the
responder is the destination, which accepts. Every state has a deadline: how long it may last.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class State(enum.StrEnum):
    CONNECTED = "connected"
    HELLO = "hello"
    PROPOSED = "proposed"
    AGREED = "agreed"
    OPENING = "opening"
    ESTABLISHED = "established"
    RUNNING = "running"
    RECONNECTING = "reconnecting"
    FINISHED = "finished"
    REFUSED = "refused"
    FAILED = "failed"


S = State
Table = Mapping[tuple[State, str], State]

FINAL = frozenset({S.FINISHED, S.REFUSED, S.FAILED})
#: how many seconds a state may last; in RUNNING how long the peer may be silent
DEADLINE_S: dict[State, float] = {
    S.CONNECTED: 10,
    S.HELLO: 10,
    S.PROPOSED: 30,  # the destination may have to ask its libvirt and start a QEMU to learn what it can
    S.AGREED: 10,
    S.OPENING: 30,
    S.ESTABLISHED: 120,  # both QEMUs are being started
    S.RUNNING: 30,
    S.RECONNECTING: 60,
    S.FINISHED: 60,  # a peer whose connection broke on the last message may ask once more
    S.REFUSED: 5,  # for the last message to leave
    S.FAILED: 5,
}
#: when nothing was heard for so long, ask; three questions fit into the silence that RUNNING allows
PING_AFTER_S = 8.0

# fmt: off
_BOTH: dict[tuple[State, str], State] = {
    (S.ESTABLISHED, "run"): S.RUNNING,
    (S.ESTABLISHED, "ping"): S.ESTABLISHED,
    (S.ESTABLISHED, "pong"): S.ESTABLISHED,
    (S.RUNNING, "ping"): S.RUNNING,
    (S.RUNNING, "pong"): S.RUNNING,
    (S.RUNNING, "half finished"): S.RUNNING,             # one side has said Finished
    (S.RUNNING, "both finished"): S.FINISHED,
    (S.RUNNING, "lost"): S.RECONNECTING,
    (S.RECONNECTING, "lost"): S.RECONNECTING,
    (S.RECONNECTING, "ping"): S.RECONNECTING,            # control may live while a channel is gone
    (S.RECONNECTING, "pong"): S.RECONNECTING,
    (S.RECONNECTING, "half finished"): S.RECONNECTING,
    (S.RECONNECTING, "both finished"): S.FINISHED,
    (S.RECONNECTING, "resumed"): S.RECONNECTING,
    (S.RECONNECTING, "all resumed"): S.RUNNING,
    (S.FINISHED, "lost"): S.FINISHED,
    (S.FINISHED, "half finished"): S.FINISHED,           # said again after a broken connection
    (S.FINISHED, "both finished"): S.FINISHED,
    (S.FINISHED, "ping"): S.FINISHED,                    # sent before the other's Finished came
    (S.FINISHED, "pong"): S.FINISHED,
    (S.REFUSED, "lost"): S.REFUSED,
    (S.FAILED, "lost"): S.FAILED,
    **{(state, "refuse"): S.REFUSED for state in (S.CONNECTED, S.HELLO, S.PROPOSED, S.AGREED, S.OPENING)},
    **{(state, "lost"): S.FAILED for state in (
        S.CONNECTED, S.HELLO, S.PROPOSED, S.AGREED, S.OPENING, S.ESTABLISHED)},
    **{(state, "fail"): S.FAILED for state in State if state not in FINAL},
    **{(state, "expired"): S.FAILED for state in State if state not in FINAL | {S.RUNNING}},
    (S.RUNNING, "expired"): S.RECONNECTING,              # the peer is silent: all connections are taken for lost
    **{(state, "expired"): state for state in FINAL},    # the session may be forgotten
}

#: the source, which dials
INITIATOR: Table = {
    **_BOTH,
    (S.CONNECTED, "begin"): S.HELLO,
    (S.HELLO, "hello"): S.PROPOSED,
    (S.PROPOSED, "answer"): S.AGREED,
    (S.AGREED, "agreement"): S.OPENING,
    (S.OPENING, "channel opened"): S.OPENING,
    (S.OPENING, "ping"): S.OPENING,                      # the destination is established one message earlier
    (S.OPENING, "all confirmed"): S.OPENING,             # AllOpen came before the last ChannelOpened
    (S.OPENING, "all open"): S.ESTABLISHED,
    (S.ESTABLISHED, "attached"): S.RUNNING,              # this host's QEMU has connected
    (S.RUNNING, "attached"): S.RUNNING,
    (S.RECONNECTING, "attached"): S.RECONNECTING,        # said when control is back
}

#: the destination, which accepts
RESPONDER: Table = {
    **_BOTH,
    (S.CONNECTED, "hello"): S.HELLO,
    (S.HELLO, "proposal"): S.PROPOSED,
    (S.PROPOSED, "agree"): S.AGREED,
    (S.AGREED, "channel opened"): S.OPENING,
    (S.OPENING, "channel opened"): S.OPENING,
    (S.OPENING, "all open"): S.ESTABLISHED,
    (S.ESTABLISHED, "attached"): S.RUNNING,              # the source's QEMU has connected
    (S.RUNNING, "attached"): S.RUNNING,
    (S.RECONNECTING, "attached"): S.RECONNECTING,
    (S.FINISHED, "attached"): S.FINISHED,                # said again after a broken connection
    (S.RUNNING, "resumed"): S.RECONNECTING,              # the peer dialled again before the loss was seen here
    (S.FINISHED, "resumed"): S.FINISHED,                 # to hear Finished once more
}
# fmt: on

EVENTS = tuple(dict.fromkeys(event for table in (INITIATOR, RESPONDER) for _, event in table))
