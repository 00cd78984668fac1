"""What was asked before the command: the connection, how much to say, and where."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import msgspec

from virtmig.errors import RequestError


class GlobalOptions(msgspec.Struct, frozen=True, kw_only=True):
    """virsh's own global options. `connect` None lets libvirt choose (LIBVIRT_DEFAULT_URI, uri_default, a probe)."""

    connect: str | None = None
    readonly: bool = False
    quiet: bool = False
    timing: bool = False
    debug: int = 4  # 0 (all) to 4 (errors only), virsh's VSH_ERR_DEBUG to VSH_ERR_ERROR
    log_file: str = ""
    keepalive_interval_s: int | None = None
    keepalive_count: int | None = None
    no_color: bool = False

    @property
    def tracebacks(self) -> bool:
        return self.debug == 0


def read_global_options(given: Mapping[str, object], environment: Mapping[str, str]) -> GlobalOptions:
    """`given` by long name with underscores, as click hands them over; RequestError in virsh's words."""
    return GlobalOptions(
        connect=_text(given, "connect") or environment.get("VIRSH_DEFAULT_CONNECT_URI") or None,
        readonly=bool(given.get("readonly")),
        quiet=bool(given.get("quiet")),
        timing=bool(given.get("timing")),
        debug=_debug_level(_text(given, "debug"), environment.get("VIRTMIG_DEBUG", "")),
        log_file=_text(given, "log") or environment.get("VIRTMIG_LOG_FILE", ""),
        keepalive_interval_s=_keepalive("k", _text(given, "keepalive_interval")),
        keepalive_count=_keepalive("K", _text(given, "keepalive_count")),
        no_color=bool(given.get("no_color") or environment.get("NO_COLOR")),
    )


def _text(given: Mapping[str, object], name: str) -> str | None:
    value = given.get(name)
    return None if value is None else str(value)


def _debug_level(asked: str | None, environment: str) -> int:
    if asked is None:
        if not environment:
            return 4
        return int(environment) if environment in ("0", "1", "2", "3", "4") else 0
    try:
        level = int(asked)
    except ValueError:
        raise RequestError("option -d takes a numeric argument", option="debug", hint="0 (all) to 4 (errors)") from None
    if not 0 <= level <= 4:
        print(f"error: ignoring debug level {level} out of range [0-4]", file=sys.stderr)
        return 4
    return level


def _keepalive(letter: str, asked: str | None) -> int | None:
    if asked is None:
        return None
    try:
        number = int(asked)
    except ValueError:
        raise RequestError(f"Invalid value for option -{letter}", option=letter) from None
    if number < 0:
        raise RequestError(f"option -{letter} requires a positive integer argument", option=letter)
    return number
