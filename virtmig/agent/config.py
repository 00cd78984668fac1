"""agent.toml: every key with its default and unit. Strict: an unknown key, a bad value or an open file is refused.

systemd/agent.toml shows every key; a test holds the two together. Precedence: defaults, then the file.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from virtmig.engine.agents import DEFAULT_PORT, default_socket, runs_as_system, runtime_folder
from virtmig.errors import RequestError

SYSTEM_FILE = Path("/etc/virtmig/agent.toml")
#: sockaddr_un.sun_path of Linux, with its closing zero
UNIX_PATH_LONGEST_BYTES = 107

Right = Literal["send", "receive", "manage"]
Security = Literal["tls", "key", "plain"]
Level = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json", "journal"]

Count = Annotated[int, msgspec.Meta(ge=0, le=10_000)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
#: a folder's or socket's rights as chmod takes them, e.g. "0660"; nothing for others, except on the clients' socket
Mode = Annotated[str, msgspec.Meta(pattern=r"^0[0-7]{3}$")]
PEER_KINDS = ("tls", "user", "group", "ssh", "key", "plain")


class Address(msgspec.Struct, frozen=True):
    """Where to listen or dial: `tcp:HOST:PORT` (`tcp:[::1]:16515`; no port: 16515; port 0: any) or `unix:PATH`."""

    kind: Literal["tcp", "unix"]
    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ValueError that says what is wrong with `text`."""
        kind, _, rest = text.partition(":")
        if kind == "unix":
            if not rest.startswith("/"):
                raise ValueError(f"{text!r}: unix: takes an absolute path")
            if len(os.fsencode(rest)) > UNIX_PATH_LONGEST_BYTES:
                raise ValueError(f"{text!r}: a socket's path has at most {UNIX_PATH_LONGEST_BYTES} bytes")
            return cls("unix", path=rest)
        if kind != "tcp":
            raise ValueError(f"{text!r}: an address is tcp:HOST:PORT or unix:PATH")
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^:\[\]\s]+))(?::(\d{1,5}))?", rest)
        if match is None or int(match[3] or 0) > 65535:
            raise ValueError(f"{text!r}: tcp: takes HOST or HOST:PORT, an IPv6 address in brackets")
        return cls("tcp", host=match[1] or match[2], port=DEFAULT_PORT if match[3] is None else int(match[3]))

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file."""


class AllowRow(Section, frozen=True, kw_only=True):
    """Who may do what. A peer has the rights of all rows that fit it.

    `peer` is `tls:PATTERN` (a name in its certificate; `*` stands for anything, dots too), `user:NAME` or `group:NAME`
    (of the process on a unix socket; names or numbers), `ssh:PATTERN` (a host dialled by ssh, for clients other than
    root and the agent's own user), `key` (proved the pre-shared key) or `plain` (nothing proved).
    `send`: bring guests to this host. `receive`: be given guests of this host. `manage`: the agent's own verbs.
    """

    peer: str
    rights: tuple[Right, ...]

    def __post_init__(self) -> None:
        kind, _, name = self.peer.partition(":")
        if kind not in PEER_KINDS or (kind in ("key", "plain")) == bool(name):
            kinds = "tls:PATTERN, user:NAME, group:NAME, ssh:PATTERN, key or plain"
            raise ValueError(f"peer = {self.peer!r}: it is {kinds}")

    @property
    def kind(self) -> str:
        return self.peer.partition(":")[0]

    @property
    def pattern(self) -> str:
        return self.peer.partition(":")[2]


class TlsSection(Section, frozen=True, kw_only=True):
    """Files in PEM. Empty: those of the first folder of the search order that has them (certificates.py)."""

    folder: str = ""  # searched instead of the usual folders; QEMU's or libvirt's file names
    ca_file: str = ""
    crl_file: str = ""  # certificates taken back; optional
    server_certificate_file: str = ""  # shown by this host when it accepts
    server_key_file: str = ""
    client_certificate_file: str = ""  # shown by this host when it dials
    client_key_file: str = ""


class LocalSection(Section, frozen=True, kw_only=True):
    """The socket that clients on this host use."""

    socket: str = ""  # empty: /run/virtmig/agent.sock, of an ordinary user $XDG_RUNTIME_DIR/virtmig/agent.sock
    group: str = ""
    mode: Mode = "0660"


class QemuSection(Section, frozen=True, kw_only=True):
    """QEMU of this host: its binaries, its user, and where the agent's sockets for it are."""

    emulators: tuple[str, ...] = ()  # besides those found in PATH and the usual places
    sockets_folder: str = ""  # empty: /run/virtmig/qemu, of an ordinary user $XDG_RUNTIME_DIR/virtmig/qemu
    user: str = ""  # name or number; empty: libvirt's word, else unknown
    group: str = ""  # the folder's; empty: as it is made
    sockets_mode: Mode = "0770"
    libvirt_uri: str = ""  # empty: qemu:///system for root, qemu:///session else; "none": libvirt is not asked

    def __post_init__(self) -> None:
        if int(self.sockets_mode, 8) & 0o007:
            raise ValueError("sockets_mode: others than QEMU's user and group may have no rights (0770, 0710, 0700)")


class LimitsSection(Section, frozen=True, kw_only=True):
    """What may run at once. 0 for the bandwidth: no limit; 0 migrations: none are accepted."""

    migrations_in: Count = 4
    migrations_out: Count = 4
    parallel_connections: Annotated[int, msgspec.Meta(ge=1, le=255)] = 16  # multifd channels of one migration
    bandwidth_bytes_per_s: Annotated[int, msgspec.Meta(ge=0)] = 0  # of all migrations out together


class DeadlinesSection(Section, frozen=True, kw_only=True):
    """Seconds."""

    stop_s: Seconds = 300.0  # after SIGTERM, running migrations may finish that long, then they are aborted safely
    reconnect_s: Seconds = 60.0  # broken connections are dialled again that long
    probe_s: Seconds = 20.0  # a QEMU or libvirt that is asked about itself has that long to answer


class LogSection(Section, frozen=True, kw_only=True):
    """auto: the journal under systemd, colours on a terminal, JSON lines elsewhere."""

    level: Level = "info"
    format: LogFormat = "auto"


class MetricsSection(Section, frozen=True, kw_only=True):
    """Prometheus' text format over plain HTTP."""

    listen: str = ""  # tcp:HOST:PORT; empty: none

    def __post_init__(self) -> None:
        if self.listen and Address.parse(self.listen).kind != "tcp":
            raise ValueError(f"metrics.listen = {self.listen!r}: Prometheus asks over TCP, tcp:127.0.0.1:9516")


class AgentConfig(Section, frozen=True, kw_only=True):
    """The whole file."""

    listen: tuple[str, ...] = (f"tcp:[::]:{DEFAULT_PORT}",)  # not used when systemd hands over sockets
    security: Security = "tls"  # on tcp: mutual TLS, the pre-shared key alone, or nothing at all
    key_file: str = ""  # the pre-shared key in hexadecimal; asked for wherever it is set, with TLS too
    allow: tuple[AllowRow, ...] = ()
    local: LocalSection = LocalSection()
    tls: TlsSection = TlsSection()
    qemu: QemuSection = QemuSection()
    limits: LimitsSection = LimitsSection()
    deadlines: DeadlinesSection = DeadlinesSection()
    log: LogSection = LogSection()
    metrics: MetricsSection = MetricsSection()

    def __post_init__(self) -> None:
        for text in self.listen:
            Address.parse(text)
        if self.security == "key" and not self.key_file:
            raise ValueError('security = "key" needs key_file')

    @property
    def addresses(self) -> tuple[Address, ...]:
        return tuple(Address.parse(text) for text in self.listen)

    @property
    def local_socket(self) -> Path:
        return Path(self.local.socket) if self.local.socket else default_socket()

    @property
    def sockets_folder(self) -> Path:
        return Path(self.qemu.sockets_folder) if self.qemu.sockets_folder else runtime_folder() / "qemu"


def default_file() -> Path:
    """/etc/virtmig/agent.toml, for an ordinary user ~/.config/virtmig/agent.toml."""
    if runs_as_system():
        return SYSTEM_FILE
    folder = os.environ.get("XDG_CONFIG_HOME")
    return (Path(folder) if folder else Path.home() / ".config") / "virtmig" / "agent.toml"


def load_config(path: Path | None = None) -> AgentConfig:
    """Read `path`, else the default file; the defaults when that does not exist. Raises RequestError, all at once."""
    wanted = path if path is not None else default_file()
    try:
        text = wanted.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path is None:
            return AgentConfig()
        raise RequestError(f"{wanted}: no such file", option="config") from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RequestError(f"{wanted}: cannot be read: {why}", option="config") from error
    return parse_config(text, str(wanted))


def parse_config(text: str, name: str = "agent.toml") -> AgentConfig:
    """Raises RequestError: syntax with line and column, every unknown key with its line and the nearest known one."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{name}: {error}", option="config") from error
    unknown = [f"{name}{_line(text, keys)}: {words}" for keys, words in _unknown_keys(content, AgentConfig, ())]
    if unknown:
        raise RequestError("\n".join(unknown), option="config", hint="the sample agent.toml shows every key")
    try:
        return msgspec.convert(content, AgentConfig)
    except msgspec.ValidationError as error:
        words, _, where = str(error).partition(" - at `$")
        keys = tuple(re.findall(r"\w+", re.sub(r"\[[.\d]*\]", "", where)))
        raise RequestError(
            f"{name}{_line(text, keys)}: {'.'.join(keys)}{': ' if keys else ''}{words}", option="config"
        ) from error


def field_names(kind: type[msgspec.Struct] = AgentConfig, before: str = "") -> Iterator[str]:
    """Every key as the file writes it, tables dotted: `listen`, `limits.migrations_in`, ..."""
    for name, hint in get_type_hints(kind).items():
        inner = _struct_in(hint)
        if inner is None or get_origin(hint) is tuple:
            yield f"{before}{name}"
        if inner is not None:
            yield from field_names(inner, f"{before}{name}.")


def _unknown_keys(
    content: dict[str, Any], kind: type[msgspec.Struct], where: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    hints = get_type_hints(kind)
    for key, value in content.items():
        keys = (*where, key)
        if key not in hints:
            yield keys, f"unknown key {'.'.join(keys)}{_nearest(key, where, hints)}"
            continue
        inner = _struct_in(hints[key])
        for table in (value if isinstance(value, list) else [value]) if inner else ():
            if isinstance(table, dict) and inner is not None:
                yield from _unknown_keys(table, inner, keys)


def _nearest(key: str, where: tuple[str, ...], hints: dict[str, Any]) -> str:
    """The key that was meant: in the same table, else the same name in another one."""
    if found := difflib.get_close_matches(key, hints, 1):
        return f"; did you mean {'.'.join((*where, found[0]))}?"
    everywhere = {name.rpartition(".")[2]: name for name in field_names()}
    if found := difflib.get_close_matches(key, everywhere, 1):
        return f"; did you mean {everywhere[found[0]]}?"
    return ""


def _struct_in(hint: Any) -> type[msgspec.Struct] | None:
    for candidate in (hint, *get_args(hint)):
        plain = not isinstance(candidate, types.GenericAlias)
        if plain and isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return candidate
    return None


def _line(text: str, keys: tuple[str, ...]) -> str:
    """`:12` when the key can be found by its line, else nothing."""
    table: tuple[str, ...] = ()
    best = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([\w.\"' -]+?)\s*\]", line):
            table = tuple(part.strip("\"' ") for part in header[1].split("."))
            here = table
        elif assignment := re.match(r"\s*([\w\"'.-]+)\s*=", line):
            here = (*table, *(part.strip("\"'") for part in assignment[1].split(".")))
        else:
            continue
        if here == keys:
            return f":{number}"
        if here == keys[: len(here)]:
            best = f":{number}"
    return best
