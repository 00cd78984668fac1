"""One line for each event: colours for people, JSON lines for programs, fields for the journal. Secrets never.

    log = get_logger("agent.session").bind(domain="web01", session="5f2c")
    log.info("channel opened", channel="parallel-1", peer="host-b.example.org")

Events of the library (stdlib loggers below `virtmig`) come out the same way.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO, cast

import msgspec
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from virtmig.agent.config import LogFormat, LogSection

JOURNAL_SOCKET = "/run/systemd/journal/socket"
_IDENTIFIER = "virtmig-agent"
#: the journal takes a datagram of about 200 kB; nothing that we say needs more
_VALUE_LONGEST = 16_384
_HIDDEN = "(hidden)"
_SECRET = re.compile(r"(^|_)(secret|psk|key|password|passphrase|proof|token|nonce)s?$", re.IGNORECASE)
#: syslog(3)
_PRIORITIES = {"critical": 2, "error": 3, "exception": 3, "warning": 4, "info": 6, "debug": 7}


def configure_logs(
    section: LogSection | None = None, *, stream: TextIO | None = None, journal: str = JOURNAL_SOCKET
) -> LogFormat:
    """Set up structlog and the loggers below `virtmig`, once for the process; the format that was taken.

    `stream` is standard error unless given. A journal that is not there is replaced by JSON lines.
    """
    section = section or LogSection()
    stream = stream or sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        without_secrets,
    ]
    chosen = _choose(section.format, stream, journal)
    handler: logging.Handler
    if chosen == "journal":
        handler = JournalHandler(journal)
        last: list[Processor] = [structlog.processors.format_exc_info, cast(Processor, _journal_fields)]
    else:
        handler = logging.StreamHandler(stream)
        if chosen == "json":
            last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
        else:
            colours = stream.isatty() and "NO_COLOR" not in os.environ
            # the other formatters show local variables, and there are secrets in some
            last = [structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=structlog.dev.plain_traceback)]
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logger = logging.getLogger("virtmig")
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.setLevel(section.level.upper())
    logger.propagate = False
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    return chosen


def get_logger(name: str = "agent") -> FilteringBoundLogger:
    """A logger below `virtmig`; `bind` gives it what every event of a session or peer should carry."""
    return cast(FilteringBoundLogger, structlog.stdlib.get_logger(f"virtmig.{name}"))


def without_secrets(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """structlog processor: values under the name of a secret are hidden, bytes become their length. All depths."""
    return {name: _cleaned(name, value) for name, value in event.items()}


def _cleaned(name: str, value: Any) -> Any:
    if name.startswith("_"):  # structlog's own: the record
        return value
    if _SECRET.search(name) and value not in (None, "", b"", True, False):
        return _HIDDEN
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _cleaned(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned("", inner) for inner in value]
    return value


def _choose(wanted: LogFormat, stream: TextIO, journal: str) -> LogFormat:
    if wanted == "auto":
        if _stands_in_journal(stream, os.environ):
            wanted = "journal"
        else:
            wanted = "console" if stream.isatty() else "json"
    return "json" if wanted == "journal" and not os.path.exists(journal) else wanted


def _stands_in_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether the stream is the one that systemd has connected to the journal: systemd.exec(5), $JOURNAL_STREAM."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no descriptor behind it
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


# -- the journal ---------------------------------------------------------------------------------------------------


class JournalHandler(logging.Handler):
    """Sends what the formatter made, fields in journald's native protocol, as datagrams. Nothing waits for it."""

    def __init__(self, address: str = JOURNAL_SOCKET) -> None:
        super().__init__()
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = json.loads(self.format(record))
            self._socket.sendto(encode_journal(fields), self._address)
        except BlockingIOError:
            pass  # a journal that cannot keep up must not stop a migration
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        self._socket.close()
        super().close()


def _journal_fields(logger: WrappedLogger, method: str, event: MutableMapping[str, Any]) -> str:
    """structlog's last processor: the journal's own fields, ours behind VIRTMIG_. JSON: a formatter gives text."""
    level = str(event.pop("level", "info"))
    event.pop("timestamp", None)  # the journal has its own
    fields: dict[str, str] = {
        "MESSAGE": str(event.pop("event", "")),
        "PRIORITY": str(_PRIORITIES.get(level, 6)),
        "SYSLOG_IDENTIFIER": _IDENTIFIER,
    }
    for name, value in event.items():
        fields["VIRTMIG_" + re.sub(r"[^A-Z0-9]", "_", name.upper())[:50]] = str(value)
    if details := " ".join(f"{name}={value}" for name, value in event.items() if name not in ("logger", "exception")):
        fields["MESSAGE"] += f" ({details})"
    return json.dumps(fields)


def encode_journal(fields: Mapping[str, str]) -> bytes:
    """journald's native protocol: NAME=value lines; a value with line ends as its length and its bytes."""
    parts = []
    for name, value in fields.items():
        data = value[:_VALUE_LONGEST].encode("utf-8", "replace")
        if b"\n" in data:
            parts.append(name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n")
        else:
            parts.append(name.encode() + b"=" + data + b"\n")
    return b"".join(parts)
