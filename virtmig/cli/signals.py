"""INT, TERM and HUP become requests to stop safely, with or without a terminal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from virtmig.migrate import StopRequest

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stop_on_signals(stop: StopRequest) -> Iterator[StopRequest]:
    """While inside, the three signals only append to `stop`; the handlers of before come back afterwards.

    A signal that the parent set to be ignored (nohup) stays ignored.
    """

    def ask(number: int, _frame: FrameType | None) -> None:
        stop.ask(signal.Signals(number).name)

    before = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGINT:
            before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
