"""What hooks/qemu asks of virtmig, each time libvirt calls it: fit an incoming guest's XML, refuse it, note the phase.

    libvirtd -> hooks/qemu (sh: contains whatever happens here) -> run()

libvirt waits for the answer, so this never calls libvirt, has a deadline, and imports what takes time only for a
`migrate begin` for which there are rules. What does not work is noted and libvirt goes on with the XML that it has,
unless the administrator asked for a gate:

    # /etc/virtmig/hook.toml; every key may be left out
    require = ["handshake", "rules"]
    rules = ["/etc/virtmig/rules.d"]
    log = "/var/log/virtmig/hook.jsonl"

`handshake`: only guests for which this host's agent has an agreed session. `rules`: rules that cannot be read, or that
would change what the guest sees, refuse the guest. A file that cannot be understood refuses too where it has a line
that begins with `require`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NamedTuple

from virtmig.integrations import hook_log

SYSTEM_FILE = "/etc/virtmig/hook.toml"
REQUIREMENTS = ("handshake", "rules")
#: exit status: the guest is refused. Any other than 0 means that this program did not work.
EXIT_VETOED = 3
#: what an answer and its note may take; hooks/qemu ends everything after 1.9 s
ANSWER_S, NOTE_S = 1.2, 0.3
#: the source goes on as soon as this host's agent has agreed, which may still be writing its journal
SESSION_S = 0.4
LONGEST_XML_BYTES = 16 << 20
#: `virtmig hooks test` alone sets these: libvirt hands on no such variable
TEST_LOG, TEST_SOURCE = "VIRTMIG_HOOK_LOG", "VIRTMIG_HOOK_SOURCE"
_UUID = re.compile(rb"<uuid>([0-9a-fA-F-]{36})</uuid>")
_WANTS_GATE = re.compile(r"^\s*require", re.MULTILINE)


class Call(NamedTuple):
    """As libvirt calls it (src/util/virhook.c virHookCall): what is not said is "-"."""

    guest: str
    operation: str
    suboperation: str = "-"
    extra: str = "-"
    xml: bytes = b""

    @property
    def incoming(self) -> bool:
        return self.operation == "migrate"

    @property
    def uuid(self) -> str:
        """The first in the XML: libvirt writes the domain's own before all else that has one."""
        found = _UUID.search(self.xml)
        return found[1].decode().lower() if found else ""


class Settings(NamedTuple):
    require: frozenset[str] = frozenset()
    rules: tuple[str, ...] = ()  # empty: /etc/virtmig/rules.d, when it is there
    log: str = ""  # empty: hook_log.default_log()
    problem: str = ""  # why the file could not be used


class Answer(NamedTuple):
    """`result` is noted, unchanged, rewritten, vetoed or failed open; `xml` is for libvirt when it was rewritten."""

    result: str
    xml: str = ""
    changes: tuple[str, ...] = ()
    reason: str = ""


class TooLate(Exception):
    """The deadline has passed."""


def read_settings(path: str = SYSTEM_FILE) -> Settings:
    """Never raises: what is wrong is its `problem`, and it requires all that can be required where a gate was meant."""
    try:
        with open(path, "rb") as file:
            text = file.read(1 << 20).decode()
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError) as error:
        return Settings(problem=f"{path} cannot be read: {error}")
    try:
        return _settings(text)
    except (ValueError, TypeError) as error:
        meant = REQUIREMENTS if _WANTS_GATE.search(text) else ()
        return Settings(require=frozenset(meant), problem=f"{path}: {error}")


def _settings(text: str) -> Settings:
    """Raises ValueError."""
    import tomllib

    given = tomllib.loads(text)
    if unknown := sorted(given.keys() - {"require", "rules", "log"}):
        raise ValueError(f"there is no key {unknown[0]}; there are require, rules and log")
    require, rules = _texts(given, "require"), _texts(given, "rules")
    if wrong := [name for name in require if name not in REQUIREMENTS]:
        raise ValueError(f"require = {wrong[0]!r}: it is {' or '.join(REQUIREMENTS)}")
    log = given.get("log", "")
    if not isinstance(log, str) or (log and not log.startswith("/")):
        raise ValueError(f"log = {log!r}: it is an absolute path")
    return Settings(frozenset(require), rules, log)


def _texts(given: dict[str, object], name: str) -> tuple[str, ...]:
    value = given.get(name, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is a text or a list of texts")
    return tuple(text for text in texts if text)


def answer(call: Call, settings: Settings, *, destination: str, source: str = "") -> Answer:
    """What libvirt is told. Only an incoming migration has an answer; of all others it is noted that they were."""
    if not call.incoming:
        return Answer("noted")
    try:
        if settings.problem and settings.require:
            return Answer("vetoed", reason=settings.problem)
        if "handshake" in settings.require and not agreed_session(call.uuid, within_s=SESSION_S):
            return Answer("vetoed", reason="hook.toml requires a handshake, and this host's agent has agreed on none: "
                          "use virtmig migrate --transport relay on the source")  # fmt: skip
        fitted = _fitted(call, settings.rules, destination=destination, source=source)
    except Exception as error:
        return _not_fitted(error, settings)
    return fitted._replace(reason=settings.problem) if settings.problem else fitted


def _not_fitted(error: Exception, settings: Settings) -> Answer:
    """Nothing was done to the XML. Where a gate was asked for, it is closed; no answer in time may hide either."""
    reason = f"{type(error).__name__}: {error}" if _is_ours_to_mend(error) else str(error)
    gate = settings.require if isinstance(error, TooLate) else settings.require & {"rules"}
    return Answer("vetoed" if gate else "failed open", reason=reason)


def _is_ours_to_mend(error: Exception) -> bool:
    return not isinstance(error, TooLate) and not type(error).__module__.startswith("virtmig.")


def _fitted(call: Call, paths: Sequence[str], *, destination: str, source: str) -> Answer:
    """Raises DomainXmlError, RequestError; ImportError and others where this installation is broken."""
    if not _may_have_rules(paths):
        return Answer("unchanged")
    from pathlib import Path

    from virtmig.domain.rewriting import rewrite
    from virtmig.rule_files import read_rules

    rules = read_rules([Path(path) for path in paths] or None)
    rewritten = rewrite(call.xml.decode(), rules, source=source, destination=destination, what="incoming XML")
    if not rewritten.changes:
        return Answer("unchanged")
    return Answer("rewritten", rewritten.xml, tuple(f"{change} [{change.rule}]" for change in rewritten.changes))


def _may_have_rules(paths: Sequence[str]) -> bool:
    """Whether reading rules is worth its time: most hosts have none. virtmig.rule_files has the last word."""
    for path in paths or ("/etc/virtmig/rules.d",):
        try:
            if any(name.endswith(".xml") for name in os.listdir(path)):
                return True
        except FileNotFoundError:
            if paths:
                return True  # a named one that is missing is an error, and reading says so
        except OSError:
            return True
    return False


# -- the agent's journal -------------------------------------------------------------------------------------------


def sessions_folder() -> str:
    """Where agent/journal.py keeps records, as engine.agents.runtime_folder has it, which takes long to import."""
    if os.geteuid() == 0:
        return "/run/virtmig/sessions"
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}", "virtmig", "sessions")


def agreed_session(uuid: str, *, within_s: float = 0.0) -> bool:
    """Whether this host's agent, which is alive, has agreed to take this guest (link/asking.py SessionRecord)."""
    until = time.monotonic() + within_s
    while not any(_agreed(record, uuid) for record in _sessions()):
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True


def _sessions() -> list[dict[str, object]]:
    folder, found = sessions_folder(), []
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    for name in names:
        if name.endswith(".json"):
            try:
                with open(os.path.join(folder, name), "rb") as file:
                    record = json.load(file)
            except (OSError, ValueError):
                continue
            found += [record] if isinstance(record, dict) else []
    return found


def _agreed(record: dict[str, object], uuid: str) -> bool:
    if record.get("role") != "destination" or record.get("state") not in ("established", "running"):
        return False
    return bool(uuid) and str(record.get("uuid")).lower() == uuid and _is_alive(record.get("pid"))


def _is_alive(pid: object) -> bool:
    return isinstance(pid, int) and pid > 0 and os.path.exists(f"/proc/{pid}")


# -- the program ---------------------------------------------------------------------------------------------------


def main(words: Sequence[str], xml: bytes) -> tuple[int, str]:
    """`words`: hook.toml, then libvirt's four. Returns the exit status and the XML for libvirt, if it is another."""
    began = time.monotonic()
    guest, operation, suboperation, extra = (*words[1:5], "-", "-", "-", "-")[:4]
    call = Call(guest, operation, suboperation, extra, xml)
    settings = read_settings(words[0])
    host = os.uname().nodename
    with _Alarm(ANSWER_S):
        given = answer(call, settings, destination=host, source=os.environ.get(TEST_SOURCE, ""))
    if given.reason:
        print(f"virtmig: {call.guest}: {given.result}: {given.reason}", file=sys.stderr)
    row: hook_log.Row = {
        "time": time.time(),
        "host": host,
        "guest": call.guest,
        "uuid": call.uuid,
        "operation": call.operation,
        "suboperation": call.suboperation,
        "extra": call.extra,
        "result": given.result,
        "took_ms": round((time.monotonic() - began) * 1000),
    }
    row |= {"changes": given.changes} if given.changes else {}
    row |= {"reason": given.reason} if given.reason else {}
    try:
        with _Alarm(NOTE_S):
            hook_log.append(os.environ.get(TEST_LOG) or settings.log or hook_log.default_log(), row)
    except (OSError, TooLate) as error:
        print(f"virtmig: {call.guest}: {call.operation} was not noted: {error}", file=sys.stderr)
    return EXIT_VETOED if given.result == "vetoed" else 0, given.xml


class _Alarm:
    """Raises TooLate within the block when it takes longer."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_exception: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, _number: int, _frame: FrameType | None) -> None:
        raise TooLate(f"no answer within {self._seconds:g} s")


def run() -> None:
    """Behind hooks/qemu. Ends the process."""
    xml = sys.stdin.buffer.read(LONGEST_XML_BYTES + 1)
    if len(xml) > LONGEST_XML_BYTES:
        raise SystemExit(f"virtmig: an XML of more than {LONGEST_XML_BYTES >> 20} MiB")
    status, text = main(sys.argv[1:], xml)
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()
    sys.stderr.flush()
    os._exit(status)  # nothing is left to be done, and taking the interpreter down takes as long as the answer
