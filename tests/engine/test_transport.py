"""A stop: who asks first is heard, and nobody while something is sealed."""

from __future__ import annotations

import pytest

from virtmig.engine.transport import Stop
from virtmig.errors import ChannelError, MigrationAborted


def test_the_first_error_of_a_stop_stays():
    stop = Stop()
    stop.request(ChannelError("main broke"))
    stop.request(ChannelError("parallel 0 broke because of it"))
    with pytest.raises(ChannelError, match="main broke"):
        stop.check()


def test_nobody_stops_what_is_sealed_and_everybody_may_afterwards():
    stop = Stop()
    woken: list[str] = []
    stop.on_request(lambda: woken.append("woken"))
    with stop.sealed():
        stop.request()
        stop.check()
        assert not woken
    stop.check()
    stop.request()
    assert woken == ["woken"]
    with pytest.raises(MigrationAborted):
        stop.check()


def test_what_was_stopped_before_is_not_sealed():
    stop = Stop()
    stop.request(ChannelError("main broke"))
    entered = False
    with pytest.raises(ChannelError, match="main broke"), stop.sealed():
        entered = True
    assert not entered


def test_what_fails_while_sealed_may_be_stopped_again():
    stop = Stop()
    with pytest.raises(OSError, match="disk"), stop.sealed():
        raise OSError("disk")
    stop.request()
    assert stop.requested.is_set()
