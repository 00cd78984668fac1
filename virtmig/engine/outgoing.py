"""Be the source of a migration: bring the guest of an image to a waiting QEMU (or to another engine).

    image -> Remaining -> [caller's thread] -> main
                      \\-> [multifd 0] [multifd 1] ...          precopy with multifd
                      \\-> [return path] -> preempt or main     postcopy: what the guest asks for

The guest begins to run at the destination when that has all of the stream (precopy), or at once (postcopy: RUN at the
end of the package). Until then a failure costs nothing, the image stays as it is. After RUN the guest is split: a
failure pauses it, and a recovery, of any process that has the image, sends what the destination's bitmaps lack.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import msgspec

from virtmig.engine.answers import Answers
from virtmig.engine.image import Image
from virtmig.engine.lazy import PageReader, RecordWriter, Remaining
from virtmig.engine.multifd_sender import MultifdSender
from virtmig.engine.transport import STALL_S, Address, Buffer, Connection, Stop, connect
from virtmig.errors import MigrationError, RemoteProtocolError, RequestError
from virtmig.pages import PAGE_BYTES, PageNumbers
from virtmig.progress import Whereabouts
from virtmig.stream.channel import Moment, Role, Step, connection_order
from virtmig.stream.commands import advise, command, discard, ping, recv_bitmap
from virtmig.stream.encoder import MainEncoder, PreemptEncoder
from virtmig.stream.events import Command, RamBlock, SectionFooter
from virtmig.stream.multifd_compression import METHOD_FLAG
from virtmig.stream.return_path import ReceivedBitmap, RequestPages
from virtmig.stream.wire import PING_PACKAGE_LOADED, TARGET_PAGE_BYTES, Dialect
from virtmig.stream.wire import Command as Number

#: what may lie unsent in the kernel in postcopy: the answer to a request on main waits behind it
_UNSENT_BYTES = 128 << 10
_PROGRESS_S = 0.1
#: the last machine type whose RAM EOS is a multifd sync (multifd-flush-after-each-section, hw_compat_8_0)
_SYNC_EACH_SECTION = (8, 0)
_VERSION = re.compile(r"-(\d+)\.(\d+)(?:\.\d+)?$")


class SendSettings(msgspec.Struct, frozen=True):
    """How to send. All must be what the destination was set up for: QEMU's capabilities are not on the wire.

    `bandwidth_bytes_per_s` holds back everything but requested pages. `recover`: the destination has a paused postcopy
    and waits after migrate-recover.
    """

    postcopy: bool = False
    preempt: bool = False
    multifd_channels: int = 0
    compression: str = "none"
    destination: Dialect = Dialect.QEMU_11_1
    recover: bool = False
    bandwidth_bytes_per_s: int | None = None
    stall_s: float = STALL_S

    def __post_init__(self) -> None:
        if self.preempt and not (self.postcopy or self.recover):
            raise RequestError("preempt is a channel of postcopy", option="preempt", hint="add postcopy")
        if not 0 <= self.multifd_channels <= 255:
            raise RequestError(f"{self.multifd_channels} multifd channels", option="multifd", hint="1 to 255")
        if self.compression not in METHOD_FLAG:
            known = ", ".join(METHOD_FLAG)
            raise RequestError(f"no compression '{self.compression}'", option="compression", hint=known)
        if self.compression != "none" and not self.multifd_channels:
            raise RequestError("only multifd compresses", option="compression", hint="add multifd channels")
        if self.bandwidth_bytes_per_s is not None and self.bandwidth_bytes_per_s <= 0:
            raise RequestError("a bandwidth of nothing", option="bandwidth")


class SendProgress(msgspec.Struct, frozen=True):
    """`stage` is connecting, switching, pages, finishing; pages count what was sent here, not by an earlier process."""

    stage: str
    bytes_sent: int
    pages_sent: int
    pages_total: int
    requests_served: int
    guest_runs: bool


class SendResult(msgspec.Struct, frozen=True):
    """What went. `switch_s`: until the guest could run there: RUN in postcopy, the whole stream in precopy."""

    bytes_sent: int
    pages_normal: int
    pages_zero: int
    requests_served: int
    switch_s: float
    elapsed_s: float


Report = Callable[[SendProgress], None]


def send_image(
    image: Image, address: Address, settings: SendSettings, stop: Stop, *, progress: Report | None = None
) -> SendResult:
    """Blocks until the destination has said SHUT 0. Raises MigrationError whose `guest` says where the guest is.

    SOURCE: it has not started, the image can be sent again. SPLIT: it was started and is paused, or will be at its next
    missing page. UNKNOWN: the whole precopy stream went out and no answer came. `progress` is called in this thread.
    """
    return Outgoing(image, address, settings, stop, progress).run()


class Outgoing:
    def __init__(
        self, image: Image, address: Address, settings: SendSettings, stop: Stop, progress: Report | None
    ) -> None:
        self._image = image
        self._manifest = image.manifest
        self._address = address
        self._settings = settings
        self._progress = progress
        self._stop = Stop()
        self._began = self._reported = time.monotonic()
        self._switched: float | None = None
        self._connections: list[Connection] = []
        self._threads: list[threading.Thread] = []
        self._crash: BaseException | None = None
        self._reader = PageReader(image)
        self._pages = Remaining(self._reader)
        self._total_pages = self._manifest.ram_bytes // PAGE_BYTES
        self._encoder = MainEncoder(ram_section_id=self._manifest.ram_section_id, footers=self._manifest.footers)
        self._main: RecordWriter | None = None
        self._preempt: RecordWriter | None = None
        self._multifd: MultifdSender | None = None
        self._paced_until = 0.0
        self._paced_bytes = 0
        self._requested = False
        self._answers = Answers(
            self._stop, self._reader.lengths, settings.stall_s, on_request=self._answer, on_bitmap=self._drop
        )
        self._changed = self._answers.changed
        # under _changed: requested pages for main, and whether the return path's thread has pages in hand
        self._urgent: deque[tuple[str, PageNumbers]] = deque()
        self._answering = False
        self._requests = 0
        self._listening = False
        self._forget = stop.on_request(lambda: self._stop.request(stop.error))

    def run(self) -> SendResult:
        failure: BaseException | None = None
        try:
            if self._settings.recover:
                self._recover()
            elif self._settings.postcopy:
                self._start_lazily()
            else:
                self._precopy()
            if self._settings.recover or self._settings.postcopy:
                self._serve()
            self._answers.wait(lambda: self._answers.arrived, "says that the guest has arrived")
        except MigrationError as error:
            failure = self._judged(self._stop.error or error)
            raise failure from self._crash
        finally:
            self._end()
            _let_go(failure)
        now = time.monotonic()
        writers = self._writers()
        return SendResult(
            bytes_sent=self._sent_bytes(),
            pages_normal=sum(writer.normal for writer in writers) + (self._multifd.normal if self._multifd else 0),
            pages_zero=sum(writer.zero for writer in writers),
            requests_served=self._requests,
            switch_s=(self._switched or now) - self._began,
            elapsed_s=now - self._began,
        )

    # -- the beginnings ------------------------------------------------------------------------------------------------

    def _begin_stream(self) -> RecordWriter:
        """Connect everything; the stream up to RAM's START is sent."""
        encoder, settings = self._encoder, self._settings
        # the capabilities among them were the old source's; the destination compares them with its own
        kept = [each for each in self._manifest.subsections if each[0] != "configuration/capabilities"]
        first = [
            encoder.begin(self._manifest.machine, kept),
            encoder.command(command(Number.OPEN_RETURN_PATH)),
            encoder.command(ping(1)),
        ]
        if settings.multifd_channels:
            raw = uuid.UUID(self._manifest.uuid).bytes if self._manifest.uuid else bytes(16)
            self._multifd = MultifdSender(
                self._reader, settings.destination, settings.multifd_channels,
                uuid=raw, method=settings.compression, stop=self._stop,
            )  # fmt: skip
        for step in self._order():
            self._open(step, first)
        main = self._main
        assert main is not None
        if self._multifd is not None:
            self._multifd.start(self._start)
        sizes = {block.name: block.page_size for block in self._manifest.blocks}
        if settings.postcopy:
            every = 0
            for size in sizes.values():
                every |= size
            main.connection.send(encoder.command(advise(every)))
        blocks = [
            # ram_save_setup: the size is there only with postcopy-ram, and for hugetlb blocks
            RamBlock(name, length, sizes[name] if settings.postcopy and sizes[name] != TARGET_PAGE_BYTES else None)
            for name, length in self._reader.lengths.items()
        ]
        flush = self._multifd is not None and not self._sync_each_section()
        if self._multifd is not None:
            self._multifd.sync()
        main.connection.send(encoder.ram_begin(blocks, flush=flush))
        return main

    def _precopy(self) -> None:
        main = self._begin_stream()
        encoder = self._encoder
        main.connection.send(encoder.ram_part())
        while (piece := self._pages.take_next()) is not None:
            self._wait_pace()
            # Zero pages are sent as well: what the destination's RAM holds beforehand is known for anonymous memory
            # only, and a record has 9 bytes. With multifd too they go on main, where every QEMU clears the page.
            if self._multifd is None:
                main.write_records(*piece)
            else:
                normal, zero = self._reader.split(*piece)
                self._multifd.put(piece[0], normal)
                main.zero_pages(piece[0], zero)
            self._report("pages")
        sync_each = self._multifd is not None and self._sync_each_section()
        if self._multifd is not None and sync_each:
            self._multifd.sync()
        parts: list[Buffer] = [encoder.ram_section_end(), encoder.ram_end()]
        if self._multifd is not None:
            self._multifd.sync()
            parts += [] if sync_each else [encoder.multifd_flush()]
        parts.append(encoder.ram_section_end())
        self._finish_precopy(parts)

    def _finish_precopy(self, parts: Sequence[Buffer]) -> None:
        """What is left of RAM, the devices, and the end of the stream: the destination may run the guest then."""
        main, encoder = self._main, self._encoder
        assert main is not None
        devices = [encoder.device(section) for section in self._image.device_sections()]
        self._report("finishing")
        self._stop.check()
        self._answers.finished = True
        main.connection.send(*parts, *devices, encoder.eof(self._image.description or None))
        self._switched = time.monotonic()

    def _start_lazily(self) -> None:
        """Nothing but the device state goes before RUN; every page is discarded, so that each is asked for or comes."""
        main = self._begin_stream()
        self._switch_to_postcopy([discard(name, [(0, length)]) for name, length in self._reader.lengths.items()])
        main.connection.send(self._encoder.command(ping(4)))

    def _switch_to_postcopy(self, discards: Iterable[Command]) -> None:
        """The discards, and the package with the devices and RUN: from here on the guest may run there."""
        main, encoder = self._main, self._encoder
        assert main is not None
        parts: list[Buffer] = [encoder.command(each) for each in discards]
        inside: list[object] = [command(Number.POSTCOPY_LISTEN)]
        for section in self._image.device_sections():
            inside += [section, *([SectionFooter(section.section_id)] if self._manifest.footers else [])]
        inside += [ping(3), ping(PING_PACKAGE_LOADED), command(Number.POSTCOPY_RUN)]
        parts += [encoder.command(ping(2)), encoder.package(inside)]
        self._report("switching")
        self._stop.check()
        self._listening = True
        main.connection.send(*parts)
        self._switched = time.monotonic()  # the destination loads a package that is whole, so not before

    def _recover(self) -> None:
        """qemu_savevm_state_resume_prepare, postcopy_do_resume: no header, the bitmaps first."""
        self._switched = self._began
        encoder, lengths = self._encoder, self._reader.lengths
        encoder.begin_recovery(lengths)
        early = self._settings.destination is Dialect.QEMU_7_2
        self._open_main([encoder.command(recv_bitmap(name)) for name in lengths])
        if self._settings.preempt and early:
            self._open_preempt()
        self._answers.wait(lambda: len(self._answers.told) == len(lengths), "says which pages it has")
        if self._settings.preempt and not early:
            self._open_preempt()
        assert self._main is not None
        self._listening = True
        self._main.connection.send(encoder.command(command(Number.POSTCOPY_RESUME)))
        self._answers.wait(lambda: self._answers.resumed, "acknowledges the recovery")

    # -- postcopy: requests first, then the background -----------------------------------------------------------------

    def _serve(self) -> None:
        main = self._main
        assert main is not None
        encoder = self._encoder
        while (piece := self._next_piece()) is not None:
            before = self._sent_bytes(preempt=False)
            main.write(*piece)
            if self._requested:  # what the guest waits for is not held back, nor does it hold back the rest
                self._paced_bytes += self._sent_bytes(preempt=False) - before
            self._report("pages")
        self._report("finishing")
        self._answers.finished = True
        main.connection.send(encoder.ram_end(), encoder.ram_section_end(), encoder.eof())
        if self._preempt is not None and self._settings.destination is Dialect.QEMU_7_2:
            self._preempt.connection.send(self._preempt.encoder.end())

    def _next_piece(self) -> tuple[str, PageNumbers] | None:
        """What to send next on main. None when all is sent, and the destination has loaded its devices.

        END while a page is on its way elsewhere, or during the load, would be believed: missing pages read as zero.
        """
        while True:
            with self._changed:
                self._requested = bool(self._urgent)
                if self._urgent:
                    return self._urgent.popleft()
            if not self._wait_pace():
                continue
            piece = self._pages.take_next()
            if piece is not None:
                return piece
            self._answers.wait(lambda: bool(self._urgent) or self._quiet(), "loads its devices")
            with self._changed:
                if not self._urgent:
                    return None

    def _quiet(self) -> bool:
        return not self._answering and (self._settings.recover or PING_PACKAGE_LOADED in self._answers.pongs)

    def _answer(self, request: RequestPages) -> None:
        """In the return path's thread, which is the only one that writes on preempt."""
        if not self._listening:
            raise RemoteProtocolError("a request for pages, and no postcopy runs", channel="return path")
        with self._changed:
            self._answering = True  # before the pages are taken: see _next_piece
        pages = self._pages.take_requested(request.block, request.start_bytes, request.length_bytes)
        if len(pages) and self._preempt is not None:
            self._preempt.write(request.block, pages)
        with self._changed:
            if len(pages) and self._preempt is None:
                self._urgent.append((request.block, pages))
            self._requests += bool(len(pages))
            self._answering = False
            self._changed.notify_all()

    def _drop(self, told: ReceivedBitmap) -> None:
        self._pages.drop(told.block, told.pages(self._reader.lengths[told.block] // PAGE_BYTES))

    # -- connections and threads ---------------------------------------------------------------------------------------

    def _order(self) -> tuple[Step, ...]:
        settings = self._settings
        return connection_order(
            settings.destination,
            multifd_channels=settings.multifd_channels,
            postcopy=settings.postcopy,
            preempt=settings.preempt,
            # newer destinations take it at any time, whatever the machine type; late they cannot mistake it
            early_preempt=settings.preempt and settings.destination is Dialect.QEMU_7_2,
        )

    def _open(self, step: Step, first: Sequence[Buffer]) -> None:
        if step.role is Role.MAIN:
            self._open_main(first)
        elif step.role is Role.MULTIFD:
            assert self._multifd is not None
            connection = self._connect(f"multifd {step.index}")
            connection.send(self._multifd.encoders[step.index].hello())
            self._multifd.connections.append(connection)
        else:
            if step.when is Moment.PONG_AND_ALL_MULTIFD:
                self._answers.wait(lambda: bool(self._answers.pongs), "answers a PING")
            self._open_preempt()

    def _open_main(self, first: Sequence[Buffer]) -> None:
        self._report("connecting")
        connection = self._connect("main")
        connection.send(*first)
        self._main = RecordWriter(connection, self._encoder, self._reader)
        if self._settings.postcopy or self._settings.recover:
            with contextlib.suppress(OSError):  # a unix socket has no such option
                connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self._start("return path", lambda: self._answers.read(connection))

    def _open_preempt(self) -> None:
        self._preempt = RecordWriter(self._connect("preempt"), PreemptEncoder(), self._reader)

    def _connect(self, name: str) -> Connection:
        connection = connect(self._address, self._stop, name=name, stall_s=self._settings.stall_s)
        self._connections.append(connection)
        return connection

    def _start(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except MigrationError as error:
            traceback.clear_frames(error.__traceback__)  # what they held of the guest's memory could not be unmapped
            self._stop.request(error)
            _let_go(error)
        except BaseException as error:  # a defect of ours: it must not leave the others waiting
            self._crash = error
            name = threading.current_thread().name
            self._stop.request(MigrationError(f"{name}: {type(error).__name__}: {error}"))
            _let_go(error)

    def _end(self) -> None:
        """Every thread joined, every socket closed."""
        if self._multifd is not None:
            self._multifd.close()
        for connection in self._connections:
            connection.shutdown()
        for thread in self._threads:
            thread.join()
        for connection in self._connections:
            connection.close()
        self._forget()
        self._answers.close()

    # -- small things --------------------------------------------------------------------------------------------------

    def _sync_each_section(self) -> bool:
        """Whether each EOS of RAM is a multifd sync there, rather than the word MULTIFD_FLUSH."""
        if self._settings.destination is Dialect.QEMU_7_2:
            return True
        machine = self._manifest.machine or ""
        match = _VERSION.search(machine)
        if match is not None:
            return (int(match[1]), int(match[2])) <= _SYNC_EACH_SECTION
        if "-" not in machine:  # microvm, isapc: no versions, always the newest behaviour
            return False
        raise RequestError(
            f"the machine type '{machine}' does not say which QEMU it is of, and with multifd that decides",
            option="multifd",
            hint="send it without multifd",
        )

    def _wait_pace(self) -> bool:
        """Hold the background back until what was sent has had its time. False: a request came first."""
        rate = self._settings.bandwidth_bytes_per_s
        if rate is not None:
            now, sent = time.monotonic(), self._sent_bytes(preempt=False)
            self._paced_until = max(self._paced_until, now) + (sent - self._paced_bytes) / rate
            self._paced_bytes = sent
            with self._changed:
                self._changed.wait_for(
                    lambda: bool(self._urgent) or self._stop.requested.is_set(), self._paced_until - now
                )
                if self._urgent:
                    return False
        self._stop.check()
        return True

    def _writers(self) -> list[RecordWriter]:
        return [writer for writer in (self._main, self._preempt) if writer is not None]

    def _sent_bytes(self, *, preempt: bool = True) -> int:
        return sum(each.bytes_sent for each in self._connections if preempt or each.name != "preempt")

    def _report(self, stage: str) -> None:
        now = time.monotonic()
        if self._progress is None or (stage == "pages" and now - self._reported < _PROGRESS_S):
            return
        self._reported = now
        sent = sum(writer.normal + writer.zero for writer in self._writers())
        self._progress(
            SendProgress(
                stage,
                self._sent_bytes(),
                sent + (self._multifd.normal if self._multifd is not None else 0),
                self._total_pages,
                self._requests,
                self._switched is not None,
            )
        )

    def _judged(self, error: MigrationError) -> MigrationError:
        """Say where the guest is, and what to do."""
        folder = self._image.folder
        if self._settings.recover or (self._settings.postcopy and self._switched is not None):
            error.guest = Whereabouts.SPLIT
            error.hint = (
                "the guest pauses at its next missing page; migrate-recover at the destination, then "
                f"'virtmig send --recover {folder} {self._address}'"
            )
            if not (self._settings.recover or PING_PACKAGE_LOADED in self._answers.pongs):
                # between LISTEN and RUN a broken connection is no pause: QEMU exits, 7.2 may crash or stand still
                error.hint += "; if that QEMU has ended or hangs, its guest never ran and the image can be sent again"
        elif self._answers.finished:
            error.guest = Whereabouts.UNKNOWN
            error.hint = "look whether the guest runs at the destination before it is started elsewhere"
        else:
            error.guest = Whereabouts.SOURCE
            error.hint = error.hint or "the guest has not started there; the image is as it was and can be sent again"
        return error


def _let_go(error: BaseException | None) -> None:
    """The frames of an error may hold views of the image: what is mapped must go when the image is closed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
