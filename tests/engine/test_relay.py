"""Carriers and lines over real sockets: socket pairs, TCP and TLS. No byte is lost, doubled or held for ever."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import random
import select
import socket
import ssl
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtmig.engine.lines import Line, drop
from virtmig.engine.relay import (
    BUFFER_BYTES,
    Arrived,
    Carrier,
    CarrierEvent,
    Done,
    LineBroke,
    Moved,
    PeerBroke,
    QemuClosed,
    _Pool,
)
from virtmig.errors import ChannelError
from virtmig.link.frames import (
    PREFACE,
    Control,
    FrameDecoder,
    encode_ack,
    encode_data_header,
    encode_message,
)
from virtmig.link.messages import ChannelName, Ping

MAIN = ChannelName("main")
WAIT_S = 10.0
#: long enough to say "nothing happens" on a machine with other work
STILL_S = 0.3
KIB, MIB = 1 << 10, 1 << 20
SOURCE, DESTINATION = "source", "destination"


# -- lines -----------------------------------------------------------------------------------------------------------


def unix_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dialled = socket.create_connection(server.getsockname(), WAIT_S)
        accepted, _ = server.accept()
    return dialled, accepted


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    client = ssl.create_default_context()
    authority.configure_trust(client)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    return client, server


Way = Callable[[], tuple[socket.socket, socket.socket]]


@pytest.fixture(params=["unix", "tcp", "tls"])
def way(request: pytest.FixtureRequest, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> Way:
    """Connects two agents."""
    if request.param != "tls":
        return unix_pair if request.param == "unix" else tcp_pair

    def tls_pair() -> tuple[socket.socket, socket.socket]:
        dialled, accepted = tcp_pair()
        client, server = contexts
        wrapped: list[ssl.SSLSocket] = []
        thread = threading.Thread(target=lambda: wrapped.append(server.wrap_socket(accepted, server_side=True)))
        thread.start()
        ours = client.wrap_socket(dialled, server_hostname="127.0.0.1")
        thread.join()
        return ours, wrapped[0]

    return tls_pair


def lines(way: Way) -> tuple[Line, Line]:
    first, second = way()
    return Line(first, "the destination"), Line(second, "the source")


def opened() -> FrameDecoder:
    """What has read the preface, as the session's decoders have when they are handed over."""
    decoder = FrameDecoder("main")
    decoder.feed(PREFACE)
    assert not list(decoder.events())
    return decoder


# -- two carriers and a QEMU at each end -----------------------------------------------------------------------------


Event = TypeVar("Event")


class Side:
    """One carrier, the other end of its QEMU's connection, and what it has reported."""

    def __init__(self, window_bytes: int, throttle: Callable[[int], float] | None = None) -> None:
        self.events: queue.SimpleQueue[CarrierEvent] = queue.SimpleQueue()
        self.seen: list[CarrierEvent] = []
        self.carrier = Carrier(MAIN, window_bytes, self.events.put, throttle=throttle)
        self.qemu: socket.socket | None = None
        self.line: Line | None = None

    def meet(self, pair: Way = unix_pair) -> socket.socket:
        """A QEMU's connection; what is returned is QEMU's own end."""
        self.qemu, agents = pair()
        self.qemu.settimeout(WAIT_S)
        self.carrier.attach(agents)
        return self.qemu

    def wait(self, kind: type[Event]) -> Event:
        """The next event of that kind; the ones before it are only remembered."""
        while True:
            event = self.events.get(timeout=WAIT_S)
            self.seen.append(event)
            if isinstance(event, kind):
                return event

    def none_of(self, *kinds: type[CarrierEvent]) -> bool:
        while not self.events.empty():
            self.seen.append(self.events.get())
        return not any(isinstance(event, kinds) for event in self.seen)

    def close(self) -> None:
        self.carrier.close()
        if self.qemu is not None:
            self.qemu.close()


class Relay:
    """A source's and a destination's carrier of one channel, and the lines between them."""

    def __init__(self, way: Way = unix_pair, window_bytes: int = MIB) -> None:
        self.way = way
        self.source = Side(window_bytes)
        self.destination = Side(window_bytes)

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.source, self.destination

    def connect(self) -> None:
        for side, line in zip(self.sides, lines(self.way), strict=True):
            side.line = line
            side.carrier.connect(line, opened())

    def cut(self) -> None:
        """As a network breaks it: what is under way is lost, and both notice."""
        assert self.source.line is not None
        self.source.line.shutdown()
        for side in self.sides:
            assert side.wait(LineBroke).line is side.line

    def resume(self) -> None:
        """As the session does: each side says how far it came, and goes on from where the other is."""
        received = [side.carrier.detach() for side in self.sides]
        for side, line, known in zip(self.sides, lines(self.way), reversed(received), strict=True):
            side.line = line
            side.carrier.resume(line, opened(), known)

    def close(self) -> None:
        for side in self.sides:
            side.close()


@contextlib.contextmanager
def relay(way: Way = unix_pair, window_bytes: int = MIB, *, met: bool = True) -> Iterator[Relay]:
    """Connected; with a QEMU at both ends, unless not `met`."""
    made = Relay(way, window_bytes)
    try:
        made.connect()
        if met:
            for side in made.sides:
                side.meet()
        yield made
    finally:
        made.close()


def qemus(made: Relay) -> tuple[socket.socket, socket.socket]:
    assert made.source.qemu is not None
    assert made.destination.qemu is not None
    return made.source.qemu, made.destination.qemu


def contents(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def read_up_to(sock: socket.socket, count: int) -> bytes:
    """So much; less only at the end."""
    parts = bytearray()
    while len(parts) < count and (part := sock.recv(min(count - len(parts), 65536))):
        parts += part
    return bytes(parts)


class Talker(threading.Thread):
    """A QEMU that writes `data` in pieces, and ends its direction."""

    def __init__(self, sock: socket.socket, data: bytes, piece_bytes: int = 300_000) -> None:
        super().__init__(name="talker", daemon=True)
        self._sock, self._data, self._piece = sock, data, piece_bytes
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            for at in range(0, len(self._data), self._piece):
                self._sock.sendall(self._data[at : at + self._piece])
            self._sock.shutdown(socket.SHUT_WR)


def fill(sock: socket.socket, data: bytes) -> int:
    """Write until nothing more is taken for STILL_S; how much that was."""
    sock.setblocking(False)
    sent = 0
    while sent < len(data) and select.select([], [sock], [], STILL_S)[1]:
        with contextlib.suppress(BlockingIOError):
            sent += sock.send(data[sent:])
    sock.settimeout(WAIT_S)
    return sent


# -- transfer and ends -----------------------------------------------------------------------------------------------


def test_every_byte_arrives_both_ways(way: Way, nothing_left: None) -> None:
    there, back = contents(5 * MIB, 1), contents(3 * MIB + 7, 2)
    with relay(way) as made:
        source, destination = qemus(made)
        talkers = [Talker(source, there), Talker(destination, back, 4097)]
        answers: list[bytes] = []
        reader = threading.Thread(target=lambda: answers.append(read_up_to(source, len(back) + 1)))
        reader.start()
        assert read_up_to(destination, len(there) + 1) == there
        reader.join()
        assert answers == [back]
        for side in made.sides:
            side.wait(Done)
            assert side.none_of(LineBroke, PeerBroke, QemuClosed)
            assert sum(isinstance(event, Moved) for event in side.seen) == 2  # once for each direction
        assert made.source.carrier.bytes_from_qemu == made.destination.carrier.bytes_to_qemu == len(there)
        for talker in talkers:
            talker.join()


@pytest.mark.parametrize("first", [SOURCE, DESTINATION])
def test_directions_end_one_by_one(way: Way, first: str) -> None:
    with relay(way) as made:
        ends, goes_on = qemus(made) if first == SOURCE else qemus(made)[::-1]
        ends.sendall(b"last words")
        ends.shutdown(socket.SHUT_WR)
        assert read_up_to(goes_on, 100) == b"last words"
        data = contents(2 * MIB)
        talker = Talker(goes_on, data)  # long after the other direction has ended
        assert read_up_to(ends, len(data) + 1) == data
        talker.join()
        for side in made.sides:
            side.wait(Done)


def test_a_channel_that_stays_silent_ends_like_any_other(way: Way) -> None:
    with relay(way) as made:
        for qemu in qemus(made):
            qemu.shutdown(socket.SHUT_WR)
        for side in made.sides:
            side.wait(Done)
        assert [qemu.recv(1) for qemu in qemus(made)] == [b"", b""]


def test_qemu_over_tcp_is_carried_as_well() -> None:
    with relay(met=False) as made:
        source, destination = made.source.meet(tcp_pair), made.destination.meet(tcp_pair)
        data = contents(2 * MIB)
        Talker(source, data)
        assert read_up_to(destination, len(data) + 1) == data


# -- cuts ------------------------------------------------------------------------------------------------------------


def test_a_cut_is_only_a_pause(way: Way, nothing_left: None) -> None:
    """Three cuts while both directions are busy; the reader's pace decides where they fall."""
    there, back = contents(4 * MIB, 3), contents(4 * MIB, 4)
    with relay(way, 256 * KIB) as made:
        source, destination = qemus(made)
        talkers = [Talker(source, there), Talker(destination, back)]
        got, answer = bytearray(), bytearray()
        for share in (300_001, 1_000_003, 2_500_000):
            got += read_up_to(destination, share - len(got))
            answer += read_up_to(source, share // 2 - len(answer))
            made.cut()
            made.resume()
        reader = threading.Thread(target=lambda: answer.extend(read_up_to(source, len(back) + 1 - len(answer))))
        reader.start()
        got += read_up_to(destination, len(there) + 1 - len(got))
        reader.join()
        assert bytes(got) == there
        assert bytes(answer) == back
        for side in made.sides:
            side.wait(Done)
        for talker in talkers:
            talker.join()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    window=st.sampled_from([4 * KIB, 40 * KIB, 300 * KIB]),
    sizes=st.tuples(st.integers(0, 200_000), st.integers(0, 200_000)),
    cuts=st.lists(st.tuples(st.integers(0, 120_000), st.integers(0, 120_000)), max_size=5),
    piece=st.sampled_from([11, 4096, 70_000]),
)
def test_cut_anywhere_and_go_on(window: int, sizes: tuple[int, int], cuts: list[tuple[int, int]], piece: int) -> None:
    """A line that lets `cuts` bytes through, each way, and breaks; the last one holds."""
    data = [contents(min(size, 2000 if piece == 11 else size), number) for number, size in enumerate(sizes)]
    made = Relay(unix_pair, window)
    wires: list[Wire] = []
    try:
        for number, limits in enumerate([*cuts, None]):
            received = [side.carrier.detach() for side in made.sides]
            wires.append(wire := Wire(limits))
            for side, line, known in zip(made.sides, wire.lines(), reversed(received), strict=True):
                if number:
                    side.carrier.resume(line, opened(), known)
                else:
                    side.carrier.connect(line, opened())
                    side.meet()
            if not number:
                talkers = [Talker(qemu, each, piece) for qemu, each in zip(qemus(made), data, strict=True)]
                readers = [Reader(qemu) for qemu in qemus(made)]
            if limits is not None:
                wire.broken.wait(0.02)  # it may be that less goes through than it would take
                wire.cut()
        for thread in (*talkers, *readers):
            thread.join(WAIT_S)
        for side in made.sides:
            side.wait(Done)
            assert side.none_of(PeerBroke, QemuClosed)
        assert [reader.digest() for reader in readers] == [hashlib.sha256(each).digest() for each in data[::-1]]
    finally:
        made.close()
        for wire in wires:
            wire.cut()


class Reader(threading.Thread):
    def __init__(self, sock: socket.socket) -> None:
        super().__init__(name="reader", daemon=True)
        self._sock = sock
        self._hash = hashlib.sha256()
        self.start()

    def run(self) -> None:
        while data := self._sock.recv(65536):
            self._hash.update(data)

    def digest(self) -> bytes:
        return self._hash.digest()


class Wire:
    """Two socket pairs with a thread between them, which passes on `limits` bytes each way and then breaks."""

    def __init__(self, limits: tuple[int, int] | None) -> None:
        self._near, near = socket.socketpair()
        self._far, far = socket.socketpair()
        self._outer = near, far
        self._left = list(limits) if limits is not None else [1 << 40, 1 << 40]
        self.broken = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, name="wire", daemon=True)
        self._thread.start()

    def lines(self) -> tuple[Line, Line]:
        return Line(self._outer[0], "the destination"), Line(self._outer[1], "the source")

    def cut(self) -> None:
        for sock in (self._near, self._far):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _pass_on(self) -> None:
        ways = {self._near: (self._far, 0), self._far: (self._near, 1)}
        with contextlib.suppress(OSError):
            while True:
                for sock in select.select(list(ways), [], [])[0]:
                    to, number = ways[sock]
                    data = sock.recv(max(1, min(8192, self._left[number])))
                    self._left[number] -= len(data)
                    to.sendall(data)
                    if not data or self._left[number] <= 0:
                        raise OSError
        self.broken.set()
        self._near.close()
        self._far.close()


def test_what_was_written_without_a_line_goes_over_the_next_one() -> None:
    with relay(met=False) as made:
        source, destination = made.source.meet(), made.destination.meet()
        made.cut()
        source.sendall(b"into the void")
        source.shutdown(socket.SHUT_WR)
        destination.sendall(b"and back")
        made.resume()
        assert read_up_to(destination, 100) == b"into the void"
        assert read_up_to(source, len(b"and back")) == b"and back"


def test_a_full_window_without_a_line_stops_qemu_and_loses_nothing(way: Way) -> None:
    window = 512 * KIB
    with relay(way, window) as made:
        source, destination = qemus(made)
        made.cut()
        data = contents(4 * MIB)
        sent = fill(source, data)
        assert window <= sent < window + 2 * MIB  # the rest is in the socket's own buffer
        assert made.source.carrier.bytes_from_qemu == window
        made.resume()
        talker = Talker(source, data[sent:])
        assert read_up_to(destination, len(data) + 1) == data
        talker.join()


def test_one_side_alone_may_notice_the_break() -> None:
    """The other's connection is taken away by `detach`, when the peer dials again."""
    with relay() as made:
        source, destination = qemus(made)
        source.sendall(b"before")
        assert read_up_to(destination, 6) == b"before"
        assert made.destination.carrier.detach() == 6
        made.source.wait(LineBroke)
        made.resume()
        source.sendall(b"after")
        assert read_up_to(destination, 5) == b"after"
        assert made.destination.none_of(LineBroke)


# -- QEMUs that behave oddly -----------------------------------------------------------------------------------------


def test_a_slow_reader_stops_the_writer_and_not_more_than_a_window_is_kept(way: Way) -> None:
    window = 256 * KIB
    with relay(way, window) as made:
        source, destination = qemus(made)
        data = contents(16 * MIB)
        sent = fill(source, data)
        assert sent < len(data)
        carriers = made.source.carrier, made.destination.carrier
        assert carriers[0].bytes_from_qemu - carriers[1].bytes_to_qemu <= window
        talker = Talker(source, data[sent:])
        assert read_up_to(destination, len(data) + 1) == data
        talker.join()


def test_the_first_bytes_are_told_and_wait_for_qemu() -> None:
    with relay(met=False) as made:
        made.source.meet().sendall(b"hello, anybody?")
        assert made.destination.wait(Arrived).channel == MAIN
        assert made.destination.carrier.bytes_to_qemu == 0
        assert read_up_to(made.destination.meet(), 15) == b"hello, anybody?"
        made.destination.wait(Moved)


def test_nobody_comes_and_nothing_was_to_be_carried() -> None:
    with relay(met=False) as made:
        for side in made.sides:
            side.carrier.nobody_comes()
        for side in made.sides:
            side.wait(Done)


def test_nobody_comes_at_the_destination_and_what_is_carried_is_dropped() -> None:
    with relay(met=False) as made:
        source = made.source.meet()
        data = contents(3 * MIB)
        talker = Talker(source, data)
        made.destination.wait(Arrived)
        made.destination.carrier.nobody_comes()
        talker.join(WAIT_S)  # nothing holds it up
        assert source.recv(1) == b""  # nobody answers
        for side in made.sides:
            side.wait(Done)
        late, agents = socket.socketpair()
        made.destination.carrier.attach(agents)
        with late:
            late.settimeout(WAIT_S)
            assert late.recv(1) == b""


@pytest.mark.parametrize("reset", [False, True])
def test_a_destination_that_closes_early_is_told_and_the_source_is_not_held_up(reset: bool) -> None:
    with relay(met=False) as made:
        source, destination = made.source.meet(), made.destination.meet(tcp_pair if reset else unix_pair)
        data = contents(8 * MIB)
        talker = Talker(source, data)
        read_up_to(destination, 100_000)
        if reset:
            destination.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        destination.close()
        closed = made.destination.wait(QemuClosed)
        assert closed.channel == MAIN
        assert 0 < closed.undelivered_bytes <= len(data)
        talker.join(WAIT_S)
        assert not talker.is_alive()
        for side in made.sides:
            side.wait(Done)


def test_a_source_that_goes_ends_both_directions_for_itself() -> None:
    with relay() as made:
        source, destination = qemus(made)
        source.sendall(b"half a packet")
        assert read_up_to(destination, 13) == b"half a packet"
        source.close()
        assert destination.recv(1) == b""
        destination.sendall(b"who is there?")
        destination.shutdown(socket.SHUT_WR)
        made.source.wait(QemuClosed)
        for side in made.sides:
            side.wait(Done)


def test_a_second_connection_of_qemu_is_refused() -> None:
    with relay() as made:
        second, agents = socket.socketpair()
        made.source.carrier.attach(agents)
        with second:
            second.settimeout(WAIT_S)
            assert second.recv(1) == b""
        qemus(made)[0].sendall(b"still here")
        assert read_up_to(qemus(made)[1], 10) == b"still here"


# -- a peer that breaks the rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (encode_ack(5), "acknowledged up to 5, not between 0 and 0"),
        (encode_data_header(7, 3) + b"abc", "a gap behind 0"),
        (encode_message(Ping(number=7)), "PING cannot come here"),
        (b"\xff" * 16, "unknown flags"),
    ],
)
def test_a_peer_that_breaks_the_rules_is_told_apart_from_a_broken_line(said: bytes, words: str) -> None:
    side = Side(MIB)
    ours, theirs = socket.socketpair()
    with theirs:
        side.carrier.connect(Line(ours, "the peer"), opened())
        theirs.sendall(said)
        assert words in str(side.wait(PeerBroke).error)
        theirs.settimeout(WAIT_S)
        assert theirs.recv(1) == b""
        assert side.none_of(LineBroke)
        side.close()


def test_a_peer_that_says_it_is_where_it_cannot_be() -> None:
    side = Side(MIB)
    ours, theirs = socket.socketpair()
    with theirs:
        side.carrier.resume(Line(ours, "the peer"), opened(), 4711)
        assert "4711" in str(side.wait(PeerBroke).error)
        side.close()


# -- memory, time and the end ----------------------------------------------------------------------------------------


def test_tiny_pieces_do_not_pin_a_buffer_each() -> None:
    """A page request has 12 to 40 bytes; a window of them takes about as much memory as their bytes."""
    pool = _Pool()
    buffers = set()
    for end in range(12, MIB, 12):
        view = pool.room(MIB)
        assert len(view) >= 64 * KIB
        buffers.add(id(pool.take(12, end).obj))
    assert len(buffers) * BUFFER_BYTES <= 2 * MIB
    pool.free(MIB)
    held = pool.room(MIB)
    assert id(held.obj) in buffers  # used again, and no other made


def test_a_window_of_tiny_writes_stays_small() -> None:
    made = Side(8 * MIB)
    outgoing = made.carrier._channel.outgoing
    begun, pieces = tracemalloc.is_tracing(), 60_000
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(pieces):
            outgoing.write(bytes(12))
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        if not begun:
            tracemalloc.stop()
        made.close()
    assert outgoing.kept_bytes == pieces * 12
    assert kept < 3 * pieces * 12
    assert b"".join(outgoing.resume(5)[1::2]) == bytes(pieces * 12 - 5)


def test_a_throttle_is_asked_for_every_read_and_obeyed() -> None:
    asked: list[int] = []

    def throttle(count: int) -> float:
        asked.append(count)
        return 0.01

    source, destination = Side(MIB, throttle), Side(MIB)
    for side, line in zip((source, destination), lines(unix_pair), strict=True):
        side.carrier.connect(line, opened())
    data = contents(MIB)
    began = time.monotonic()
    Talker(source.meet(), data)
    assert read_up_to(destination.meet(), len(data) + 1) == data
    assert sum(asked) == len(data)
    assert time.monotonic() - began >= (len(asked) - 1) * 0.01
    source.close()
    destination.close()


@pytest.mark.parametrize("when", ["new", "connected", "met", "busy", "cut", "done"])
def test_closed_in_any_state_nothing_is_left(when: str, nothing_left: None) -> None:
    made = Relay()
    if when != "new":
        made.connect()
    if when not in ("new", "connected"):
        source, destination = made.source.meet(), made.destination.meet()
    if when == "busy":
        fill(source, contents(4 * MIB))
    if when == "cut":
        made.cut()
    if when == "done":
        source.close()
        destination.close()
        for side in made.sides:
            side.wait(Done)
    made.close()
    made.close()  # again, and nothing happens
    assert not made.source.carrier._thread.is_alive()
    assert made.source.carrier.detach() == (when == "done")  # the end counts as one; who asks late is answered


# -- lines -----------------------------------------------------------------------------------------------------------


def test_a_line_says_not_now_and_never_waits(way: Way) -> None:
    one, other = lines(way)
    assert other.recv_into(memoryview(bytearray(10))) is None
    data = memoryview(contents(16 * MIB))
    sent = 0
    while sent < len(data) and (count := one.send([data[sent : sent + 64 * KIB]])) is not None:
        sent += count
    assert 0 < sent < len(data)
    received = bytearray()
    view = memoryview(bytearray(MIB))
    while len(received) < sent:  # with TLS a part of what was not taken may come too
        poll = select.poll()
        poll.register(other.fileno(), other.events(read=True, write=False))
        assert other.waiting_bytes or poll.poll(WAIT_S * 1000)
        if (count := other.recv_into(view)) is not None:
            received += view[:count]
    assert bytes(received) == data[: len(received)]
    assert one.bytes_sent == sent <= other.bytes_received == len(received)
    one.close()
    other.close()


def test_a_frame_is_read_and_not_a_byte_behind_it(way: Way) -> None:
    one, other = lines(way)
    message = encode_message(Ping(number=7))
    one.write_all([PREFACE, message, b"the carrier's"], time.monotonic() + WAIT_S)
    decoder = FrameDecoder()
    event = other.read_frame(decoder, time.monotonic() + WAIT_S)
    assert isinstance(event, Control)
    assert event.frame == message
    rest = bytearray(13)
    other.read_exactly(memoryview(rest), time.monotonic() + WAIT_S)
    assert rest == b"the carrier's"
    with pytest.raises(ChannelError, match="the source says nothing in time"):
        other.read_frame(decoder, time.monotonic() + 0.05)
    one.close()
    with pytest.raises(ChannelError, match="the source closed the connection"):
        other.read_frame(decoder, time.monotonic() + WAIT_S)
    other.close()


def test_a_peer_that_takes_nothing_and_one_that_is_gone(way: Way) -> None:
    one, other = lines(way)
    with pytest.raises(ChannelError, match="the destination takes nothing in time"):
        one.write_all([bytes(32 * MIB)], time.monotonic() + 0.1)
    other.close()
    with pytest.raises(ChannelError, match="the destination: writing: "):
        one.write_all([bytes(MIB)] * 1000, time.monotonic() + WAIT_S)
    one.close()


def test_whoever_waits_on_a_line_is_woken(way: Way) -> None:
    one, other = lines(way)
    thread = threading.Thread(target=one.shutdown)
    thread.start()
    with pytest.raises(ChannelError, match="the destination"):
        one.read_exactly(memoryview(bytearray(1)), time.monotonic() + WAIT_S)
    thread.join()
    one.close()
    other.close()


def test_taking_bytes_off_a_list() -> None:
    pending = [memoryview(b"abc"), memoryview(b"de"), memoryview(b"f")]
    drop(pending, 4)
    assert [bytes(view) for view in pending] == [b"e", b"f"]
    drop(pending, 2)
    assert not pending
