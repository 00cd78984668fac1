"""What virsh's callers see and press: its progress line, its error lines, Ctrl-C, and how the process ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn, TextIO

import msgspec

from virtmig.cli.display import Display, virsh_percent
from virtmig.cli.signals import Askable
from virtmig.errors import ConnectionFailed, MigrationError, PlanRefused, RequestError
from virtmig.forecast import Forecast
from virtmig.progress import Outcome, Progress, Status

#: virsh asks for a job's state so often (virshWatchJob)
SHOWN_EVERY_S = 0.5
#: the first virsh whose progress has two decimals
DECIMALS_SINCE = (9, 4)


class ProgressForm(msgspec.Struct, frozen=True):
    """How a virsh writes its progress line: what stands before and behind it, and whether it has decimals."""

    before: str
    after: str
    decimals: bool


def progress_form(is_terminal: bool, version: tuple[int, ...] | None = None) -> ProgressForm:
    """virsh before 9.4: whole percents, always on one line; later two decimals, a line each where no terminal is."""
    if version is None:
        version = _virsh_version()
    if version < DECIMALS_SINCE:
        return ProgressForm("\r", "", False)
    return ProgressForm("\r", "", True) if is_terminal else ProgressForm("", "\n", True)


def _virsh_version() -> tuple[int, ...]:
    """That of the client library, which comes with virsh."""
    import libvirt

    number = int(libvirt.getVersion())
    return number // 1_000_000, number // 1_000 % 1_000


class VirshDisplay(Display):
    """virsh's progress line on standard error when --verbose was given; besides that, warnings and errors alone."""

    def __init__(self, out: TextIO, err: TextIO, *, shows_progress: bool, form: ProgressForm) -> None:
        super().__init__(out, err)
        self.shows_progress = shows_progress
        self.form = form
        self._open = False
        self._next_s = SHOWN_EVERY_S

    def sample(self, progress: Progress, expected: Forecast | None = None) -> None:
        if not self.shows_progress or not progress.total_bytes or progress.remaining_bytes is None:
            return
        if progress.elapsed_s >= self._next_s:
            self._next_s = progress.elapsed_s + SHOWN_EVERY_S
            self._show(progress.remaining_bytes, progress.total_bytes)

    def message(self, text: str, level: str = "info") -> None:
        if level != "info":
            self._say(f"{level}: {text}")

    def finish(self, outcome: Outcome) -> None:
        if outcome.status is Status.COMPLETED:
            if self.shows_progress:
                self._show(0, 1)
            return
        for text in (outcome.error, outcome.sentence):
            for row in text.splitlines():
                self._say(f"error: {row}")
        if outcome.hint:
            self._say(f"hint: {outcome.hint}")

    def _show(self, remaining: int, total: int) -> None:
        """virshPrintJobProgress."""
        if self.form.decimals:
            number = virsh_percent(remaining, total, done=remaining == 0)
        else:
            number = "100" if remaining == 0 else f"{min(int(100 - remaining * 100 / total), 99):3d}"
        with contextlib.suppress(OSError, ValueError):
            self.err.write(f"{self.form.before}Migration: [{number} %]{self.form.after}")
            self.err.flush()
        self._open = not self.form.after

    def _say(self, text: str, stream: TextIO | None = None) -> None:
        if self._open:
            self._open = False
            text = f"\n{text}"
        super()._say(text, stream)


def error_lines(error: MigrationError | None, *, connecting: bool = False) -> str:
    """`error:` lines in virsh's words, then `hint:` lines."""
    if error is None:
        return ""
    found: Sequence[tuple[str, str, str]] = (("", error.message, error.hint),)
    if isinstance(error, RequestError):
        found = error.problems
    elif isinstance(error, PlanRefused) and error.reasons:
        found = error.reasons
    texts = [line for _, message, _ in found for line in message.splitlines()]
    if isinstance(error, ConnectionFailed):
        of_libvirt = getattr(error.__cause__, "get_error_message", None)
        texts = [of_libvirt() if of_libvirt else error.message]
        if connecting:
            texts.insert(0, "failed to connect to the hypervisor")
    hints = [hint for _, _, hint in found if hint]
    return "".join(
        f"{what}: {text}\n" for what, rows in (("error", texts), ("hint", hints)) for text in dict.fromkeys(rows)
    )


def write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # virsh does not ask whether its output was taken either
        sys.stdout.write(text)
        sys.stdout.flush()


def complain(text: str) -> None:
    write("")
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _in_foreground() -> bool:
    """Whether standard input is a terminal that is ours at the moment: setting another one's would stop us."""
    try:
        return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


@contextlib.contextmanager
def interrupt_from_terminal(stop: Askable) -> Iterator[None]:
    """As virsh: while a migration runs on a terminal, Ctrl-C is a byte that only we read (vshTTYDisableInterrupt).

    The shell script or the program that called us does not hear of it; the migration is aborted.
    """
    if not _in_foreground():
        yield
        return
    before = termios.tcgetattr(0)
    interrupt = before[6][termios.VINTR]
    during = termios.tcgetattr(0)
    during[3] &= ~termios.ICANON
    during[6][termios.VINTR] = b"\0"  # _POSIX_VDISABLE
    ended, end_writer = os.pipe()

    def read() -> None:
        while True:
            ready, _, _ = select.select([0, ended], [], [])
            if ended in ready:
                return
            try:
                typed = os.read(0, 1)
            except OSError:
                return
            if not typed:
                return
            if typed == interrupt:
                stop.ask("SIGINT")

    termios.tcsetattr(0, termios.TCSANOW, during)
    reader = threading.Thread(target=read, name="virtmig-ctrl-c", daemon=True)
    reader.start()
    try:
        yield
    finally:
        os.close(end_writer)
        reader.join()
        os.close(ended)
        with contextlib.suppress(OSError, termios.error):
            if _in_foreground():
                termios.tcsetattr(0, termios.TCSAFLUSH, before)


def open_standard_streams() -> None:
    """A closed 0, 1 or 2 becomes /dev/null: otherwise the next socket takes that number, and our output goes there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for the life of the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def end(status: int) -> NoReturn:
    """Never returns: exit with the status, or die of the signal that a negative one names."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.exit(status)
    os._exit(status)  # the interpreter would try to write once more, and complain
