"""The binding's migrate calls as nouns: read from their arguments, handed on as they came, answered with its errors.

    MigrateCalled     one call of migrateToURI3 or a sibling, whatever its age, in one form
    read_options()    its flags and typed parameters -> options, by the option table alone: parameters.py backwards
    patch()           put our methods in the place of virDomain's; unpatch() brings the binding's back

Names, order and defaults of the arguments are libvirt-python's; `ARGUMENTS` is checked against it by a test.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import libvirt
import msgspec

from virtmig.options import OPTIONS, Kind, Option
from virtmig.request import Value

Handler = Callable[["MigrateCalled"], Any]

#: method -> its arguments after self, as libvirt-python names and defaults them; ... for what must be given
ARGUMENTS: dict[str, tuple[tuple[str, Any], ...]] = {
    "migrateToURI3": (("dconnuri", ...), ("params", ...), ("flags", 0)),
    "migrateToURI2": (("dconnuri", None), ("miguri", None), ("dxml", None), ("flags", 0), ("dname", None),
                      ("bandwidth", 0)),
    "migrateToURI": (("duri", ...), ("flags", 0), ("dname", None), ("bandwidth", 0)),
    "migrate3": (("dconn", ...), ("params", ...), ("flags", 0)),
    "migrate2": (("dconn", ...), ("dxml", None), ("flags", 0), ("dname", None), ("uri", None), ("bandwidth", 0)),
    "migrate": (("dconn", ...), ("flags", 0), ("dname", None), ("uri", None), ("bandwidth", 0)),
}  # fmt: skip
METHODS = tuple(ARGUMENTS)

#: what the older calls have arguments for is a parameter of the newer (libvirt-domain.c says which)
_PARAMETERS = {"dname": "destination_name", "uri": "migrate_uri", "miguri": "migrate_uri", "dxml": "destination_xml",
               "bandwidth": "bandwidth"}  # fmt: skip

#: flags that libvirt's library itself refuses together, before any RPC and after it has looked at read-only
_REFUSED_TOGETHER = int(libvirt.VIR_MIGRATE_NON_SHARED_DISK | libvirt.VIR_MIGRATE_NON_SHARED_INC)

_BY_FLAG: dict[int, Option] = {
    int(getattr(libvirt, row.flag)): row for row in OPTIONS if row.flag and hasattr(libvirt, row.flag)
}
_BY_PARAM: dict[str, Option] = {row.param: row for row in OPTIONS if row.param}


class NotOurs(Exception):
    """Not an error: the call is the binding's, as it came. The reason is for the log."""


class MigrateCalled:
    """One call. `destination` is a URI (the source daemon drives) or a virConnect (managed, the client drives)."""

    def __init__(
        self, method: str, domain: Any, given: tuple[Any, ...], named: dict[str, Any], binding: Callable[..., Any]
    ) -> None:
        self.method = method
        self.domain = domain
        self._given, self._named, self._binding = given, named, binding
        #: by name, defaults filled in; empty when they do not fit, which is for the binding to say
        self.arguments: dict[str, Any] = {}
        rows = ARGUMENTS[method]
        if len(given) <= len(rows) and not {name for name, _ in rows[: len(given)]} & named.keys():
            values = dict(rows) | dict(zip((n for n, _ in rows), given, strict=False))
            values |= named
            if set(values) == {name for name, _ in rows} and ... not in values.values():
                self.arguments = values

    def native(self) -> Any:
        """The binding's own method with exactly what the caller gave: its result, its errors."""
        return self._binding(self.domain, *self._given, **self._named)

    @property
    def managed(self) -> bool:
        return "dconn" in self.arguments

    @property
    def destination(self) -> Any:
        return next((self.arguments[name] for name in ("dconn", "dconnuri", "duri") if name in self.arguments), None)

    @property
    def flags(self) -> int:
        flags = self.arguments.get("flags")
        if not isinstance(flags, int) or isinstance(flags, bool) or flags < 0:
            raise NotOurs(f"flags {flags!r}")
        return flags

    @property
    def params(self) -> dict[str, Any]:
        if "params" in self.arguments:
            given = self.arguments["params"]
            if not isinstance(given, dict):
                raise NotOurs("params is no dict")
            return given
        found = {_PARAMETERS[name]: value for name, value in self.arguments.items() if name in _PARAMETERS}
        if not found.get("bandwidth", 0):
            found.pop("bandwidth", None)
        return {name: value for name, value in found.items() if value is not None}

    def uris(self) -> tuple[str, str]:
        """Of the source and the destination. Raises NotOurs for any but QEMU's driver, and where these connections
        may not migrate: virtmig opens its own, which must not do what the caller's could not (read-only).
        """
        try:
            source = self.domain.connect()
            if (driver := source.getType()) != "QEMU":
                raise NotOurs(f"a guest of {driver}")
            if self.managed:
                _probe("migrate3", self.domain, self.destination)
                if (there := self.destination.getType()) != driver:
                    raise NotOurs(f"from {driver} to {there}")
                return str(source.getURI()), str(self.destination.getURI())
            _probe("migrateToURI3", self.domain, self.destination)
        except (libvirt.libvirtError, AttributeError, TypeError) as error:
            raise NotOurs(str(error)) from error
        if not isinstance(self.destination, str):
            raise NotOurs("the destination is no URI")
        return str(source.getURI()), self.destination

    def arrived(self) -> Any:
        """What the binding returns after success: the new virDomain of a managed migration, else 0."""
        return self.destination.lookupByUUIDString(self.domain.UUIDString()) if self.managed else 0


def _probe(method: str, domain: Any, destination: Any) -> None:
    """Whether these connections may migrate at all: a call that cannot start anything. Raises NotOurs."""
    try:
        original(method)(domain, destination, {}, _REFUSED_TOGETHER)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_INVALID_ARG:
            return
        raise NotOurs(str(error)) from error
    raise NotOurs("libvirt takes flags that exclude each other")  # pragma: no cover - it never did


def read_options(call: MigrateCalled) -> dict[str, Value]:
    """Its flags and parameters as options of the table, XML as its text; domain and desturi are not among them.

    Raises NotOurs for a bit or name that the table does not have, and for a value of another type.
    """
    options: dict[str, Value] = {}
    left = call.flags
    for bit, row in _BY_FLAG.items():
        if left & bit:
            options[row.name] = True
            left &= ~bit
    if left:
        raise NotOurs(f"flags 0x{left:x} are unknown")
    options |= _read_params(call.params)
    if call.managed and ("p2p" in options or "tunnelled" in options):
        raise NotOurs("peer-to-peer is not for this call")
    if not call.managed and "p2p" not in options:
        raise NotOurs("direct migration, which QEMU does not have")
    return options


def _read_params(params: Mapping[Any, Any]) -> dict[str, Value]:
    options: dict[str, Value] = {}
    for key, value in params.items():
        row = _BY_PARAM.get(key) if isinstance(key, str) else None
        if row is None:
            raise NotOurs(f"parameter {key!r} is unknown")
        match row.kind:
            case Kind.NUMBER:
                fits = isinstance(value, int) and not isinstance(value, bool)
            case Kind.LIST:
                value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
                fits = all(isinstance(word, str) for word in value)
            case _:
                fits = isinstance(value, str)
        if not fits:
            raise NotOurs(f"parameter {key!r} is {type(value).__name__}")
        if value != ():  # binding: an empty list sends nothing
            options[row.name] = value
    return options


# -- answers -------------------------------------------------------------------------------------------------------

#: how libvirt begins the message of an error (virerror.c virErrorMsgTable), for those that the facade raises
_WORDS = {
    "VIR_ERR_INTERNAL_ERROR": "internal error: ",
    "VIR_ERR_INVALID_ARG": "invalid argument: ",
    "VIR_ERR_OPERATION_FAILED": "operation failed: ",
    "VIR_ERR_OPERATION_INVALID": "Requested operation is not valid: ",
    "VIR_ERR_CONFIG_UNSUPPORTED": "unsupported configuration: ",
    "VIR_ERR_OPERATION_TIMEOUT": "Timed out during operation: ",
    "VIR_ERR_ARGUMENT_UNSUPPORTED": "argument unsupported: ",
    "VIR_ERR_OPERATION_ABORTED": "operation aborted: ",
    "VIR_ERR_MIGRATE_UNSAFE": "Unsafe migration: ",
    "VIR_ERR_OPERATION_UNSUPPORTED": "Operation not supported: ",
    "VIR_ERR_CPU_INCOMPATIBLE": "the CPU is incompatible with host CPU: ",
    "VIR_ERR_SYSTEM_ERROR": "",
}


class Named(msgspec.Struct, frozen=True):
    """libvirt's names of an error's code (VIR_ERR_*) and of the part it comes from (VIR_FROM_*)."""

    code: str
    domain: str
    bare: bool = False  # libvirt says this one without the words of its code

    @property
    def numbers(self) -> tuple[int, int]:
        return int(getattr(libvirt, self.code)), int(getattr(libvirt, self.domain))

    def say(self, reason: str) -> str:
        """`reason` behind libvirt's words for this code, once."""
        words = "" if self.bare else _WORDS[self.code]
        return reason if reason.startswith(words) else words + reason


def libvirt_error(message: str, code: int, domain: int) -> Exception:
    """A libvirtError as the binding raises it; what it would find in the thread's last error is not its own."""
    error = libvirt.libvirtError(message)
    error.args = (message,)
    error.err = (code, domain, message, libvirt.VIR_ERR_ERROR, "%s", message, None, -1, -1)
    return error


# -- in the place of the binding's methods -------------------------------------------------------------------------

_lock = threading.Lock()
_handlers: list[Handler] = []
#: name -> what it was when it was first patched: the binding's, whatever others have put over ours since
_originals: dict[str, Callable[..., Any]] = {}
#: name -> (ours, what was there before it)
_placed: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
#: a connection's URI -> the `auth` that the caller opened it with
_credentials: dict[str, Any] = {}


def original(method: str) -> Callable[..., Any]:
    """The binding's own, patched or not."""
    found = _originals.get(method)
    return found if found is not None else getattr(_owner(method), method)


def _owner(name: str) -> Any:
    return libvirt.virDomain if name in ARGUMENTS else libvirt


def patch(handler: Handler) -> None:
    """libvirt.virDomain's migrate methods ask `handler`; patches nest, the last one answers. See `unpatch`.

    What libvirt.openAuth is given meanwhile is remembered: virtmig opens a URI again as the caller has opened it.
    """
    with _lock:
        _handlers.append(handler)
        if len(_handlers) > 1:
            return
        for name in (*METHODS, "openAuth", "open"):
            there = getattr(_owner(name), name)
            _originals.setdefault(name, there)
            make = {"openAuth": _remembering, "open": _reopening}.get(name) or functools.partial(_replacement, name)
            _placed[name] = (make(there), there)
            setattr(_owner(name), name, _placed[name][0])


def unpatch() -> bool:
    """Take the last handler away; with the last of all the binding's methods come back. False: there was none.

    A method that somebody else has replaced since is left to them: what they call of ours then goes to the binding.
    """
    with _lock:
        if not _handlers:
            return False
        _handlers.pop()
        if _handlers:
            return True
        _credentials.clear()
        for name in (*METHODS, "openAuth", "open"):
            ours, before = _placed[name]
            if getattr(_owner(name), name) is ours:
                setattr(_owner(name), name, before)
                del _placed[name]
                if before is _originals[name]:
                    del _originals[name]
        return True


def _replacement(method: str, binding: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(binding)
    def called(self: Any, *given: Any, **named: Any) -> Any:
        handlers = _handlers[-1:]
        if not handlers or _from_virtmig():
            return binding(self, *given, **named)
        return handlers[0](MigrateCalled(method, self, given, named, binding))

    return called


def _remembering(binding: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(binding)
    def called(uri: Any, auth: Any, flags: Any = 0) -> Any:
        connection = binding(uri, auth, flags)
        if _handlers:
            _credentials[str(connection.getURI())] = auth
        return connection

    return called


def _reopening(binding: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(binding)
    def called(name: Any = None) -> Any:
        if _from_virtmig() and name in _credentials:
            return original("openAuth")(name, _credentials[name], 0)
        return binding(name)

    return called


def _from_virtmig() -> bool:
    """Whether the caller of the patched method is virtmig itself, which means the binding."""
    name = str(sys._getframe(2).f_globals.get("__name__", ""))
    return name == "virtmig" or name.startswith("virtmig.")


class WrappedDomain:
    """A virDomain whose migrate methods ask `handler`; everything else is the domain's own."""

    def __init__(self, domain: Any, handler: Handler) -> None:
        object.__setattr__(self, "_domain", domain)
        object.__setattr__(self, "_handler", handler)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._domain, name)
        if name not in ARGUMENTS:
            return found
        domain, handler = self._domain, self._handler
        binding = original(name) if isinstance(domain, libvirt.virDomain) else getattr(type(domain), name)

        @functools.wraps(binding)
        def called(_self: Any, *given: Any, **named: Any) -> Any:
            return handler(MigrateCalled(name, domain, given, named, binding))

        return types.MethodType(called, self)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._domain, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance(wrapped, libvirt.virDomain) holds
        return type(self._domain)

    def __dir__(self) -> list[str]:
        return dir(self._domain)

    def __repr__(self) -> str:
        return f"<virtmig's facade of {self._domain!r}>"
