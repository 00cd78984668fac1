"""Events in each format, and that no secret gets into any."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import structlog

from virtmig.agent import logs
from virtmig.agent.config import LogFormat, LogSection
from virtmig.agent.logs import configure_logs, encode_journal, get_logger

SECRET = b"\x01\x23\x45\x67\x89\xab\xcd\xef-hunter2"
WORDS = ("hunter2", "0123456789abcdef", repr(SECRET)[2:-1])


class Agreement(msgspec.Struct):
    secret: bytes
    session: bytes


@dataclasses.dataclass
class Proofs:
    session_secret: str
    index: int


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("virtmig")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]
    structlog.reset_defaults()


def lines(format: LogFormat, *, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    assert configure_logs(LogSection(format=format, level=level), stream=stream) == format  # type: ignore[arg-type]
    return stream


def test_json_is_one_object_a_line_with_what_was_bound() -> None:
    stream = lines("json")
    log = get_logger("agent.session").bind(domain="web01", peer="host-b")
    log.info("channel opened", channel="parallel-1")
    log.debug("too small")
    with structlog.contextvars.bound_contextvars(session="5f2c"):
        logging.getLogger("virtmig.link").warning("%d channels", 3)  # the library's own way
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert {first[name] for name in ("event", "domain", "peer", "channel", "level")} == {
        "channel opened", "web01", "host-b", "parallel-1", "info"}  # fmt: skip
    assert first["logger"] == "virtmig.agent.session"
    assert first["timestamp"].endswith("Z")
    assert (second["event"], second["session"], second["logger"]) == ("3 channels", "5f2c", "virtmig.link")


def test_the_level_counts_for_both_ways() -> None:
    stream = lines("json", level="error")
    get_logger().warning("no")
    logging.getLogger("virtmig.link").warning("no")
    get_logger().error("yes")
    logging.getLogger("virtmig.link").error("yes")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["yes", "yes"]


@pytest.mark.parametrize("format", ["json", "console", "journal"])
def test_no_secret_gets_out(format: LogFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="vm", dir="/tmp") as folder, journal(Path(folder)) as listening:
        configure_logs(LogSection(format=format, level="debug"), stream=stream, journal=f"{folder}/socket")
        log = get_logger().bind(key=SECRET, psk=SECRET.decode("latin-1"))
        secret = SECRET
        log.info(
            "opened", message=Agreement(secret=SECRET, session=b"abcd"), proofs=Proofs("hunter2", 3),
            nested={"session_secret": "hunter2", "list": [{"password": "hunter2"}, SECRET]}, data=memoryview(SECRET),
            nonce=SECRET, proof=SECRET.hex(), index=7, keyed=True, key_file="/etc/virtmig/key", tokens="hunter2",
        )  # fmt: skip
        try:
            raise ValueError("broken") from KeyError(len(secret))
        except ValueError:
            log.exception("failed")
        said = stream.getvalue() + b"".join(received(listening)).decode()
    for word in WORDS:
        assert word not in said
    assert said.count("(hidden)") >= 6
    for kept in ("opened", "index", "7", "/etc/virtmig/key", f"<{len(SECRET)} bytes>", "<4 bytes>", "Traceback"):
        assert kept in said, kept


def test_a_value_that_json_does_not_know_is_said_as_text() -> None:
    stream = lines("json")
    get_logger().info("x", path=Path("/a"), numbers=(1, 2), kinds={"set"})
    said = json.loads(stream.getvalue())
    assert (said["path"], said["numbers"], said["kinds"]) == ("/a", [1, 2], "{'set'}")


def test_console_has_no_colours_where_nobody_sees_them() -> None:
    stream = lines("console")
    get_logger().warning("careful", channel="main")
    assert "\x1b" not in stream.getvalue()
    assert "careful" in stream.getvalue()
    assert "channel=main" in stream.getvalue()


def test_configuring_again_replaces() -> None:
    old, new = lines("json"), lines("json")
    get_logger().info("once")
    assert old.getvalue() == ""
    assert new.getvalue().count("\n") == 1


# -- the journal ---------------------------------------------------------------------------------------------------


def journal(folder: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(str(folder / "socket"))
    listening.setblocking(False)
    return listening


def received(listening: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            yield listening.recv(1 << 18)
        except BlockingIOError:
            return


def test_fields_for_the_journal() -> None:
    with tempfile.TemporaryDirectory(prefix="vm", dir="/tmp") as folder, journal(Path(folder)) as listening:
        address = f"{folder}/socket"
        stream = io.StringIO()
        assert configure_logs(LogSection(format="journal"), stream=stream, journal=address) == "journal"
        get_logger("agent").error("refused", peer="host-b", reason="two\nlines")
        (datagram,) = received(listening)
    assert stream.getvalue() == ""
    assert b"PRIORITY=3\n" in datagram
    assert b"SYSLOG_IDENTIFIER=virtmig-agent\n" in datagram
    assert b"VIRTMIG_PEER=host-b\n" in datagram
    assert b"VIRTMIG_REASON\n\x09\0\0\0\0\0\0\0two\nlines\n" in datagram
    assert b"MESSAGE\n" in datagram  # the same reason stands in it
    assert b"refused (" in datagram


def test_a_journal_that_is_full_or_gone_stops_nobody() -> None:
    with tempfile.TemporaryDirectory(prefix="vm", dir="/tmp") as folder, journal(Path(folder)) as listening:
        configure_logs(LogSection(format="journal"), stream=io.StringIO(), journal=f"{folder}/socket")
        log = get_logger()
        for number in range(2000):
            log.info("x", text="y" * 20_000, number=number)
        kept = list(received(listening))
    assert 0 < len(kept) < 2000
    assert max(map(len, kept)) < 60_000


def test_auto_takes_the_journal_only_when_standard_error_leads_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="vm", dir="/tmp") as folder, journal(Path(folder)):
        address = f"{folder}/socket"
        with open(os.devnull, "w") as stream:
            status = os.fstat(stream.fileno())
            monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
            assert configure_logs(stream=stream, journal=address) == "journal"
            assert configure_logs(stream=stream, journal=f"{address}-gone") == "json"
            monkeypatch.setenv("JOURNAL_STREAM", "1:1")
            assert configure_logs(stream=stream, journal=address) == "json"
        monkeypatch.delenv("JOURNAL_STREAM")
        assert configure_logs(stream=io.StringIO(), journal=address) == "json"
        leader, follower = os.openpty()
        with open(leader, "rb", buffering=0), open(follower, "w") as terminal:
            assert configure_logs(stream=terminal, journal=address) == "console"


def test_a_long_value_is_cut() -> None:
    assert len(encode_journal({"MESSAGE": "x" * 1_000_000})) < 20_000
    assert logs.without_secrets(None, "info", {"secret": ""})["secret"] == ""  # nothing is hidden where nothing is
