"""INT, TERM and HUP become requests to stop safely, with or without a terminal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Protocol, TypeVar

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Askable(Protocol):
    """Who can be asked to stop, from inside a signal handler."""

    def ask(self, what: str, /) -> None: ...


Asked = TypeVar("Asked", bound=Askable)


@contextlib.contextmanager
def stop_on_signals(stop: Asked) -> Iterator[Asked]:
    """While inside, the three signals only ask `stop`; the handlers of before come back afterwards.

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
