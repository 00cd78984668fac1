"""`./dev demo` without a hypervisor: a guest that is a process moves between two engines, there and back, live.

    this process: says what happens
      +-- engine A -- the guest          there by precopy over multifd channels
      +-- engine B                       back by postcopy with a preempt channel

What the kernel does not give this user is left out, with the reason: without write tracking the guest is paused on its
way, without userfaultfd nothing runs before all of its memory is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from virtmig.engine import userfault
from virtmig.engine.demo_engine import END_S, Remote, Way
from virtmig.engine.dirty import tracking_available
from virtmig.engine.outgoing import SendSettings
from virtmig.errors import MigrationError
from virtmig.pages import PAGE_BYTES

#: the bandwidth is limited so that there is something to see: one pass over all of memory takes about so long, but
#: never below four times what the guest writes, so that passes get shorter
PASS_S = 1.2
LOG_EVERY_S = 1.0
POSTCOPY_FEATURES = userfault.UFFD_FEATURE_MISSING_SHMEM | userfault.UFFD_FEATURE_MINOR_SHMEM
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

WORDS: dict[Way, str] = {
    "precopy": "precopy over {channels}",
    "postcopy": "one pass of precopy over {channels}, then postcopy with a preempt channel",
    "paused": "the guest is paused, moved over {channels}, and resumed",
    "lazy": "postcopy from the first byte, with a preempt channel",
}


class Lines:
    """Standard output. On a terminal a passing line is drawn over by the next; elsewhere one a second is kept."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._last = time.monotonic()

    def say(self, text: str, passing: bool = False) -> None:
        now = time.monotonic()
        if passing and not self._terminal and now < self._last + LOG_EVERY_S:
            return
        self._last = now
        erase, end = ("\r\x1b[K", "" if passing else "\n") if self._terminal else ("", "\n")
        try:
            print(f"{erase}{text}", end=end, flush=True)
        except OSError:  # whoever read it may be gone; the demo still has to clear up
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Stopped(BaseException):
    def __init__(self, number: int) -> None:
        self.number = number


def first_line() -> str:
    """What this is, why, and how to get the other one."""
    found = {
        "QEMU": shutil.which("qemu-system-x86_64") or os.access("/usr/libexec/qemu-kvm", os.X_OK),
        "libvirt": shutil.which("libvirtd") or shutil.which("virtqemud"),
        "libvirt's Python binding": importlib.util.find_spec("libvirt"),
    }
    missing = [name for name, here in found.items() if not here]
    why = f"no {', no '.join(missing)} here" if missing else "QEMU and libvirt are not used"
    way = "as root `./dev setup` installs them, then `./dev demo`" if missing else "`./dev demo`"
    return (
        f"virtmig demo without a hypervisor: {why}; virtmig's own engine moves a guest that is a process "
        f"(with QEMU guests: {way})"
    )


class Demo:
    """Two engines and a guest; `pids` is everything that may not be left."""

    def __init__(self, arguments: argparse.Namespace, lines: Lines) -> None:
        self.memory_mib: int = arguments.memory
        self.channels: int = arguments.channels
        self.rate_mib_s: float = arguments.rate
        self.bandwidth_mib_s = int(max(self.memory_mib / PASS_S, 4 * self.rate_mib_s, 1))
        self.pids: list[int] = []
        self._lines = lines
        self._engines: list[Remote] = []

    def run(self, folder: Path) -> None:
        """There and back, by sockets in `folder`. Raises MigrationError."""
        self._lines.say(first_line())
        self._lines.say(
            f"  two engines, one guest of {self.memory_mib} MiB that writes {self.rate_mib_s:g} MiB/s and checks what"
            f" it wrote; at most {self.bandwidth_mib_s} MiB/s between them"
        )
        began = time.monotonic()
        there, back = self._ways()
        for name in "AB":
            self._engines.append(Remote(name, self._lines.say))
            self.pids.append(self._engines[-1].process.pid)
        a, b = self._engines
        self.pids.append(a.ask("start", self.memory_mib, self.rate_mib_s))
        elapsed_s = time.monotonic() - began
        self._lines.say(f"  up in {elapsed_s:.1f} s; the guest (pid {self.pids[-1]}) runs on engine A\n")
        self._leg(a, b, there, folder)
        self._leg(b, a, back, folder)

    def close(self) -> list[int]:
        """Ends all of it. What is still there: nothing."""
        for engine in self._engines:
            engine.close()
        return [pid for pid in self.pids if not _ended(pid)]

    def _ways(self) -> tuple[Way, Way]:
        """What can be shown to this user on this kernel; what cannot is said."""
        tracking, faults = tracking_available(), userfault.available()
        lazy, reason = faults.has(POSTCOPY_FEATURES), _why(faults.reason, faults.hint)
        if faults.available and not lazy:
            missing = ", ".join(userfault.feature_names(POSTCOPY_FEATURES & ~faults.features))
            reason = f"userfaultfd of this kernel lacks {missing}"
        refused = {} if tracking.available else {"live precopy": _why(tracking.reason, tracking.hint)}
        if not lazy:
            refused |= {"postcopy": reason}
        if len(refused) == 2 and len(set(refused.values())) == 1:
            refused = {"live precopy, no postcopy": reason}
        for what, why in refused.items():
            self._lines.say(f"  no {what}: {why}")
        there: Way = "precopy" if tracking.available else "paused"
        if not lazy:
            return there, there
        return there, "postcopy" if tracking.available else "lazy"

    def _leg(self, source: Remote, destination: Remote, way: Way, folder: Path) -> None:
        multifd = 0 if way == "lazy" else self.channels
        channels = {0: "one channel", 1: "one multifd channel"}.get(multifd, f"{multifd} multifd channels")
        self._lines.say(f"engine {source.name} -> engine {destination.name}: {WORDS[way].format(channels=channels)}")
        postcopy = way in ("postcopy", "lazy")
        settings = SendSettings(
            postcopy=postcopy, preempt=postcopy, multifd_channels=multifd, stall_s=END_S,
            bandwidth_bytes_per_s=self.bandwidth_mib_s << 20,
        )  # fmt: skip
        path = str(folder / destination.name)
        destination.ask("listen", path)
        destination.tell("receive", multifd)
        source.ask("send", path, way, settings)
        pid, faults = destination.answer()
        self.pids.append(pid)
        if faults is not None:
            waited = f"{_ms(faults.p50_us)} ms at the median, {_ms(faults.p99_us)} at p99, {_ms(faults.max_us)} at most"
            self._lines.say(f"  faults: {faults.faults}, {faults.requests} pages asked for; the guest waited {waited}")
        check, gap_ms, written = destination.ask("check")
        if not check.ok:
            raise MigrationError(f"{check.bad_pages} pages are wrong on engine {destination.name}: {check.corruption}")
        self._lines.say(f"  downtime: {gap_ms:.0f} ms, the longest time without a beat of the guest")
        self._lines.say(
            f"  memory: {check.pages * PAGE_BYTES >> 20} MiB checked word for word, all as it must be;"
            f" {written} page writes so far\n"
        )


def demo(argv: list[str] | None = None) -> int:
    """The exit status: 0, 1 after an error, 128 and the signal's number after a signal."""
    parser = argparse.ArgumentParser(prog="python -m virtmig.engine.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--memory", type=int, default=128, metavar="MIB", help="the guest's memory (128)")
    parser.add_argument("--rate", type=float, default=24.0, metavar="MIB_S", help="how fast the guest writes (24)")
    parser.add_argument("--channels", type=int, default=4, metavar="N", help="multifd channels, 0 for none (4)")
    arguments = parser.parse_args(argv)
    if arguments.memory < 1 or not arguments.rate > 0 or not 0 <= arguments.channels <= 255:
        parser.error("memory of at least 1 MiB, a rate above 0, 0 to 255 channels")
    lines = Lines()
    show, left = Demo(arguments, lines), []
    status, trouble = 0, ""
    try:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGINT:  # nohup stays
                signal.signal(number, _stop)
        with tempfile.TemporaryDirectory(prefix="virtmig-demo-") as folder:
            try:
                show.run(Path(folder))
            finally:
                for number in STOP_SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
                left = show.close()
    except _Stopped as stopped:
        status, trouble = 128 + stopped.number, f"stopped by {signal.Signals(stopped.number).name}"
    except MigrationError as error:
        status, trouble = 1, f"error: {_why(str(error), error.hint)}"
    if left:
        status, trouble = status or 1, f"{trouble or 'error'}; still there: pid {', '.join(map(str, left))}"
    elif trouble:
        trouble += "; the guest and both engines have ended, nothing is left running"
    if trouble:
        lines.say("")
        print(trouble, file=sys.stderr)
    else:
        lines.say(
            "the guest went there and back: it ran on engine A at the end, with all of its memory. It and both engines"
            " have ended, nothing is left running."
        )
    return status


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped(number)


def _why(reason: str, hint: str) -> str:
    return f"{reason} ({hint})" if hint else reason


def _ms(latency_us: float | None) -> str:
    return f"{(latency_us or 0.0) / 1000:.2f}"


def _ended(pid: int) -> bool:
    """Waits a while for it; it may be nobody's child any more."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], END_S)[0])
    finally:
        os.close(process)


if __name__ == "__main__":
    sys.exit(demo())
