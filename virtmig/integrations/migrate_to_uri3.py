"""Called as libvirt-python: the migrate methods of a virDomain, with virtmig's plan, handshake and policy underneath.

    wrap(domain)        an object like the domain whose migrateToURI3 and siblings go through virtmig
    install()           the same for every libvirt.virDomain of this process, until uninstall()

A call goes through virtmig when the option table has words for all of it. Otherwise it goes to the binding exactly as
it came: an unknown flag or parameter, a value of another type, a combination that libvirt refuses, another driver, a
read-only connection. libvirt then says so itself. What the two hosts cannot do is a libvirtError with libvirt's code
for it, before anything has started (libvirt_errors.py).

What the caller has no word for (the transport, the fence, what to do about memory that does not converge) comes from
`Settings`: a TOML file that $VIRTMIG_POLICY names, else /etc/virtmig/policy.toml, else nothing. Nothing is printed; the
logger is "virtmig.facade".
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from virtmig.agreement import Plan
from virtmig.ends import check_files
from virtmig.errors import ConnectionFailed, MigrationError, RequestError
from virtmig.forecast import Forecast
from virtmig.integrations import libvirt_errors
from virtmig.migrate import migrate
from virtmig.options import BY_NAME, OPTIONS, Kind
from virtmig.policy import Decision
from virtmig.progress import Outcome, Progress
from virtmig.request import MigrationRequest, Value, check_value
from virtmig.virt.facade import MigrateCalled, NotOurs, WrappedDomain, patch, read_options, unpatch

log = logging.getLogger("virtmig.facade")

SETTINGS_VARIABLE = "VIRTMIG_POLICY"
SETTINGS_FILE = Path("/etc/virtmig/policy.toml")
#: a manager watches the job itself and decides when to switch or give up, and tries again by itself
_CALLER_DECIDES: dict[str, Value] = {"on-stall": "continue", "retries": 0}
#: what a caller has no argument for, without what makes no sense for one that is a program
DEFAULTS = tuple(row for row in OPTIONS if not (row.flag or row.param or row.required) and row.group != "output"
                 and row.name not in ("direct", "verbose", "plan", "threads"))  # fmt: skip


class Settings(msgspec.Struct, frozen=True):
    """Options for every call, by name; each is left out of a call that it does not go with."""

    defaults: Mapping[str, Value] = msgspec.field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None = None) -> Settings:
        """From `path`, else from where the module's docstring says. Raises RequestError naming the file and the key."""
        if path is None:
            named = os.environ.get(SETTINGS_VARIABLE, "")
            if not named and not SETTINGS_FILE.exists():
                return cls()
            path = Path(named) if named else SETTINGS_FILE
        try:
            content = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise RequestError(f"cannot read {path}: {error}", hint=f"TOML, or unset {SETTINGS_VARIABLE}") from None
        rows = {row.name: row for row in DEFAULTS}
        for key, value in content.items():
            if key not in rows:
                raise RequestError(f"{path}: {key} is no setting", option=key, hint=f"one of {', '.join(rows)}")
            if value is not False:
                try:
                    check_value(rows[key], value)
                except RequestError as error:
                    raise RequestError(f"{path}: {error}", option=key, hint=error.hint) from None
        return cls(content)


def wrap(domain: Any, settings: Settings | None = None) -> Any:
    """`domain` with the migrate methods of this module; all else, isinstance() included, is the domain's own."""
    return WrappedDomain(domain, _Facade(settings))


def install(settings: Settings | None = None) -> None:
    """Patch libvirt.virDomain for this process. Installations nest; each is taken back by one `uninstall`."""
    patch(_Facade(settings))


def uninstall() -> bool:
    """Take the last installation back; False when there was none."""
    return unpatch()


@contextlib.contextmanager
def installed(settings: Settings | None = None) -> Iterator[None]:
    """`install` as a context."""
    install(settings)
    try:
        yield
    finally:
        uninstall()


#: UUIDs of the guests that a facade of this process moves: whoever else calls meanwhile gets libvirt's own answer
_under_way: set[str] = set()
_under_way_lock = threading.Lock()


class _Facade:
    """Answers calls; `settings` None: read anew for each call, so that a change needs no restart."""

    def __init__(self, settings: Settings | None) -> None:
        self.settings = settings

    def __call__(self, call: MigrateCalled) -> Any:
        if call.managed and call.destination is None:
            raise libvirt_errors.no_connection(call.method)
        try:
            source_uri, destination_uri = call.uris()
            options = read_options(call)
            uuid = str(call.domain.UUIDString())
            _refuse_green_threads()
        except NotOurs as reason:
            log.info("%s is left to libvirt: %s", call.method, reason)
            return call.native()
        with _one_at_a_time(uuid) as first, contextlib.ExitStack() as files:
            if not first:
                log.info("%s is left to libvirt: the guest is on its way already", call.method)
                return call.native()
            try:
                settings = self.settings or Settings.read()
            except RequestError as error:
                log.error("%s", error)
                raise libvirt_errors.settings_error(error) from error
            try:
                asked = _with_files(options, files) | {"domain": uuid, "desturi": destination_uri}
                request = _request(asked, settings.defaults)
                check_files(request)
            except RequestError as error:
                if (harm := libvirt_errors.harm(error)) is not None:
                    raise harm from error
                log.info("%s is left to libvirt, which refuses it or knows better: %s", call.method, error)
                return call.native()
            return _carry_out(call, request, source_uri)


def _carry_out(call: MigrateCalled, request: MigrationRequest, source_uri: str) -> Any:
    name = str(call.domain.name())
    try:
        outcome = migrate(request, source_uri=source_uri, watcher=_Logged(name))
    except MigrationError as error:
        if isinstance(error, ConnectionFailed) and error.uri == source_uri:
            log.warning("%s is left to libvirt: no second connection: %s", call.method, error)
            return call.native()
        log.warning("%s: %s: %s", name, call.method, error)
        raise libvirt_errors.as_libvirt(error, name) from error
    except Exception as error:
        log.exception("%s: %s", name, call.method)
        raise libvirt_errors.broken(error, name) from error
    if (failure := libvirt_errors.of_outcome(outcome)) is not None:
        raise failure
    return call.arrived()


def _refuse_green_threads() -> None:
    """eventlet's threads all stand still while libvirt's call blocks: nothing could watch the job. Raises NotOurs."""
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.is_monkey_patched("thread"):
        log.warning("eventlet has replaced this process's threads (Nova: OS_NOVA_DISABLE_EVENTLET_PATCHING=true)")
        raise NotOurs("eventlet has replaced this process's threads")


def _request(asked: Mapping[str, Value], defaults: Mapping[str, Value]) -> MigrationRequest:
    """What was asked, with every default that goes with it. Raises RequestError for what was asked alone."""
    request = MigrationRequest(dict(asked))
    left = {name: value for name, value in (_CALLER_DECIDES | dict(defaults)).items() if value is not False}
    try:
        return MigrationRequest(dict(request) | left)
    except RequestError:
        pass
    while True:  # one may need another: until no more of them fit
        for name, value in left.items():
            with contextlib.suppress(RequestError):
                request = MigrationRequest(dict(request) | {name: value})
                del left[name]
                break
        else:
            break
    for name in left:
        log.info("the default %s does not go with this call", name)
    return request


def _with_files(options: Mapping[str, Value], files: contextlib.ExitStack) -> dict[str, Value]:
    """XML comes as text and is asked for as a file: one in memory, of this process alone."""
    values: dict[str, Value] = {}
    for name, value in options.items():
        if BY_NAME[name].kind is Kind.FILE:
            descriptor = os.memfd_create(f"virtmig-{name}", os.MFD_CLOEXEC)
            files.callback(os.close, descriptor)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(str(value).encode(errors="surrogatepass"))
            value = f"/proc/self/fd/{descriptor}"
        values[name] = value
    return values


@contextlib.contextmanager
def _one_at_a_time(uuid: str) -> Iterator[bool]:
    with _under_way_lock:
        first = uuid not in _under_way
        _under_way.add(uuid)
    try:
        yield first
    finally:
        if first:
            with _under_way_lock:
                _under_way.discard(uuid)


class _Logged:
    """The watcher of a caller that watches by itself: what a person would see goes to the log."""

    def __init__(self, domain: str) -> None:
        self.domain = domain

    def start(self, domain: str, source: str, destination: str, plan: Plan) -> None:
        log.info("%s: %s -> %s, %s (%s)", domain, source, destination, plan.transport, plan.transport_reason)
        for adjustment in plan.adjustments:
            log.warning("%s: --%s: %s -> %s: %s", domain, adjustment.option, adjustment.asked, adjustment.planned,
                        adjustment.reason)  # fmt: skip
        for caution in plan.warnings:
            log.warning("%s: %s", domain, caution.text)

    def sample(self, progress: Progress, expected: Forecast) -> None:
        log.debug("%s: %s, %s of %s bytes left", self.domain, progress.phase.value, progress.remaining_bytes,
                  progress.total_bytes)  # fmt: skip

    def decided(self, decision: Decision) -> None:
        log.info("%s: %s: %s", self.domain, decision.action.value, decision.reason)

    def message(self, text: str, level: str = "info") -> None:
        log.log(logging.WARNING if level == "warning" else logging.INFO, "%s: %s", self.domain, text)

    def finish(self, outcome: Outcome) -> None:
        log.info("%s: %s; %s; record %s", self.domain, outcome.status.value, outcome.sentence, outcome.report_id)
