"""Asking a host, with a deadline; libvirt's states as Presence."""

from __future__ import annotations

import threading

import libvirt
import pytest

from virtmig.virt.connection import close_connection
from virtmig.virt.hosts import Host, NoAnswerError, answer_within, read_state
from virtmig.whereabouts import Presence

PAUSED, RUNNING = libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_RUNNING


def test_answer_comes_back_with_value_or_error() -> None:
    assert answer_within(5, lambda: 41 + 1) == 42
    with pytest.raises(ZeroDivisionError):
        answer_within(5, lambda: 1 // 0)


def test_a_call_that_hangs_is_no_answer() -> None:
    release = threading.Event()
    try:
        with pytest.raises(NoAnswerError, match=r"0\.05 s"):
            answer_within(0.05, release.wait)
    finally:
        release.set()


class Connection:
    """Only its end counts."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


def test_no_connection_is_closed_under_a_call_that_nobody_waits_for() -> None:
    """libvirt 9.0 reads the connection again when the call comes back: with a frozen daemon it was freed by then."""
    release, connection = threading.Event(), Connection()
    try:
        with pytest.raises(NoAnswerError):
            answer_within(0.01, release.wait)
        close_connection(connection)
        assert not connection.closed.is_set()
    finally:
        release.set()
    assert connection.closed.wait(20)


@pytest.mark.parametrize("own", [True, False])
def test_a_connection_is_closed_at_once_where_no_call_can_be_on_it(own: bool) -> None:
    release, connection = threading.Event(), Connection()
    try:
        if own:
            with pytest.raises(NoAnswerError):
                answer_within(0.01, release.wait, own=True)
        else:
            answer_within(20, lambda: None)
        close_connection(connection)
        assert connection.closed.is_set()
    finally:
        release.set()


@pytest.mark.parametrize(
    ("state", "reason", "incoming", "presence"),
    [
        (RUNNING, 1, False, "running"),
        (RUNNING, libvirt.VIR_DOMAIN_RUNNING_MIGRATED, True, "running"),
        (RUNNING, libvirt.VIR_DOMAIN_RUNNING_POSTCOPY, True, "postcopy"),
        (RUNNING, 11, True, "postcopy failed"),
        (PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER, False, "paused"),
        (PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION, False, "leaving"),
        (PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION, True, "incoming"),
        (PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP, True, "incoming"),
        (PAUSED, libvirt.VIR_DOMAIN_PAUSED_POSTCOPY, False, "postcopy"),
        (PAUSED, libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED, False, "postcopy failed"),
        (libvirt.VIR_DOMAIN_SHUTOFF, 4, False, "shut off"),
        (libvirt.VIR_DOMAIN_CRASHED, 0, False, "shut off"),
        (libvirt.VIR_DOMAIN_BLOCKED, 0, False, "running"),
        (libvirt.VIR_DOMAIN_PMSUSPENDED, 0, False, "running"),
        (99, 0, False, "running"),  # a state we do not know is not taken for "stopped"
    ],
)
def test_states(state: int, reason: int, incoming: bool, presence: str) -> None:
    assert read_state(state, reason, incoming=incoming) == presence


def test_asking_the_test_driver() -> None:
    host = Host("test:///default")
    try:
        domain = host.connection.lookupByName("test")
        assert host.ask(domain.UUIDString(), incoming=False).presence is Presence.RUNNING
        assert host.ask("00000000-1111-2222-3333-444444444444", incoming=False).presence is Presence.ABSENT
        domain.suspend()
        try:
            assert host.ask(domain.UUIDString(), incoming=False).presence is Presence.PAUSED
        finally:
            domain.resume()  # the driver is shared by the whole process, as long as anybody holds a connection to it
    finally:
        host.close()


def test_a_host_that_hangs_gives_no_answer_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host("test:///default")
    release = threading.Event()
    monkeypatch.setattr("virtmig.virt.hosts._look", lambda *_args, **_kw: release.wait())
    try:
        answer = host.ask("00000000-1111-2222-3333-444444444444", incoming=True, seconds=0.05)
    finally:
        release.set()
        host.close()
    assert answer.presence is Presence.NO_ANSWER
    assert "no answer" in answer.detail
