"""A request -> the flags and typed parameters of one libvirt migrate call, from the option table alone."""

from __future__ import annotations

from typing import Any

import libvirt
import msgspec

from virtmig.errors import RequestError
from virtmig.options import BY_NAME, Option
from virtmig.request import MigrationRequest, read_file_values


class MigrateCall(msgspec.Struct, frozen=True):
    """What to call and with what. `peer_to_peer` or `direct`: migrateToURI3 with the URI; else migrate3 (managed)."""

    flags: int
    params: dict[str, Any]
    to_uri: bool


def migrate_call(request: MigrationRequest, *, extra_flags: int = 0) -> MigrateCall:
    """Flags and parameters for `request`; files of --xml and --persistent-xml are read here.

    Raises RequestError for an unreadable file, and "this libvirt is too old for --x" where the installed libvirt
    does not have the constant: virsh of the same age has no such option either.
    """
    values = read_file_values({name: request[name] for name in request})
    flags = extra_flags
    params: dict[str, Any] = {}
    for name, value in values.items():
        option = BY_NAME[name]
        if option.since > libvirt.getVersion():
            raise too_old(option, libvirt.getVersion())
        if option.flag:
            bit = getattr(libvirt, option.flag, None)
            if bit is None:
                raise too_old(option, libvirt.getVersion())
            flags |= int(bit)
        if option.param:
            params[option.param] = list(value) if isinstance(value, tuple) else value
    return MigrateCall(flags, params, to_uri="p2p" in request or "direct" in request)


def too_old(option: Option, version: int, where: str = "") -> RequestError:
    have = f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"
    need = f"{option.since // 1_000_000}.{option.since // 1000 % 1000}"
    needs = f"needs {need}, " if option.since else ""
    return RequestError(
        f"this libvirt is too old for --{option.name} ({needs}{where or 'the installed client library'} is {have})",
        option=option.name,
        hint=f"leave out --{option.name}, or upgrade libvirt",
    )
