"""One QEMU binary asked about itself over QMP: no machine, no guest, stopped, gone again after a tenth of a second.

    qemu-system-x86_64 -M none -S -nodefaults -no-user-config -display none -qmp stdio

much as libvirt probes it (qemu_process.c, qemuProcessQMPLaunch). The monitor is an inherited socket pair, so that
neither a path nor a port is needed; the process is killed by its id whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from virtmig.errors import ChannelError
from virtmig.facts import version

PROBE_S = 20.0
#: the schema is the longest answer, 250 kB with QEMU 11.1
ANSWER_LONGEST_BYTES = 16 << 20
_ARGUMENTS = ("-M", "none", "-S", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio")
_ERRORS_SHOWN_BYTES = 2000

#: what somebody who migrates may want to call; which of them a QEMU has tells more than its version
COMMANDS = (
    "migrate", "migrate-incoming", "migrate-recover", "migrate-pause", "migrate-continue", "migrate-start-postcopy",
    "migrate_cancel", "migrate-set-capabilities", "migrate-set-parameters", "query-migrate", "query-migrationthreads",
    "calc-dirty-rate", "query-dirty-rate", "set-vcpu-dirty-limit", "query-vcpu-dirty-limit", "announce-self", "yank",
    "query-yank", "nbd-server-start", "block-export-add", "blockdev-mirror", "getfd", "add-fd",
)  # fmt: skip


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One machine type (QMP MachineInfo)."""

    name: str
    alias: str = ""  # "pc" for pc-i440fx-7.2
    default: bool = False
    deprecated: bool = False
    cpus_max: int | None = None


class SchemaFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What query-qmp-schema says about migration."""

    commands: tuple[str, ...] = ()  # those of COMMANDS that exist
    arguments: dict[str, tuple[str, ...]] = {}  # of migrate and migrate-incoming: uri, channels, exit-on-error, ...
    parameters: tuple[str, ...] = ()  # that migrate-set-parameters takes
    choices: dict[str, tuple[str, ...]] = {}  # of parameters with named values: multifd-compression: none, zlib, zstd
    transports: tuple[str, ...] = ()  # kinds of address that `channels` takes: socket, exec, rdma, file
    unstable: tuple[str, ...] = ()  # commands, capabilities and parameters that QEMU marks so
    deprecated: tuple[str, ...] = ()
    features: dict[str, tuple[str, ...]] = {}  # any other feature flags of those commands


class EmulatorFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One QEMU binary of this host."""

    path: str
    modified_ns: int = 0
    size_bytes: int = 0
    version: int  # as facts.version() writes it
    package: str = ""  # the distribution's name for it
    arch: str = ""  # of its guests
    kvm: bool | None = None  # built with KVM; whether this user may use it, only a guest's start tells
    capabilities: tuple[str, ...] = ()
    parameters: dict[str, bool | int | str | None] = {}  # with the values that they begin with
    schema: SchemaFacts = SchemaFacts()
    machines: tuple[Machine, ...] = ()


def ask_emulator(path: str, *, prefix: Sequence[str] = (), seconds: float = PROBE_S) -> EmulatorFacts:
    """Start the binary, ask, kill it. `prefix` is a command that stands before it (chroot, setpriv).

    Raises ChannelError when it cannot be started, ends, says what is no QMP, or has not answered within `seconds`.
    """
    try:
        status = os.stat(path) if not prefix else None
    except OSError as error:
        raise ChannelError(f"{path}: {error.strerror}") from error
    with _started([*prefix, path], path, seconds) as monitor:
        number = monitor.greeting["version"]["qemu"]
        machines = monitor.execute("query-machines")
        kvm = monitor.execute("query-kvm", missing={}).get("present")
        return EmulatorFacts(
            path=path,
            modified_ns=status.st_mtime_ns if status else 0,
            size_bytes=status.st_size if status else 0,
            version=version(number["major"], number["minor"], number["micro"]),
            package=str(monitor.greeting["version"].get("package", "")),
            arch=monitor.execute("query-target")["arch"],
            kvm=None if kvm is None else bool(kvm),
            capabilities=tuple(row["capability"] for row in monitor.execute("query-migrate-capabilities")),
            parameters={
                name: value
                for name, value in monitor.execute("query-migrate-parameters").items()
                if isinstance(value, bool | int | str)
            },
            schema=read_schema(monitor.execute("query-qmp-schema")),
            machines=tuple(
                Machine(
                    name=row["name"],
                    alias=row.get("alias", ""),
                    default=row.get("is-default", False),
                    deprecated=row.get("deprecated", False),
                    cpus_max=row.get("cpu-max"),
                )
                for row in sorted(machines, key=lambda row: str(row["name"]))
            ),
        )


# -- the schema ----------------------------------------------------------------------------------------------------


def read_schema(rows: Sequence[dict[str, Any]]) -> SchemaFacts:
    """The answer of query-qmp-schema (QEMU docs/devel/qapi-code-gen.rst, client JSON protocol introspection). Pure.

    Types have numbers for names, so everything is looked up from a command's arguments.
    """
    by_name = {row["name"]: row for row in rows}
    commands = {name: by_name[name] for name in COMMANDS if by_name.get(name, {}).get("meta-type") == "command"}

    def members(command: str) -> dict[str, dict[str, Any]]:
        kind = by_name.get(commands.get(command, {}).get("arg-type", ""), {})
        return {row["name"]: row for row in kind.get("members", ())}

    def values(type_name: str) -> dict[str, dict[str, Any]]:
        kind = by_name.get(type_name, {})
        plain: dict[str, dict[str, Any]] = {name: {} for name in kind.get("values", ())}
        return plain | {row["name"]: row for row in kind.get("members", ()) if kind.get("meta-type") == "enum"}

    def element(type_name: str) -> dict[str, dict[str, Any]]:
        """The members of what an array holds."""
        inner = by_name.get(by_name.get(type_name, {}).get("element-type", ""), {})
        return {row["name"]: row for row in inner.get("members", ())}

    parameters = members("migrate-set-parameters")
    switches = element(members("migrate-set-capabilities").get("capabilities", {}).get("type", ""))
    capabilities = values(switches.get("capability", {}).get("type", ""))
    address = element(members("migrate").get("channels", {}).get("type", "")).get("addr", {})
    flagged = {
        name: tuple(row.get("features", ()))
        for table in (commands, capabilities, parameters)
        for name, row in table.items()
        if row.get("features")
    }
    choices = {name: tuple(values(row["type"])) for name, row in parameters.items()}
    return SchemaFacts(
        commands=tuple(commands),
        arguments={name: tuple(members(name)) for name in ("migrate", "migrate-incoming") if name in commands},
        parameters=tuple(parameters),
        choices={name: named for name, named in choices.items() if named},
        transports=tuple(row["case"] for row in by_name.get(address.get("type", ""), {}).get("variants", ())),
        unstable=tuple(name for name, flags in flagged.items() if "unstable" in flags),
        deprecated=tuple(name for name, flags in flagged.items() if "deprecated" in flags),
        features={
            name: others
            for name, flags in flagged.items()
            if (others := tuple(flag for flag in flags if flag not in ("unstable", "deprecated")))
        },
    )


# -- the process and its monitor -----------------------------------------------------------------------------------


def _leash() -> tuple[str, ...]:
    """Ends the QEMU with the thread that asks it, also when that one is killed: at the end of its monitor it stays."""
    found = shutil.which("setpriv")
    if found is None or Path(found).resolve().name != "setpriv":  # busybox has one without --pdeathsig
        return ()
    return (found, "--pdeathsig", "KILL", "--")


@contextlib.contextmanager
def _started(command: Sequence[str], name: str, seconds: float) -> Iterator[_Monitor]:
    deadline = time.monotonic() + seconds
    here, there = socket.socketpair()
    with here, tempfile.TemporaryFile() as errors:
        try:
            with there:
                process = subprocess.Popen(
                    [*_leash(), *command, *_ARGUMENTS],
                    stdin=there.fileno(),
                    stdout=there.fileno(),
                    stderr=errors,
                    cwd="/",
                    env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
                )
        except OSError as error:
            raise ChannelError(f"{name}: cannot be started: {error.strerror}") from error
        try:
            yield _Monitor(here, name, deadline)
        except ChannelError as error:
            said = _last_words(errors)
            raise ChannelError(f"{error}{f'; it said: {said}' if said else ''}", hint=error.hint) from error
        except (KeyError, TypeError, AttributeError, ValueError, msgspec.MsgspecError) as error:
            raise ChannelError(f"{name}: its answers are not those of a QEMU ({error!r})") from error
        finally:
            process.kill()
            process.wait()


def _last_words(errors: IO[bytes]) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - _ERRORS_SHOWN_BYTES))
    return " ".join(errors.read().decode(errors="replace").split())


class _Monitor:
    """QMP, one question at a time, until a deadline."""

    def __init__(self, connection: socket.socket, name: str, deadline: float) -> None:
        self._connection = connection
        self._name = name
        self._deadline = deadline
        self._pending = bytearray()
        self.greeting: dict[str, Any] = self._read()["QMP"]
        self.execute("qmp_capabilities")

    def execute(self, command: str, *, missing: Any = None) -> Any:
        """The command's answer; `missing`, when it is given, for a QEMU that refuses the command."""
        try:
            self._connection.sendall(msgspec.json.encode({"execute": command}) + b"\n")
        except OSError as error:
            raise ChannelError(f"{self._name}: {command}: {error.strerror}") from error
        while True:
            message = self._read()
            if "return" in message:
                return message["return"]
            if "error" in message:
                if missing is not None:
                    return missing
                raise ChannelError(f"{self._name}: {command}: {message['error'].get('desc', 'refused')}")

    def _read(self) -> dict[str, Any]:
        """The next message: a line of JSON."""
        searched = 0
        while (end := self._pending.find(b"\n", searched)) < 0:
            searched = len(self._pending)
            if searched > ANSWER_LONGEST_BYTES:
                raise ChannelError(f"{self._name}: an answer of more than {ANSWER_LONGEST_BYTES >> 20} MiB")
            left = self._deadline - time.monotonic()
            self._connection.settimeout(max(left, 0.001))
            try:
                more = self._connection.recv(1 << 18) if left > 0 else None
            except TimeoutError:
                more = None
            except OSError as error:
                raise ChannelError(f"{self._name}: its monitor: {error.strerror}") from error
            if more is None:
                raise ChannelError(f"{self._name}: has not answered in time", hint="deadlines.probe_s of agent.toml")
            if not more:
                raise ChannelError(f"{self._name}: ended before it had answered")
            self._pending += more
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        return msgspec.json.decode(line, type=dict[str, Any])
