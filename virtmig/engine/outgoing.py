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
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from virtmig.engine import refusal
from virtmig.engine.answers import Answers
from virtmig.engine.dialling import TURN_AWAY_S, Dialling, let_go
from virtmig.engine.image import Image
from virtmig.engine.lazy import PageReader, RecordWriter, Remaining, pieces
from virtmig.engine.multifd_sender import MultifdSender
from virtmig.engine.refusal import PING_ADVISED, PING_LISTED, PINGS_SETTLED, Part
from virtmig.engine.send_settings import SendProgress, SendResult, SendSettings
from virtmig.engine.transport import Address, Buffer, Connection, Stop
from virtmig.errors import MigrationError, RemoteProtocolError
from virtmig.pages import PAGE_BYTES, PageNumbers
from virtmig.stream.channel import Moment, Role, Step, connection_order
from virtmig.stream.commands import advise, command, discard, ping, recv_bitmap
from virtmig.stream.encoder import MainEncoder, PreemptEncoder
from virtmig.stream.events import Command, RamBlock, SectionFooter
from virtmig.stream.return_path import ReceivedBitmap, RequestPages
from virtmig.stream.wire import PING_PACKAGE_LOADED, TARGET_PAGE_BYTES, Dialect
from virtmig.stream.wire import Command as Number

__all__ = ["Outgoing", "Report", "SendProgress", "SendResult", "SendSettings", "send_image"]

#: what may lie unsent in the kernel in postcopy: the answer to a request on main waits behind it
_UNSENT_BYTES = 128 << 10
_PROGRESS_S = 0.1
#: the last machine type whose RAM EOS is a multifd sync (multifd-flush-after-each-section, hw_compat_8_0)
_SYNC_EACH_SECTION = (8, 0)
_VERSION = re.compile(r"-(\d+)\.(\d+)(?:\.\d+)?$")
#: how often the machine's rule of multifd asks for a SYNC at most: EOS of START, PART and END, and MULTIFD_FLUSH
_SYNCS_OF_EITHER = 4

Report = Callable[[SendProgress], None]


def send_image(
    image: Image,
    address: Address,
    settings: SendSettings,
    stop: Stop,
    *,
    progress: Report | None = None,
    may_run: Callable[[], None] = lambda: None,
) -> SendResult:
    """Blocks until the destination has said SHUT 0. Raises MigrationError whose `guest` says where the guest is.

    SOURCE: it has not started, the image can be sent again. SPLIT: it was started and is paused, or will be at its next
    missing page. UNKNOWN: the whole precopy stream went out and no answer came. `progress` is called in this thread,
    and `may_run` before the first byte with which the guest can run there: what it raises prevents that (`SentImage`).
    """
    return Outgoing(image, address, settings, stop, progress, may_run).run()


class Outgoing:
    def __init__(
        self,
        image: Image,
        address: Address,
        settings: SendSettings,
        stop: Stop,
        progress: Report | None,
        may_run: Callable[[], None] = lambda: None,
    ) -> None:
        self._image = image
        self._manifest = image.manifest
        self._address = address
        self._settings = settings
        self._progress = progress
        self._may_run = may_run
        self._part = Part.CONNECTION
        self._stop = Stop()
        self._began = self._reported = time.monotonic()
        self._switched: float | None = None
        self._dialling = Dialling(address, self._stop, settings.stall_s)
        self._reader = PageReader(image)
        self._pages = Remaining(self._reader)
        self._total_pages = self._manifest.ram_bytes // PAGE_BYTES
        #: so many come around RAM's START (vmstate's early_setup), the others at the switchover
        self._setup_sections = self._manifest.sections_before_ram + self._manifest.sections_before_switch
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
        self._urgent_at = 0.0  # the last page on preempt
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
            raise failure from self._dialling.crash
        finally:
            self._end()
            let_go(failure)
        now = time.monotonic()
        writers = self._writers()
        return SendResult(
            bytes_sent=self._dialling.sent_bytes(),
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
        self._settle(main.connection)
        if self._multifd is not None:
            self._multifd.start(self._dialling.start)
        sizes = {block.name: block.page_size for block in self._manifest.blocks}
        if settings.postcopy:
            self._part = Part.POSTCOPY
            every = 0
            for size in sizes.values():
                every |= size
            main.connection.send(encoder.command(advise(every)), encoder.command(ping(PING_ADVISED)))
            self._answers.wait(lambda: PING_ADVISED in self._answers.pongs, "takes the advice of postcopy")
        self._part = Part.BLOCKS
        blocks = [
            # ram_save_setup: the size is there only with postcopy-ram, and for hugetlb blocks
            RamBlock(name, length, sizes[name] if settings.postcopy and sizes[name] != TARGET_PAGE_BYTES else None)
            for name, length in self._reader.lengths.items()
        ]
        sync_each = self._sync_each_section() if self._multifd is not None else None
        if self._multifd is not None and sync_each is not None:
            self._multifd.sync()
        count, last = self._manifest.sections_before_ram, self._setup_sections
        setup = self._image.device_sections()[:last] if last else []
        main.connection.send(
            *[encoder.device(each) for each in setup[:count]],
            encoder.ram_begin(blocks, flush=sync_each is False),
            *[encoder.device(each) for each in setup[count:]],
            encoder.command(ping(PING_LISTED)),
        )
        if self._multifd is None or sync_each is not None:
            self._wait_listed()
        self._part = Part.PAGES
        return main

    def _wait_listed(self) -> None:
        self._answers.wait(lambda: PING_LISTED in self._answers.pongs, "takes the list of RAM blocks")

    def _settle(self, main: Connection) -> None:
        """The destination reads main, and has turned away none of the other connections."""
        self._answers.wait(lambda: 1 in self._answers.pongs, "answers a PING")
        self._part = Part.CHANNELS
        others = [each for each in self._dialling.connections if each is not main]
        for value in PINGS_SETTLED if others else ():
            main.send(self._encoder.command(ping(value)))
            self._answers.wait(lambda value=value: value in self._answers.pongs, "answers a PING")  # type: ignore[misc]
        for each in others:
            self._dialling.check_kept(each)

    def _precopy(self) -> None:
        main = self._begin_stream()
        encoder = self._encoder
        sync_each = self._sync_each_section() if self._multifd is not None else None
        main.connection.send(encoder.ram_part())
        later = {name: np.zeros(length // PAGE_BYTES, np.bool_) for name, length in self._reader.lengths.items()}
        while (piece := self._pages.take_next()) is not None:
            self._wait_pace()
            name = piece[0]
            # Zero pages are sent as well: what the destination's RAM holds beforehand is known for anonymous memory
            # only, and a record has 9 bytes. With multifd too they go on main, where every QEMU clears the page.
            for pages in pieces(piece[1]):
                if self._multifd is None:
                    main.write_records(name, pages)
                    continue
                zero = self._multifd.read(name, pages)
                if sync_each is None:
                    later[name][zero] = True
                else:
                    main.zero_pages(name, zero)
            self._report("pages")
        parts: list[Buffer] = [encoder.ram_section_end(), encoder.ram_end()]
        if self._multifd is not None:
            # Where nobody knows the rule of SYNCs, all contents go before the first of them, and the SYNCs before what
            # main waits for: whichever of them a destination counts, it has all pages then. More than it counts are
            # never read (multifd_recv_terminate_threads). Zero pages come behind: main may not be read before.
            for _ in range(_SYNCS_OF_EITHER if sync_each is None else 2 if sync_each else 1):
                self._multifd.sync()
            for name, zeros in later.items() if sync_each is None else ():
                for pages in pieces(np.flatnonzero(zeros).astype(np.uint64)):
                    main.zero_pages(name, pages)
                    self._report("pages")
            parts += [] if sync_each else [encoder.multifd_flush()]
        parts.append(encoder.ram_section_end())
        self._finish_precopy(parts)

    def _finish_precopy(self, parts: Sequence[Buffer]) -> None:
        """What is left of RAM, the devices, and the end of the stream: the destination may run the guest then."""
        main, encoder = self._main, self._encoder
        assert main is not None
        devices = [encoder.device(section) for section in self._image.device_sections()[self._setup_sections :]]
        self._report("finishing")
        self._stop.check()
        self._may_run()
        self._answers.finished = True
        main.connection.send(*parts, *devices, encoder.eof(self._image.description or None))
        self._switched = time.monotonic()
        self._report("finishing")

    def _start_lazily(self) -> None:
        """Nothing but the device state goes before RUN; every page is discarded, so that each is asked for or comes."""
        main = self._begin_stream()
        self._reader.refresh()
        self._switch_to_postcopy([discard(name, [(0, length)]) for name, length in self._reader.lengths.items()])
        main.connection.send(self._encoder.command(ping(4)))

    def _switch_to_postcopy(self, discards: Iterable[Command]) -> None:
        """The discards, and the package with the devices and RUN: from here on the guest may run there."""
        main, encoder = self._main, self._encoder
        assert main is not None
        parts: list[Buffer] = [encoder.command(each) for each in discards]
        inside: list[object] = [command(Number.POSTCOPY_LISTEN)]
        for section in self._image.device_sections()[self._setup_sections :]:
            inside += [section, *([SectionFooter(section.section_id)] if self._manifest.footers else [])]
        inside += [ping(3), ping(PING_PACKAGE_LOADED), command(Number.POSTCOPY_RUN)]
        parts += [encoder.command(ping(2)), encoder.package(inside)]
        self._report("switching")
        self._stop.check()
        self._may_run()
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
        if self._preempt is not None and self._preempt.connection.gone(TURN_AWAY_S):
            # it has no postcopy-preempt, and takes all on main. To break off here would end a 7.2: it crashes.
            self._preempt = None
        assert self._main is not None
        self._may_run()
        self._listening = True
        self._main.connection.send(encoder.command(command(Number.POSTCOPY_RESUME)))
        self._answers.wait(lambda: self._answers.resumed, "acknowledges the recovery")

    # -- postcopy: requests first, then the background -----------------------------------------------------------------

    def _serve(self) -> None:
        main = self._main
        assert main is not None
        encoder = self._encoder
        while (piece := self._next_piece()) is not None:
            before = self._dialling.sent_bytes(preempt=False)
            main.write(*piece)
            if self._requested:  # what the guest waits for is not held back, nor does it hold back the rest
                self._paced_bytes += self._dialling.sent_bytes(preempt=False) - before
            self._report("pages")
        self._wait_taken()
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

    def _wait_taken(self) -> None:
        """END is believed: a page that was lost with the preempt connection would read as zero.

        A QEMU without postcopy-preempt takes that connection for one too many and closes it. `_settle` sees that, but
        for a handshake whose last packet was lost: to that QEMU the connection came with its first page.
        """
        if self._preempt is not None and self._urgent_at:
            self._dialling.wait_taken(self._preempt.connection, self._urgent_at)

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
            self._dialling.check_kept(self._preempt.connection)
            self._preempt.write(request.block, pages)
            self._urgent_at = time.monotonic()
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
            connection = self._dialling.connect(f"multifd {step.index}")
            connection.send(self._multifd.encoders[step.index].hello())
            self._multifd.connections.append(connection)
        else:
            if step.when is Moment.PONG_AND_ALL_MULTIFD:
                self._answers.wait(lambda: bool(self._answers.pongs), "answers a PING")
            self._open_preempt()

    def _open_main(self, first: Sequence[Buffer]) -> None:
        self._report("connecting")
        connection = self._dialling.connect("main")
        self._part = Part.OPENING
        connection.send(*first)
        self._main = RecordWriter(connection, self._encoder, self._reader)
        if self._settings.postcopy or self._settings.recover:
            with contextlib.suppress(OSError):  # a unix socket has no such option
                connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self._dialling.start("return path", lambda: self._answers.read(connection))

    def _open_preempt(self) -> None:
        self._preempt = RecordWriter(self._dialling.connect("preempt"), PreemptEncoder(), self._reader)

    def _end(self) -> None:
        if self._multifd is not None:
            self._multifd.close()
        self._dialling.close()
        self._forget()
        self._answers.close()

    # -- small things --------------------------------------------------------------------------------------------------

    def _sync_each_section(self) -> bool | None:
        """Whether each EOS of RAM is a multifd sync there, rather than the word MULTIFD_FLUSH. None: nobody knows."""
        if self._settings.destination is Dialect.QEMU_7_2:
            return True
        machine = self._manifest.machine or ""
        match = _VERSION.search(machine)
        if match is not None:
            return (int(match[1]), int(match[2])) <= _SYNC_EACH_SECTION
        # microvm, isapc have no versions, and always the newest behaviour; pc-q35-rhel9.4.0 is a distribution's own
        return None if "-" in machine else False

    def _wait_pace(self) -> bool:
        """Hold the background back until what was sent has had its time. False: a request came first."""
        rate = self._settings.bandwidth_bytes_per_s
        if rate is not None:
            now, sent = time.monotonic(), self._dialling.sent_bytes(preempt=False)
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

    def _report(self, stage: str) -> None:
        now = time.monotonic()
        if self._progress is None or (stage == "pages" and now - self._reported < _PROGRESS_S):
            return
        self._reported = now
        sent = sum(writer.normal + writer.zero for writer in self._writers())
        self._progress(
            SendProgress(
                stage,
                self._dialling.sent_bytes(),
                sent + (self._multifd.normal if self._multifd is not None else 0),
                self._total_pages,
                self._requests,
                self._switched is not None,
            )
        )

    def _judged(self, error: MigrationError) -> MigrationError:
        """Say where the guest is, and what to do."""
        answers = self._answers
        sent = refusal.Sent(self._manifest, self._image.folder, self._address, self._settings)
        if self._settings.recover and not self._listening:
            told = len(answers.told) == len(self._reader.lengths)
            refusal.not_recovered(error, sent, connected=self._main is not None, told=told)
        elif self._settings.recover or (self._settings.postcopy and self._switched is not None):
            loaded = self._settings.recover or PING_PACKAGE_LOADED in answers.pongs
            refusal.split(error, sent, loaded=loaded)
        elif answers.finished and not answers.refused:
            refusal.nobody_knows(error, sent)
        else:
            refusal.not_started(error, sent, self._part)
        return error
