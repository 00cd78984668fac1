"""Be the destination of a migration: of a QEMU of any age, or of another engine.

    listener -> [accept] -> one thread a channel: [main] [multifd 0] ... [preempt] -> Loading -> Landing

The source's guest stays stopped from the end of its stream until SHUT 0, which is written when the landing has
everything for good; every failure before lets it run on. After a postcopy's RUN nobody may go back: a broken
connection is then a pause, and the listener waits for the source to come again. A disk that is full then is waited for
with the connection open: a source that has sent its last page cannot send it again.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import traceback
from dataclasses import dataclass

from virtmig.engine.channels import Arrivals
from virtmig.engine.landing import Landing
from virtmig.engine.loading import Epochs, Loading
from virtmig.engine.manifest import Manifest
from virtmig.engine.memory import NoRoom
from virtmig.engine.patience import DiskRoom, Pause, Tell, tell_nobody
from virtmig.engine.transport import STALL_S, Connection, Listener, Stop
from virtmig.errors import ChannelError, MigrationError, RemoteProtocolError
from virtmig.pages import PAGE_BYTES
from virtmig.progress import Whereabouts
from virtmig.stream.channel import Expected, Identity, Role
from virtmig.stream.channel_rules import Rule
from virtmig.stream.commands import ping
from virtmig.stream.decoder import PreemptDecoder, QemuStreamDecoder
from virtmig.stream.encoder import encode_event
from virtmig.stream.events import DeviceSection, EndOfRam, Pages, StreamHeader, ZeroPages
from virtmig.stream.multifd import DeviceState, MultifdDecoder, MultifdHello, MultifdPacket
from virtmig.stream.ram import RamReader
from virtmig.stream.return_path import PageRequester, ReturnPathEvent, Shut, encode_return_path

#: one read of the main channel
_READ_BYTES = 1 << 20
#: the last word of an engine as source, behind the end of the stream: it has heard SHUT 0 and lets go of the guest.
#: Without it the guest's process does not run here: a source that did not hear SHUT 0 runs it.
GIVEN_UP = bytes(encode_event(ping(0x56)))
#: how long the source may take to close its channels after SHUT 0, and to begin the description after EOF
LINGER_S = 5.0
#: what becomes of a source that has sent all of a postcopy and hears no SHUT (seen of 7.2, 10.0 and 11.1)
UNTOLD = (
    "a source of QEMU 7.2 stays in postcopy-active with its guest stopped: quit it; one of 10.0 or newer has failed "
    "and runs its guest on"
)


@dataclass(frozen=True, slots=True)
class Received:
    """What came. `elapsed_s` counts from the first connection; `commit_s` is how long the source waited for SHUT 0."""

    pages_normal: int
    pages_zero: int
    pages_twice: int
    bytes_received: int
    elapsed_s: float
    commit_s: float
    postcopy: bool
    recoveries: int
    channels: tuple[str, ...]


class Incoming:
    """One migration into one landing. `run` blocks until the guest is here, or raises; `stop` ends it from outside.

    `multifd_channels` must be what the source was told, as nothing on the wire says it. `compression` None: whatever
    the first packet uses. `recover_s`: how long a paused postcopy waits for its source, None for as long as it takes.
    `switchover_ack`: whether the source waits for one (switchover_ack.py); None: found out where it can be.
    """

    def __init__(
        self,
        listener: Listener,
        landing: Landing,
        stop: Stop,
        *,
        multifd_channels: int = 0,
        compression: str | None = None,
        stall_s: float = STALL_S,
        recover_s: float | None = None,
        switchover_ack: bool | None = None,
        tell: Tell = tell_nobody,
    ) -> None:
        self._landing = landing
        self._tell = tell
        self._stop = Stop()
        self._forget = stop.on_request(lambda: self._stop.request(stop.error))
        self._stall_s = stall_s
        self._pause = Pause(recover_s)
        self._room = DiskRoom(self._stop, tell)
        self._multifd_channels = multifd_channels
        self._compression = compression
        self._bytes = 0
        self._connections: dict[str, Connection] = {}
        self._epochs = Epochs(multifd_channels, self._stop, stall_s, self._received) if multifd_channels else None
        self.loading = Loading(landing, self._answer, self._epochs, self._resume, self._no_room, switchover_ack)
        self.loading.facts["multifd_channels"] = multifd_channels
        expected = Expected(
            Rule.VIRTMIG, multifd_channels=multifd_channels, postcopy=True, preempt=True, early_preempt=True
        )
        self._arrivals = Arrivals(listener, expected, self._stop, self._arrived)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._forget_wake = self._stop.on_request(self._wake)
        self._threads: list[threading.Thread] = []
        self._channels: list[str] = []
        self._ram: RamReader | None = None
        self._uuid: bytes | None = None
        self._first: float | None = None
        self._commit_s = 0.0
        self._done = False
        self._told_split = False
        self._writing = threading.Lock()
        self._requester = PageRequester()
        self._may_ask = True  # not between a pause and RESUME: a source takes no requests then
        self._crash: BaseException | None = None
        self._late: MigrationError | None = None
        landing.attach(self.request)

    # -- for the caller ----------------------------------------------------------------------------------------------

    def run(self) -> Received:
        """Blocks. Raises MigrationError whose `guest` says where the guest is; threads and sockets are gone then."""
        self._arrivals.start()
        try:
            with self._changed:
                while not self._done and not self._stop.requested.is_set():
                    self._changed.wait(self._pause.left_s)
                    if self._pause.overdue:
                        late = f"the source did not come again within {self._pause.recover_s:g} s"
                        self._stop.request(ChannelError(late))
        finally:
            if not self._done:
                self._stop.request()
            self._end()
        if self._crash is not None:
            self._failure()
            raise self._crash
        if not self._done:
            raise self._failure()
        if self._late is not None:
            raise self._late
        began = self._first or time.monotonic()
        loading = self.loading
        return Received(
            loading.pages_normal, loading.pages_zero, loading.pages_twice, self._bytes, time.monotonic() - began,
            self._commit_s, loading.split, self._pause.recoveries, tuple(self._channels),
        )  # fmt: skip

    def continue_from(self, manifest: Manifest, sections: list[DeviceSection]) -> None:
        """Before `run`: go on with a postcopy whose process has ended; the source sends every page again."""
        header = StreamHeader(3, manifest.machine, manifest.subsections)
        lengths = {block.name: block.length for block in manifest.blocks}
        self.loading.restore(header, lengths, sections)
        self.loading.ram_section_id = manifest.ram_section_id
        self._ram = RamReader(known=lengths)
        self._ram.huge = {block.name: block.page_size for block in manifest.blocks if block.page_size != PAGE_BYTES}
        self._may_ask = False
        self._pause.begin()
        self._arrivals.recover()

    def request(self, block: str, start_bytes: int, length_bytes: int) -> None:
        """Ask the source for pages first; without effect while the connection is broken."""
        with self._writing:
            main = self._connections.get("main")
            if main is not None and self.loading.split and self._may_ask:
                with contextlib.suppress(MigrationError):
                    main.send(self._requester.request(block, start_bytes, length_bytes))

    def _received(self) -> int:
        return self._bytes + sum(connection.bytes_received for connection in list(self._connections.values()))

    @property
    def begun(self) -> bool:
        """Somebody has connected and was named."""
        return self._first is not None

    @property
    def paused(self) -> bool:
        """A broken postcopy waits for its source."""
        return self._pause.since is not None

    # -- connections -------------------------------------------------------------------------------------------------

    def _arrived(self, identity: Identity, sock: socket.socket) -> None:
        """In the thread "accept"."""
        name = identity.role.value if identity.role is not Role.MULTIFD else f"multifd {identity.index}"
        quiet = identity.role is not Role.MAIN
        connection = Connection(sock, self._stop, name=name, stall_s=None if quiet else self._stall_s)
        work = {Role.MAIN: self._main, Role.MULTIFD: self._multifd, Role.PREEMPT: self._preempt}[identity.role]
        with self._lock:
            self._first = self._first or time.monotonic()
            old = self._connections.get(name)
            if old is not None:
                old.close()
            self._connections[name] = connection
            self._channels.append(name)
            thread = threading.Thread(target=self._guarded, args=(work, connection, identity), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _guarded(self, work: object, connection: Connection, identity: Identity) -> None:
        try:
            work(connection, identity)  # type: ignore[operator]
        except MigrationError as error:
            traceback.clear_frames(error.__traceback__)  # what they held of the guest's memory could not be unmapped
            if identity.role is Role.PREEMPT and not self.loading.split:
                connection.shutdown()  # nothing is sent there before LISTEN: a stranger
                self._arrivals.forget(identity)
            else:
                self._broken(error, connection, identity.role)
        except BaseException as error:  # a defect of ours: it must not leave the others waiting
            self._crash = error
            self._stop.request(MigrationError(f"{connection.name}: {type(error).__name__}: {error}"))
        finally:
            with self._lock:
                self._bytes += connection.bytes_received
                connection.bytes_received = 0

    def _broken(self, error: MigrationError, connection: Connection, role: Role) -> None:
        paused = False
        with self._changed:
            if self._done or self._stop.requested.is_set():
                return
            if self.loading.over and role is not Role.MAIN:
                return  # all has come; how the others end means nothing any more
            if self._connections.get(connection.name) is not connection:
                return  # of a connection that was replaced
            if (
                self.loading.split
                and role is not Role.MULTIFD
                and isinstance(error, ChannelError | RemoteProtocolError)
            ):
                paused = self._break()
                if not paused:
                    return
        if paused:
            self._tell("paused", f"the connection is broken: {error}", reason=str(error))
            return
        if not self.loading.split and self.loading.return_path and not isinstance(error, ChannelError):
            with contextlib.suppress(MigrationError):
                self._answer(Shut(1))  # the source resumes its guest at once instead of at a timeout
        self._stop.request(error)

    def _break(self) -> bool:
        """With the lock held: every connection of the broken postcopy goes, and the source may come again."""
        if not self._pause.begin():
            return False
        for connection in list(self._connections.values()):
            connection.shutdown()
        with self._writing:
            self._may_ask = False
            self._requester.forget()
        self._arrivals.recover()
        self._changed.notify_all()
        return True

    def _resume(self) -> None:
        """POSTCOPY_RESUME: ask again for what the guest waits for."""
        with self._writing:
            self._may_ask = True
        self._landing.resumed()
        missing = self.loading.missing_pages()
        self._tell("resumed", f"the source is here again, {missing} pages are missing", missing_pages=missing)

    def _no_room(self, error: NoRoom) -> None:
        """Wait with the connection open: a source that has sent all cannot send it again."""
        main = self._connections.get("main")
        self._room.wait(error, None if self.loading.split or main is None else main.socket)

    # -- the channels' threads -----------------------------------------------------------------------------------------

    def _main(self, connection: Connection, identity: Identity) -> None:
        recovering = self.paused
        decoder = QemuStreamDecoder(recovery=recovering, ram=self._ram if recovering else None)
        self._ram = decoder.ram
        if recovering:
            with self._changed:
                self._pause.end()
        buffer = memoryview(bytearray(_READ_BYTES))
        loading = self.loading
        while not loading.over:
            count = self._read_main(connection, buffer)
            if count:
                decoder.feed(buffer[:count])
            else:
                decoder.end()
            for event in decoder.events():
                loading.take(event)
            self._notice()
            loading.footers = decoder.footers is not False
            if not count and not loading.over:
                if not loading.ended:
                    raise ChannelError("main: the source closed the connection before the end of the stream")
                loading.over = True
        self._commit(connection)

    def _read_main(self, connection: Connection, buffer: memoryview) -> int:
        if not self.loading.ended:
            return connection.recv_into(buffer)
        connection.stall_after(LINGER_S)
        try:
            return connection.recv_into(buffer)
        except ChannelError:
            self._stop.check()
            self.loading.over = True  # a machine with suppress-vmdesc says nothing behind EOF, and waits for SHUT
            return 0

    def _notice(self) -> None:
        """Between two reads of main: tell what has become of the guest."""
        self._room.found()
        if self.loading.split and not self._told_split:
            self._told_split = True
            missing = self.loading.missing_pages()
            self._tell("postcopy", f"the guest is here, {missing} of its pages follow", missing_pages=missing)

    def _commit(self, connection: Connection) -> None:
        loading = self.loading
        if loading.split:
            loading.settle(LINGER_S if "preempt" in self._connections else 0.0)
        if loading.missing_pages():
            raise RemoteProtocolError(
                f"the stream ended and pages are missing: {loading.missing_words()}", channel="main"
            )
        began = time.monotonic()
        while not self._done:
            try:
                with self._stop.sealed():  # a stop in between would leave an image, and a source that was not told
                    loading.commit()
                    self._commit_s = time.monotonic() - began
                    self._tell_the_source()
                    with self._changed:
                        self._done = True
            except NoRoom as error:
                if not loading.split:
                    raise
                self._no_room(error)
        self._room.found()
        connection.stall_after(LINGER_S)
        last_words = b""
        buffer = memoryview(bytearray(4096))
        with contextlib.suppress(MigrationError):
            while count := connection.recv_into(buffer):
                last_words = (last_words + bytes(buffer[:count]))[-len(GIVEN_UP) :]
        try:
            self._landing.let_go(last_words == GIVEN_UP)
        except MigrationError as error:
            self._late = self._late or error
        with self._changed:
            self._changed.notify_all()

    def _tell_the_source(self) -> None:
        if not self.loading.return_path:
            return
        try:
            self._answer(Shut(0))
        except MigrationError as error:
            words = f"all of the guest is here, but the source could not be told ({error})"
            self._late = ChannelError(
                f"{words}: look there" if self.loading.split else f"{words}: its guest runs on",
                hint=(f"{UNTOLD}; " if self.loading.split else "")
                + "what was received is a checkpoint; do not run it beside the source's guest",
                guest=Whereabouts.UNKNOWN if self.loading.split else Whereabouts.SOURCE,
            )

    def _multifd(self, connection: Connection, identity: Identity) -> None:
        assert self._epochs is not None
        decoder = MultifdDecoder(
            method=self._compression, channel=connection.name, channels=self._multifd_channels, uuid=self._uuid,
            destination=self.loading.room,
        )  # fmt: skip
        channel_id = identity.index
        ended = False
        while not ended:
            count = connection.recv_into(decoder.room())
            if self.loading.lengths and decoder.blocks is None:
                decoder.blocks = self.loading.lengths
            if count:
                decoder.filled(count)
            else:
                decoder.end()
                ended = True
            for event in decoder.events():
                match event:
                    case MultifdHello():
                        channel_id = event.channel_id
                        self._hello(event, connection)
                    case MultifdPacket():
                        self.loading.packet(event)
                        if event.is_sync:
                            self._epochs.sync(channel_id)
                    case DeviceState():
                        raise RemoteProtocolError(
                            f"device state of '{event.idstr}' on a multifd channel: it cannot be kept in an image",
                            channel=connection.name, offset=event.offset,
                            hint="turn off x-migration-multifd-transfer of the source's VFIO devices",
                        )  # fmt: skip
        if not self._done and not self.loading.split:
            self._epochs.end(channel_id)

    def _hello(self, hello: MultifdHello, connection: Connection) -> None:
        with self._lock:
            if self._uuid is None:
                self._uuid = hello.uuid
                self.loading.facts["uuid"] = hello.uuid.hex() if any(hello.uuid) else ""
            elif self._uuid != hello.uuid:
                raise RemoteProtocolError("the channel belongs to another guest", channel=connection.name, offset=8)

    def _preempt(self, connection: Connection, identity: Identity) -> None:
        decoder: PreemptDecoder | None = None
        buffer = memoryview(bytearray(_READ_BYTES // 4))
        while count := connection.recv_into(buffer):
            if decoder is None:
                decoder = PreemptDecoder(main=self._ram)
            decoder.feed(buffer[:count])
            for event in decoder.events():
                match event:
                    case Pages():
                        self.loading.place(event.block, event.page_numbers, event.data)
                    case ZeroPages():
                        self.loading.zero(event.block, event.page_numbers)
                    case EndOfRam():
                        return
                    case _:
                        raise RemoteProtocolError(f"{type(event).__name__} on the preempt channel", channel="preempt")
        if decoder is not None:
            decoder.end()
            for _ in decoder.events():
                pass
        # its end says nothing: a source closes it when all is sent, and a broken postcopy shows on main

    # -- ends ----------------------------------------------------------------------------------------------------------

    def _answer(self, event: ReturnPathEvent) -> None:
        if not self.loading.return_path:
            return
        with self._writing:
            main = self._connections.get("main")
            if main is not None:
                main.send(encode_return_path(event))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _end(self) -> None:
        """Every thread is joined, every socket closed; nothing of it survives `run`."""
        self._arrivals.close()
        for connection in list(self._connections.values()):
            connection.shutdown()
        for thread in self._threads:
            thread.join()
        for connection in self._connections.values():
            connection.close()
        if self._epochs is not None:
            self._epochs.close()
        self._forget_wake()
        self._forget()

    def _failure(self) -> MigrationError:
        error = self._stop.error or ChannelError("the migration ended without a word")
        if self.loading.split:
            # what came stays: the source cannot take the guest back, and will send again what is missing
            error.guest = Whereabouts.UNKNOWN if self.loading.ended else Whereabouts.SPLIT
            self._landing.keep()
            return error
        self._landing.abandon()
        error.guest = Whereabouts.SOURCE
        if self._arrivals.refused and not error.hint:
            error.hint = f"turned away: {self._arrivals.refused[-1]}"
        return error
