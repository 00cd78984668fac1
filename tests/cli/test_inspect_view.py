"""One line an event, and names from a file that cannot do harm to a terminal."""

from __future__ import annotations

from tests.support.streams import STREAM
from virtmig.cli.inspect_view import clean, event_line, item_words
from virtmig.stream.commands import command
from virtmig.stream.events import Command, Package
from virtmig.stream.wire import Command as Number


def test_what_cannot_be_printed_is_escaped() -> None:
    assert clean("a\nb\u202ec\x1b[2J") == "a\\nb\\u202ec\\x1b[2J"


def test_every_event_has_a_line() -> None:
    for event in [*STREAM, Package(5, (command(Number.POSTCOPY_LISTEN),)), Command(3, b"")]:
        name, words = event_line(event)
        assert name
        assert words.isprintable()
    assert item_words(b"\x04\0\0\0\7\3cpu\0\0\0\0") == "SECTION_FULL 'cpu'"
    assert item_words(b"\x08\0\x02\0\4") == "PING"
    assert item_words(b"\x99") == ""
