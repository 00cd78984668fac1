"""A second implementation, written from PROTOCOL.md: it shares no code with virtmig.link and talks to it in bytes.

Below the line `shell` stands what an agent does around virtmig.link: bytes to calls, actions to bytes. Above it nothing
of virtmig is imported.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

PREFACE = bytes.fromhex("89564d4c494e4b0a")
NAMES = {
    1: "hello", 2: "proposal", 3: "answer", 4: "agreement", 5: "open-channel", 6: "channel-opened", 7: "all-open",
    8: "refuse", 9: "failed", 10: "finished", 11: "ping", 12: "pong", 13: "resume", 14: "resume-accepted",
    15: "attached",
}  # fmt: skip
NUMBERS = {name: number for number, name in NAMES.items()}
DATA, ACK, END = 0x20, 0x21, 0x22


# -- msgpack, as far as it is needed -------------------------------------------------------------------------------


def pack(value: Any) -> bytes:
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return bytes([value]) if 0 <= value < 128 else b"\xcf" + struct.pack(">Q", value)
    if isinstance(value, str):
        text = value.encode()
        return b"\xdb" + struct.pack(">I", len(text)) + text
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, (list, tuple)):
        return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(pack, value))
    items = b"".join(pack(key) + pack(item) for key, item in value.items())
    return b"\xdf" + struct.pack(">I", len(value)) + items


def unpack(data: bytes) -> Any:
    value, rest = _unpack(data)
    assert rest == b""
    return value


def _unpack(data: bytes) -> tuple[Any, bytes]:
    first, rest = data[0], data[1:]
    if first < 0x80:
        return first, rest
    if first < 0x90:
        return _map(first & 15, rest)
    if first < 0xA0:
        return _array(first & 15, rest)
    if first < 0xC0:
        return rest[: first & 31].decode(), rest[first & 31 :]
    if first in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], rest
    if 0xCC <= first <= 0xCF:
        size = 1 << (first - 0xCC)
        return int.from_bytes(rest[:size], "big"), rest[size:]
    if first >= 0xE0:
        return first - 256, rest
    family, size = {
        0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4), 0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4),
        0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
    }[first]  # fmt: skip
    length, rest = int.from_bytes(rest[:size], "big"), rest[size:]
    if family == "array":
        return _array(length, rest)
    if family == "map":
        return _map(length, rest)
    return (rest[:length] if family == "bin" else rest[:length].decode()), rest[length:]


def _array(count: int, rest: bytes) -> tuple[list[Any], bytes]:
    found = []
    for _ in range(count):
        value, rest = _unpack(rest)
        found.append(value)
    return found, rest


def _map(count: int, rest: bytes) -> tuple[dict[Any, Any], bytes]:
    found = {}
    for _ in range(count):
        key, rest = _unpack(rest)
        found[key], rest = _unpack(rest)
    return found, rest


# -- frames and proofs ---------------------------------------------------------------------------------------------


def frame(kind: int, payload: bytes, flags: int = 0) -> bytes:
    return struct.pack(">BBHI", kind, flags, 0, len(payload)) + payload


def say(name: str, **fields: Any) -> bytes:
    return frame(NUMBERS[name], pack({"message": name, **fields}))


def data(position: int, contents: bytes) -> bytes:
    return frame(DATA, struct.pack(">Q", position) + contents)


class Reader:
    """Frames of one direction: (type, fields of a message or payload, whole frame)."""

    def __init__(self) -> None:
        self.buffer, self.preface = b"", False

    def feed(self, received: bytes) -> list[tuple[int, Any, bytes]]:
        self.buffer += received
        found = []
        if not self.preface and len(self.buffer) >= 8:
            assert self.buffer[:8] == PREFACE
            self.buffer, self.preface = self.buffer[8:], True
        while self.preface and len(self.buffer) >= 8:
            kind, _, _, length = struct.unpack(">BBHI", self.buffer[:8])
            if len(self.buffer) < 8 + length:
                break
            whole, self.buffer = self.buffer[: 8 + length], self.buffer[8 + length :]
            fields = unpack(whole[8:]) if kind in NAMES else whole[8:]
            assert kind not in NAMES or fields["message"] == NAMES[kind]
            found.append((kind, fields, whole))
        return found


def mac(key: bytes, label: bytes, *parts: bytes) -> bytes:
    return hmac.new(key, label + b"".join(parts), hashlib.sha256).digest()


class Session:
    """What both sides know once it was agreed."""

    def __init__(self, secret: bytes, session: bytes, source_nonce: bytes, destination_nonce: bytes) -> None:
        self.secret, self.session, self.nonces = secret, session, source_nonce + destination_nonce

    def proof(self, label: bytes, role: str, index: int, *attempt: int) -> bytes:
        name = bytes([len(role)]) + role.encode() + struct.pack(">I", index)
        more = struct.pack(">IQ", *attempt) if attempt else b""
        return mac(self.secret, label, self.session, name, self.nonces, more)


# -- shell: virtmig.link behind bytes ------------------------------------------------------------------------------

from tests.support.hosts import DESTINATION, GUEST, SOURCE, ask  # noqa: E402
from virtmig.link.channel import Received, ResumableChannel, RoomMade  # noqa: E402
from virtmig.link.frames import BOUND, FIRST, ON_CHANNEL, ON_CONTROL, Control, FrameDecoder, FrameType  # noqa: E402
from virtmig.link.frames import PREFACE as OURS  # noqa: E402
from virtmig.link.initiator import Initiator  # noqa: E402
from virtmig.link.judge import judge_by  # noqa: E402
from virtmig.link.messages import MESSAGES, Hello, OpenChannel, Resume  # noqa: E402
from virtmig.link.responder import Responder  # noqa: E402
from virtmig.link.side import Close, Dial, Established, Opened, Over, Resumed, Send, Side, Terms  # noqa: E402
from virtmig.link.states import DEADLINE_S, PING_AFTER_S, State  # noqa: E402
from virtmig.plan import negotiate  # noqa: E402

KEY = b"sixteen or more random bytes"
WINDOW = 1 << 16


class Shell:
    """An agent without sockets: what it writes to each connection is in `out`."""

    def __init__(self) -> None:
        self.side: Side
        self.out: dict[str, bytearray] = {}
        self.decoders: dict[str, FrameDecoder] = {}
        self.channels: dict[str, ResumableChannel] = {}
        self.by_name: dict[str, ResumableChannel] = {}
        self.got: dict[str, bytearray] = {}
        self.events: list[Any] = []

    def connection(self, name: str, accept: frozenset[FrameType] = FIRST) -> None:
        self.out[name] = bytearray(OURS)
        self.decoders[name] = FrameDecoder(name, accept)

    def act(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.out[action.connection] += action.frame
            elif isinstance(action, Opened):
                self.by_name[str(action.channel)] = ResumableChannel(str(action.channel), self.side.window_bytes)
                self.attach(str(action.channel), action.connection)
            elif isinstance(action, Resumed):
                if action.channel.role != "control":
                    self.attach(str(action.channel), action.connection)
                    self.write(action.connection, self.by_name[str(action.channel)].resume(action.received_up_to))
                else:
                    self.decoders[action.connection].accept = ON_CONTROL
            self.events.append(action)

    def attach(self, channel: str, connection: Any) -> None:
        self.channels[connection] = self.by_name[channel]
        self.got.setdefault(channel, bytearray())
        self.decoders[connection].accept = ON_CHANNEL

    def write(self, connection: str, buffers: list[Any]) -> None:
        self.out[connection] += b"".join(buffers)

    def feed(self, connection: str, received: bytes) -> bytes:
        """Byte by byte; what is said in return on that connection."""
        for at in range(len(received)):
            self.decoders[connection].feed(received[at : at + 1])
            for event in self.decoders[connection].events():
                if connection in self.channels:
                    found = self.channels[connection].receive(event)
                    if isinstance(found, Received):
                        self.got[self.channels[connection].name] += found.data
                        self.write(connection, self.channels[connection].consumed(len(found.data)))
                    elif not isinstance(found, RoomMade):
                        self.write(connection, self.channels[connection].consumed(1))
                else:
                    assert isinstance(event, Control)
                    self.act(self.call(connection, event))
        return self.said(connection)

    def call(self, connection: str, event: Control) -> list[Any]:
        if isinstance(event.message, Hello):
            self.decoders[connection].accept = ON_CONTROL
        if isinstance(self.side, Responder) and isinstance(event.message, OpenChannel):
            return self.side.open_channel(connection, event.message, 0.0, peer="hand")
        if isinstance(self.side, Responder) and isinstance(event.message, Resume):
            known = self.by_name.get(str(event.message.channel))
            if known is not None:
                known.broken()
            up_to = known.received_up_to if known is not None else 0
            return self.side.resume(connection, event.message, 0.0, received_up_to=lambda: up_to, peer="hand")
        if isinstance(self.side, Initiator) and connection in self.side._dialled:
            return self.side.receive_on(connection, event, 0.0)
        return self.side.receive(event, 0.0)

    def said(self, connection: str) -> bytes:
        found = bytes(self.out[connection])
        self.out[connection].clear()
        return found


def counting(seed: int) -> Any:
    return lambda length: bytes((seed + at) % 256 for at in range(length))


def ours(key: bytes, facts: Any, seed: int) -> Terms:
    return Terms(facts=facts, random=counting(seed), key=key, window_bytes=WINDOW)


# -- the hand-written source against virtmig's destination ---------------------------------------------------------


def hello(nonce: bytes, facts: dict[str, Any], key: bytes, **more: Any) -> bytes:
    features = ["resume", "something else"]
    return say("hello", version_lowest=1, version_highest=9, implementation="by hand", nonce=nonce, facts=facts,
               features=features, mandatory=["resume"], keyed=bool(key), later=[1, None], **more)  # fmt: skip


def by_hand(shell: Shell, key: bytes) -> tuple[Session, dict[str, Any]]:
    """The handshake up to the agreement, as PROTOCOL.md tells it."""
    shell.connection("control")
    shell.side = Responder(ours(key, DESTINATION, 50), "control", 0.0, judge=judge_by(negotiate), peer="hand")
    reader, nonce = Reader(), bytes(range(32))
    first = hello(nonce, {"uri": "qemu:///by-hand", "libvirt_version": 11_003_000, "qemu_version": 10_001_000}, key)
    optional = frame(0xEE, b"skip me", flags=1)
    [(kind, theirs, second)] = reader.feed(shell.feed("control", PREFACE + first + optional))
    assert NAMES[kind] == "hello"
    assert theirs["version_lowest"] <= 1 <= theirs["version_highest"]
    if key:
        due = mac(key, b"virtmig responder", nonce, theirs["nonce"], hashlib.sha256(first).digest())
        assert theirs["proof"] == due
    proof = mac(key, b"virtmig initiator", hashlib.sha256(first + second).digest()) if key else b""
    request = dict(ask("live", "parallel", parallel_connections=2))
    guest = {"name": "opal", "state": "running", "qemu_version": 10_001_000}
    third = say("proposal", version=1, request=request, guest=guest, window_bytes=1 << 20, fixed=[], proof=proof)
    (answered, answer, fourth), (agreed, agreement, fifth) = reader.feed(shell.feed("control", third))
    assert (NAMES[answered], NAMES[agreed]) == ("answer", "agreement")
    assert {row["outcome"] for row in answer["verdicts"]} == {"accepted"}
    assert agreement["channels"] == [
        {"role": "main", "index": 0}, {"role": "parallel", "index": 0}, {"role": "parallel", "index": 1},
    ]  # fmt: skip
    assert agreement["window_bytes"] == WINDOW
    transcript = hashlib.sha256(first + second + third + fourth + fifth).digest()
    secret = mac(key, b"virtmig secret", transcript) if key else agreement["secret"]
    assert (agreement["secret"] == b"") == bool(key)
    return Session(secret, agreement["session"], nonce, theirs["nonce"]), agreement


@pytest.mark.parametrize("key", [b"", KEY])
def test_a_hand_written_source_migrates_to_our_destination_and_resumes(key: bytes) -> None:
    shell = Shell()
    session, agreement = by_hand(shell, key)
    readers = {}
    for at, name in enumerate(agreement["channels"]):
        shell.connection(f"c{at}")
        readers[at] = Reader()
        proof = session.proof(b"virtmig open", name["role"], name["index"])
        opening = say("open-channel", session=session.session, proof=proof, **name)
        [(kind, opened, _)] = readers[at].feed(shell.feed(f"c{at}", PREFACE + opening))
        assert NAMES[kind] == "channel-opened"
        assert opened["proof"] == session.proof(b"virtmig opened", name["role"], name["index"])
    control = Reader()
    control.preface = True
    [(kind, fields, _)] = control.feed(shell.said("control"))
    assert (NAMES[kind], fields["channels"]) == ("all-open", 3)
    assert isinstance(shell.events[-1], Established)
    shell.side.run(0.0)

    # bytes on main, both ways, more than a quarter of the window: an ACK comes back
    contents = bytes(range(256)) * 80
    [(kind, payload, _)] = readers[0].feed(shell.feed("c0", data(0, contents[:20000])))
    assert (kind, payload) == (ACK, struct.pack(">Q", 16384))
    shell.write("c0", shell.channels["c0"].write(b"the answer"))
    [(kind, payload, _)] = readers[0].feed(shell.said("c0"))
    assert (kind, payload) == (DATA, struct.pack(">Q", 0) + b"the answer")

    # main breaks in the middle of a frame; by then 20300 bytes had arrived there, and 3 of the answer here
    assert shell.feed("c0", data(20000, contents[20000:])[: 16 + 300]) == b""
    shell.side.lost("c0", 0.0)
    assert shell.side.state is State.RECONNECTING
    shell.connection("c9")
    attempt = 1, 3
    resume = say("resume", session=session.session, role="main", index=0, attempt=1, received_up_to=3,
                 proof=session.proof(b"virtmig resume", "main", 0, *attempt))  # fmt: skip
    reader = Reader()
    (accepted, fields, _), (acked, up_to, _), (kind, payload, _) = reader.feed(shell.feed("c9", PREFACE + resume))
    assert NAMES[accepted] == "resume-accepted"
    assert fields["received_up_to"] == 20300
    assert fields["proof"] == session.proof(b"virtmig resumed", "main", 0, 1, 20300)
    assert (acked, up_to) == (ACK, struct.pack(">Q", 20300))
    assert (kind, payload) == (DATA, struct.pack(">Q", 3) + b" answer")
    assert shell.side.state is State.RUNNING

    # the rest, the end of both directions, and the end of it all
    rest = data(20300, contents[20300:]) + frame(END, struct.pack(">Q", len(contents)))
    [(kind, payload, _)] = reader.feed(shell.feed("c9", rest + frame(ACK, struct.pack(">Q", 10))))
    assert (kind, payload) == (ACK, struct.pack(">Q", len(contents) + 1))
    shell.write("c9", shell.channels["c9"].end())
    assert [row[:2] for row in reader.feed(shell.said("c9"))] == [(END, struct.pack(">Q", 10))]
    shell.feed("c9", frame(ACK, struct.pack(">Q", 11)))
    assert shell.channels["c9"].done
    assert shell.got["main"] == contents
    [(kind, fields, _)] = control.feed(shell.feed("control", say("ping", number=77)))
    assert (NAMES[kind], fields["number"]) == ("pong", 77)
    shell.feed("control", say("finished"))
    shell.act(shell.side.finish(0.0))
    assert [NAMES[row[0]] for row in control.feed(shell.said("control"))] == ["finished"]
    assert isinstance(shell.events[-1], Over)
    assert shell.side.state is State.FINISHED


def test_a_hand_written_source_is_refused_where_it_must_be() -> None:
    shell = Shell()
    session, _ = by_hand(shell, b"")
    for at, (role, label) in enumerate([("main", b"virtmig opened"), ("priority", b"virtmig open")]):
        shell.connection(f"c{at}")
        message = say("open-channel", session=session.session, role=role, index=0, proof=session.proof(label, role, 0))
        [(kind, fields, _)] = Reader().feed(shell.feed(f"c{at}", PREFACE + message))
        assert NAMES[kind] == "refuse"
        assert fields["reasons"][0]["reason"]
        assert shell.events[-1] == Close(f"c{at}")
    assert shell.side.state is State.AGREED


# -- virtmig's source against the hand-written destination ---------------------------------------------------------


@pytest.mark.parametrize("key", [b"", KEY])
def test_our_source_migrates_to_a_hand_written_destination_and_resumes(key: bytes) -> None:
    shell = Shell()
    shell.connection("control", ON_CONTROL)
    request = dict(ask("live", "parallel", parallel_connections=10))
    shell.side = source = Initiator(ours(key, SOURCE, 9), "control", 0.0, request=request, guest=GUEST)
    reader, nonce = Reader(), bytes(range(100, 132))
    shell.act(source.begin(0.0))
    [(_, theirs, first)] = reader.feed(shell.said("control"))
    proof = mac(key, b"virtmig responder", theirs["nonce"], nonce, hashlib.sha256(first).digest()) if key else b""
    second = hello(nonce, {"uri": "qemu:///by-hand"}, key, proof=proof)
    [(kind, proposal, third)] = reader.feed(shell.feed("control", PREFACE + second))
    assert NAMES[kind] == "proposal"
    assert proposal["version"] == 1
    assert proposal["request"]["parallel-connections"] == 10
    assert proposal["proof"] == (
        mac(key, b"virtmig initiator", hashlib.sha256(first + second).digest()) if key else b""
    )
    fourth = say(
        "answer",
        verdicts=[{"feature": "parallel-connections", "outcome": "adjusted", "reason": "two are enough", "given": "2"}],
        settled={**proposal["request"], "parallel-connections": 2},
        channels=[{"role": "parallel", "count": 2}, {"role": "main", "count": 1}],
    )
    channels = [{"role": "main", "index": 0}, {"role": "parallel", "index": 0}, {"role": "parallel", "index": 1}]
    secret = b"" if key else bytes(range(60, 92))
    fifth = say("agreement", session=b"sixteen bytes id", channels=channels, window_bytes=65536, secret=secret)
    shell.feed("control", fourth + fifth)
    transcript = hashlib.sha256(first + second + third + fourth + fifth).digest()
    session = Session(
        mac(key, b"virtmig secret", transcript) if key else secret, b"sixteen bytes id", theirs["nonce"], nonce
    )
    dials = [event.channel for event in shell.events if isinstance(event, Dial)]
    assert [str(channel) for channel in dials] == ["main", "parallel 0", "parallel 1"]
    shell.feed("control", say("all-open", channels=3))  # overtakes the confirmations
    for at, channel in enumerate(dials):
        shell.connection(f"c{at}", ON_CHANNEL)
        shell.act(source.connected(channel, f"c{at}", 0.0))
        [(kind, opening, _)] = Reader().feed(shell.said(f"c{at}"))
        name = channels[at]
        assert NAMES[kind] == "open-channel"
        assert {field: opening[field] for field in name} == name
        assert opening["proof"] == session.proof(b"virtmig open", name["role"], name["index"])
        opened = say("channel-opened", proof=session.proof(b"virtmig opened", name["role"], name["index"]), **name)
        shell.feed(f"c{at}", PREFACE + opened)
    assert isinstance(shell.events[-1], Established)
    source.run(0.0)

    # parallel 1 breaks after 7 of 16 bytes had arrived; the rest comes again, and its end
    channel = shell.channels["c2"]
    shell.write("c2", channel.write(b"sixteen bytes it"))
    channel.broken()
    assert channel.end() == []
    shell.act(source.lost("c2", 0.0))
    assert shell.events[-1] == Dial(dials[2])
    shell.connection("c9", ON_CHANNEL)
    shell.act(source.connected(dials[2], "c9", 0.0, channel.received_up_to))
    reader = Reader()
    [(kind, resume, _)] = reader.feed(shell.said("c9"))
    assert NAMES[kind] == "resume"
    assert resume["proof"] == session.proof(b"virtmig resume", "parallel", 1, resume["attempt"], 0)
    accepted = say("resume-accepted", role="parallel", index=1, attempt=resume["attempt"], received_up_to=7,
                   proof=session.proof(b"virtmig resumed", "parallel", 1, resume["attempt"], 7))  # fmt: skip
    rows = reader.feed(shell.feed("c9", PREFACE + accepted))
    assert [row[:2] for row in rows] == [
        (DATA, struct.pack(">Q", 7) + b" bytes it"),
        (END, struct.pack(">Q", 16)),
    ]
    assert source.state is State.RUNNING


# -- the page itself -----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "virtmig/link/PROTOCOL.md").read_text()


def test_the_pages_table_of_frames_is_the_codes() -> None:
    rows = re.findall(r"^\| (0x\w\w) \| (\w+) \| (\d+) \|", PAGE, re.MULTILINE)
    assert [(int(number, 16), name, int(bound)) for number, name, bound in rows] == [
        (int(kind), kind.name, BOUND[kind]) for kind in FrameType
    ]
    assert {int(kind): kind.name.lower().replace("_", "-") for kind in FrameType if kind < 0x20} == NAMES


def test_the_pages_table_of_messages_is_the_codes() -> None:
    section = PAGE.partition("## Messages")[2].partition("## Order")[0]
    rows = dict(re.findall(r"^\| ([a-z-]+) \|(.*)\|$", section, re.MULTILINE))
    for kind in MESSAGES:
        text = rows[kind.__struct_config__.tag].replace("{`role`, `count` 1 to 512}", "").replace("as `request`", "")
        text = re.sub(r"`(source|destination|split|unknown|control)`", "", text)
        fields = [(name, not optional) for name, optional in re.findall(r"`(\w+)`(\?)?", text)]
        assert fields == [(field.encode_name, field.required) for field in msgspec.structs.fields(kind)]


def test_the_pages_table_of_deadlines_is_the_codes() -> None:
    section = PAGE.partition("## Deadlines")[2]
    found = {name: float(seconds) for name, seconds in re.findall(r"(\w+) \| (\d+) \|", section)}
    assert found == {str(state): seconds for state, seconds in DEADLINE_S.items()}
    assert f"After {PING_AFTER_S:g} s" in section


def test_the_page_is_one_page() -> None:
    assert len(PAGE.splitlines()) <= 160
