"""A session: one migration between two agents, from the first word to the last byte.

One thread owns the handshake's state machine (link/), reads the control connection and keeps the time; whatever
happens elsewhere (a channel's line breaks, QEMU connects, a peer dials) is put into its box and done there, in order.
The bytes of the guest go through carriers (engine/relay.py), which never wait for this thread.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from virtmig.agent.handover import ReturnPathWatch
from virtmig.agent.logs import get_logger
from virtmig.agent.meeting import DestinationMeeting, DestinationPlace, Shape, SourceMeeting, SourcePlaces
from virtmig.engine.lines import Line
from virtmig.engine.relay import (
    Arrived,
    Carrier,
    CarrierEvent,
    CarrierFailed,
    Done,
    LineBroke,
    Moved,
    PeerBroke,
    QemuClosed,
    Throttle,
    Withheld,
)
from virtmig.engine.transport import Stop
from virtmig.errors import MigrationError, RemoteProtocolError
from virtmig.link.frames import ON_CHANNEL, ON_CONTROL, PREFACE, Control, FrameDecoder
from virtmig.link.initiator import Initiator
from virtmig.link.messages import CONTROL, Attached, ChannelName, Message, OpenChannel, Resume
from virtmig.link.responder import Responder
from virtmig.link.side import (
    Action,
    Close,
    Dial,
    Established,
    Forget,
    Heard,
    Opened,
    Over,
    Resumed,
    Send,
)
from virtmig.link.states import FINAL, State

log = get_logger("agent")

#: how long a control message may take to be written: less than any deadline of a state
WRITE_S = 5.0
LAST_WORDS_S = 0.2
MAIN = ChannelName("main")


class Follower(Protocol):
    """Who hears what a session does: the journal, the client that asked for it, a log. Called in its thread."""

    def said(self, session: Session, message: Message, *, here: bool) -> None: ...
    def changed(self, session: Session, state: State, words: str) -> None: ...
    def over(self, session: Session, over: Over) -> None: ...
    def handover(self, session: Session) -> str:
        """The source is about to let go; "" or why it may not. In a carrier's thread, which waits for it."""


class Session:
    """The thread "session". `side` decides, `perform` does. Its methods may be called from any thread."""

    def __init__(
        self,
        side: Initiator | Responder,
        control: Line,
        decoder: FrameDecoder,
        *,
        follower: Follower,
        dial: Callable[[ChannelName, Callable[[], bool]], Line] | None = None,
        throttle: Throttle | None = None,
        cleanup: Callable[[], None] = lambda: None,
    ) -> None:
        """`dial(channel, needed)` connects to the peer, as long as `needed()`; raises MigrationError."""
        self.side = side
        self.stop = Stop()
        self.carriers: dict[ChannelName, Carrier] = {}
        #: the guest's bytes are done with, well or not; a session that finished answers its peer for a while yet
        self.over = threading.Event()
        self._follower = follower
        self._dial = dial
        self._throttle = throttle
        self._cleanup = cleanup
        decoder.accept = ON_CONTROL
        self._decoders: dict[Line, FrameDecoder] = {control: decoder}
        self._control: Line | None = control
        self._greeted: set[Line] = set()
        self._dialled: dict[Line, ChannelName] = {}
        self._line_of: dict[ChannelName, Line] = {}
        self._places: SourcePlaces | None = None
        self._place: DestinationPlace | None = None
        self._shape: Shape | None = None
        self._source: SourceMeeting | None = None
        self._destination: DestinationMeeting | None = None
        self._seen = side.state
        self._box: queue.SimpleQueue[Callable[[], list[Action]]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False
        self._close_lock = threading.Lock()
        self._forgotten = False
        self._control_buffer = memoryview(bytearray(64 * 1024))
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)

    # -- from other threads ----------------------------------------------------------------------------------------

    def start(self, first: Callable[[], list[Action]] = list) -> None:
        """`first` is called in the session's thread: what begins it."""
        self.post(first)
        self._thread.start()

    def post(self, call: Callable[[], list[Action]]) -> None:
        """Do this in the session's thread, and carry out what it returns."""
        self._box.put(call)
        with self._close_lock:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def join(self, timeout_s: float | None = None) -> None:
        self._thread.join(timeout_s)

    def fail(self, reason: str, *, guest: str = "unknown") -> None:
        """It went wrong on this host, or somebody gave it up. In a session that is over nothing happens."""
        self.post(lambda: self.side.fail(reason, self._now(), guest=guest))

    def forget(self) -> None:
        """It is over, and its peer is answered no more. Returns when its thread has ended, or does not soon."""

        def end() -> list[Action]:
            self._forgotten = True
            return []

        self.post(end)
        self.join(WRITE_S)

    def meet_source(self, places: SourcePlaces) -> None:
        """Where this host's QEMU will come. The session owns it from now on."""
        self._places = places

    def accept_from(self, listening_uri: str, shape: Shape) -> None:
        """Established at the source: wait for QEMU there."""
        assert self._places is not None
        self._shape = shape
        listeners = self._places.choose(listening_uri)
        self._source = SourceMeeting(listeners, shape, self.stop, self._qemu_came)
        self.stop.on_request(lambda: self.fail(str(self.stop.error), guest="source"))

    def connect_to(self, place: DestinationPlace, shape: Shape) -> None:
        """Agreed at the destination: there QEMU will listen. The session owns it from now on."""
        self._place, self._shape = place, shape

    def opened(self, line: Line, decoder: FrameDecoder, message: OpenChannel | Resume, peer: str) -> None:
        """A connection that names this session came to the destination."""

        def take() -> list[Action]:
            side = self.side
            assert isinstance(side, Responder)
            self._decoders[line] = decoder
            if isinstance(message, OpenChannel):
                return side.open_channel(line, message, self._now(), peer=peer)
            carrier = self.carriers.get(message.channel)
            received = carrier.detach if carrier is not None else (lambda: 0)
            return side.resume(line, message, self._now(), received_up_to=received, peer=peer)

        self.post(take)

    @property
    def running(self) -> bool:
        return self.side.state in (State.RUNNING, State.RECONNECTING)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._forgotten:
                self._turn()
        except Exception:  # a defect of ours: the session fails as any other, and the log has it
            log.exception("internal error in a session", **self.facts())
            with contextlib.suppress(Exception):
                self._perform(self.side.fail("an internal error of the agent, see its log", self._now()))
        finally:
            self._end()

    def _now(self) -> float:
        return time.monotonic()

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if self._control is not None:
            poll.register(self._control.fileno(), self._control.events(read=True, write=False))
        for line in self._dialled:
            poll.register(line.fileno(), line.events(read=True, write=False))
        deadline = self.side.next_deadline()
        wait = None if deadline is None else max(0.0, deadline - self._now()) * 1000 + 1
        if any(line.waiting_bytes for line in (*self._dialled, *([self._control] if self._control else []))):
            wait = 0  # TLS has read ahead
        ready = {fd for fd, _ in poll.poll(wait)}
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        while not self._box.empty():
            self._perform(self._box.get()())
        control = self._control
        if control is not None and (control.fileno() in ready or control.waiting_bytes):
            self._read_control(control)
        for line in [line for line in self._dialled if line.fileno() in ready or line.waiting_bytes]:
            if line in self._dialled:
                self._read_dialled(line)
        self._perform(self.side.expire(self._now()))
        if self.side.next_deadline() is None and self.side.state in FINAL:
            self._forgotten = True

    def _read_control(self, line: Line) -> None:
        decoder = self._decoders[line]
        try:
            count = line.recv_into(self._control_buffer)
            if count is None:
                return
            if not count:
                self._lose(line, "closed by the peer")
                return
            decoder.feed(self._control_buffer[:count])
            for event in decoder.events():
                assert isinstance(event, Control)
                self._perform(self.side.receive(event, self._now()))
                if self._control is not line:
                    return
        except MigrationError as error:
            self._broke(line, error)

    def _read_dialled(self, line: Line) -> None:
        """Exactly the answer: what follows it is the carrier's."""
        decoder = self._decoders[line]
        try:
            view = memoryview(bytearray(decoder.wanted_bytes))
            count = line.recv_into(view)
            if count is None:
                return
            if not count:
                self._lose(line, "closed by the peer")
                return
            decoder.feed(view[:count])
            for event in decoder.events():
                if not isinstance(event, Control):
                    raise MigrationError(f"{self._dialled[line]}: data before it was opened")
                self._perform(self.side.receive_on(line, event, self._now()))  # type: ignore[union-attr]
                return
        except MigrationError as error:
            self._broke(line, error)

    def _broke(self, line: Line, error: MigrationError) -> None:
        """The connection failed, or its peer broke a rule. While running the latter ends the session."""
        if isinstance(error, RemoteProtocolError):
            self._perform(self.side.fail(f"the peer broke the protocol: {error}", self._now()))
        self._lose(line, str(error))

    def _lose(self, line: Line, why: str) -> None:
        self._forget_line(line)
        line.close()
        self._perform(self.side.lost(line, self._now(), why))

    def _forget_line(self, line: Line) -> None:
        if self._control is line:
            self._control = None
        self._dialled.pop(line, None)
        self._decoders.pop(line, None)
        self._greeted.discard(line)
        for channel in [channel for channel, known in self._line_of.items() if known is line]:
            del self._line_of[channel]

    # -- actions ---------------------------------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            self._do(action)
        if self.side.state is not self._seen:
            self._seen = self.side.state
            words = ", ".join(str(channel) for channel in sorted(self.side.broken, key=str))
            self._follower.changed(self, self._seen, f"without {words}" if words else "")

    def _do(self, action: Action) -> None:
        match action:
            case Send(connection=Line() as line):
                self._send(line, action)
            case Dial():
                self._dial_for(action.channel)
            # a line that broke while it was confirmed is forgotten already, and the side knows
            case Opened(connection=Line() as line):
                if line in self._decoders:
                    self._open(action.channel, line)
            case Resumed(connection=Line() as line):
                if line in self._decoders:
                    self._resume(action.channel, line, action.received_up_to)
            case Heard():
                self._hear(action.message)
            case Close(connection=Line() as line):
                self._close_line(line)
            case Established():
                if self._place is not None and self._shape is not None:
                    self._meet_destination(self._place, self._shape)
            case Over():
                self._stop_carrying()
                self._follower.over(self, action)
                self.over.set()
            case Forget():
                self._forgotten = True

    def _send(self, line: Line, action: Send) -> None:
        parts = [action.frame] if line in self._greeted else [PREFACE, action.frame]
        self._greeted.add(line)
        if line is self._control:
            self._follower.said(self, action.message, here=True)
        try:
            line.write_all(parts, self._now() + WRITE_S)
        except MigrationError as error:
            self._lose(line, str(error))

    def _dial_for(self, channel: ChannelName) -> None:
        dial = self._dial
        assert dial is not None

        def needed() -> bool:
            return self.side.state not in FINAL and not self._closed

        def connect() -> None:
            try:
                line = dial(channel, needed)
            except MigrationError as error:
                words = f"{channel}: {error}"
                if needed():
                    self.post(lambda: self._not_dialled(words))
                return
            self.post(lambda: self._connected(channel, line))

        threading.Thread(target=connect, name=f"dial {channel}", daemon=True).start()

    def _not_dialled(self, words: str) -> list[Action]:
        if self.side.state is State.RECONNECTING:
            return []  # dialled for as long as it may last: the deadline says the rest
        return self.side.fail(words, self._now())

    def _connected(self, channel: ChannelName, line: Line) -> list[Action]:
        side = self.side
        assert isinstance(side, Initiator)
        if side.state in FINAL:
            line.close()
            return []
        decoder = FrameDecoder(str(channel), ON_CONTROL | ON_CHANNEL)
        self._decoders[line] = decoder
        self._dialled[line] = channel
        carrier = self.carriers.get(channel)
        received = carrier.detach() if carrier is not None and side.state is State.RECONNECTING else 0
        return side.connected(channel, line, self._now(), received)

    def _open(self, channel: ChannelName, line: Line) -> None:
        self._dialled.pop(line, None)
        watch = ReturnPathWatch(lambda: self._follower.handover(self)) if channel == MAIN else None
        here = isinstance(self.side, Responder)
        carrier = Carrier(channel, self.side.window_bytes, self._report, throttle=self._throttle,
                          watch_from_qemu=watch if here else None, watch_to_qemu=None if here else watch)  # fmt: skip
        self.carriers[channel] = carrier
        self._line_of[channel] = line
        carrier.connect(line, self._decoders.pop(line))

    def _resume(self, channel: ChannelName, line: Line, received_up_to: int) -> None:
        self._dialled.pop(line, None)
        if channel == CONTROL:
            self._control = line
            self._decoders[line].accept = ON_CONTROL
            return
        self._line_of[channel] = line
        self.carriers[channel].resume(line, self._decoders.pop(line), received_up_to)

    def _close_line(self, line: Line) -> None:
        for channel, known in list(self._line_of.items()):
            if known is line and channel in self.carriers:
                self.carriers[channel].detach()
        self._forget_line(line)
        line.close()

    def _hear(self, message: Message) -> None:
        self._follower.said(self, message, here=False)
        if isinstance(message, Attached):
            self._reach_qemu(lambda meeting: meeting.announced(message.channel))

    # -- carriers and QEMU -----------------------------------------------------------------------------------------

    def _report(self, event: CarrierEvent) -> None:
        self.post(lambda: self._carrier_says(event))

    def _carrier_says(self, event: CarrierEvent) -> list[Action]:
        match event:
            case Arrived():
                self._run_if_established()
                self._reach_qemu(lambda meeting: meeting.arrived(event.channel))
            case Moved():
                self._reach_qemu(lambda meeting: meeting.go_on())
            case LineBroke():
                self._forget_line(event.line)
                if not self.running:
                    self._last_words()
                return self.side.lost(event.line, self._now(), event.why)
            case Withheld():
                return self.side.fail(f"the source keeps the guest: {event.why}", self._now(), guest="source")
            case PeerBroke():
                return self.side.fail(f"{event.channel}: the peer broke the protocol: {event.error}", self._now())
            case CarrierFailed():
                log.error("internal error in a relay", error=repr(event.error), **self.facts())
                return self.side.fail(f"{event.channel}: an internal error of the agent, see its log", self._now())
            case QemuClosed():
                if isinstance(self.side, Responder) and not self._main_done():
                    words = f"QEMU of the destination has closed {event.channel}, {event.undelivered_bytes} bytes early"
                    return self.side.fail(words, self._now())
            case Done():
                return self._ended_channel()
        return []

    def _last_words(self) -> None:
        """A peer that gives up says why on control before it closes the rest."""
        control = self._control
        if control is not None:
            poll = select.poll()
            poll.register(control.fileno(), select.POLLIN)
            if control.waiting_bytes or poll.poll(LAST_WORDS_S * 1000):
                self._read_control(control)

    def _main_done(self) -> bool:
        return MAIN in self.carriers and self.carriers[MAIN].done

    def _ended_channel(self) -> list[Action]:
        if not self._main_done():
            return []
        for carrier in self.carriers.values():
            carrier.nobody_comes()
        if all(carrier.done for carrier in self.carriers.values()) and not self.side.finished_here:
            self._run_if_established()
            if self.side.state in (State.RUNNING, State.RECONNECTING):
                return self.side.finish(self._now())
        return []

    def _run_if_established(self) -> None:
        if self.side.state is State.ESTABLISHED:
            self._perform(self.side.run(self._now()))

    def _reach_qemu(self, call: Callable[[DestinationMeeting], None]) -> None:
        if self._destination is None or self.side.state in FINAL:
            return
        try:
            call(self._destination)
        except MigrationError as error:
            self._perform(self.side.fail(str(error), self._now()))

    def _meet_destination(self, place: DestinationPlace, shape: Shape) -> None:
        meeting = self._destination = DestinationMeeting(place, shape, self.carriers)
        if not shape.recovery:
            return

        def wait() -> None:
            if (connection := meeting.await_recovering_qemu(self.stop)) is not None:
                self.post(lambda: take(connection))

        def take(connection: socket.socket) -> list[Action]:
            if self.side.state in FINAL:
                connection.close()
            else:
                self._reach_qemu(lambda known: known.recovering(connection))
            return []

        threading.Thread(target=wait, name="await QEMU", daemon=True).start()

    def _qemu_came(self, channel: ChannelName, connection: socket.socket) -> None:
        """In the thread that accepts."""

        def take() -> list[Action]:
            side = self.side
            assert isinstance(side, Initiator)
            if channel not in self.carriers or side.state in FINAL or side.state is State.OPENING:
                connection.close()
                return []
            actions = side.attached(channel, self._now())
            self.carriers[channel].attach(connection)
            return actions

        self.post(take)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _stop_carrying(self) -> None:
        self.stop.request()
        if self._source is not None:
            self._source.close()
            self._source = None
        if self._places is not None:
            self._places.close()
            self._places = None
        if self._place is not None:
            self._place.close()
            self._place = None
        for carrier in self.carriers.values():
            carrier.close()
        self._cleanup()
        self._cleanup = lambda: None

    def _end(self) -> None:
        self._stop_carrying()
        with self._close_lock:
            self._closed = True
            os.close(self._wake)
        while not self._box.empty():  # a line that was dialled at the last moment closes itself
            with contextlib.suppress(Exception):
                self._box.get()()
        for line in [*self._decoders, *self._dialled, *([self._control] if self._control else [])]:
            line.close()
        self.over.set()

    def carried(self) -> dict[str, tuple[int, int]]:
        """Bytes from QEMU and to it, per channel. From any thread."""
        return {str(name): (each.bytes_from_qemu, each.bytes_to_qemu) for name, each in list(self.carriers.items())}

    def facts(self) -> Mapping[str, Any]:
        """For people and logs."""
        return {"session": self.side.session.hex(), "peer": self.side.peer, "bytes": self.carried()}
