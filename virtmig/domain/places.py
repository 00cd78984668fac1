"""THE TABLE of the values in a domain XML that belong to the host: what a rule may change, by the rule's name and kind.

Paths are ElementPath below <domain>. Nothing here is seen by the guest; guest_abi has the other half of the picture.
"""

from __future__ import annotations

import msgspec


class Place(msgspec.Struct, frozen=True):
    """Elements at `path`, and which of their attributes; "" is the element's text."""

    path: str
    attribute: str = ""


def _each(paths: str, *attributes: str) -> tuple[Place, ...]:
    return tuple(Place(path, attribute) for path in paths.split() for attribute in attributes)


#: devices with a character device backend (domaincommon.rng, qemucdevSrcDef)
CHARACTER = ("serial", "parallel", "console", "channel", "redirdev", "smartcard")
_CHARACTER_SOURCE = " ".join(f"devices/{device}/source" for device in CHARACTER)

#: (rule, kind) -> places. Disks are searched to any depth: backing chains and mirrors have sources of their own.
PLACES: dict[tuple[str, str], tuple[Place, ...]] = {
    ("bridge", ""): _each("devices/interface/source", "bridge"),
    ("network", ""): _each("devices/interface/source devices/graphics/listen", "network"),
    ("portgroup", ""): _each("devices/interface/source", "portgroup"),
    # the host's network card below a macvtap device
    ("link", ""): _each("devices/interface[@type='direct']/source", "dev"),
    ("path", "disk"): _each("devices/disk//source", "file", "dev", "dir"),
    ("path", "filesystem"): _each("devices/filesystem/source", "dir", "file", "dev"),
    # the processes that serve vhost-user devices, and vDPA devices
    ("path", "vhost"): _each(
        "devices/interface[@type='vhostuser']/source devices/disk[@type='vhostuser']/source", "path"
    )
    + _each("devices/filesystem/source", "socket")
    + _each("devices/interface[@type='vdpa']/source devices/disk[@type='vhostvdpa']/source", "dev"),
    ("path", "character"): _each(f"{_CHARACTER_SOURCE} devices/rng/backend/source", "path")
    + _each(" ".join(f"devices/{device}/log" for device in CHARACTER), "file"),
    ("path", "firmware"): _each("os/loader os/nvram", "")
    + _each("os/nvram", "template")
    + _each("os/nvram/source", "file", "dev"),
    ("path", "kernel"): _each("os/kernel os/initrd os/dtb os/acpi/table", ""),
    # what backs memory: a mount of huge pages, a DAX device, a file
    ("path", "memory"): _each("devices/memory/source/path", "") + _each("devices/shmem/server", "path"),
    ("path", "tpm"): _each("devices/tpm/backend/device devices/tpm/backend/source", "path"),
    ("path", "emulator"): _each("devices/emulator", "") + _each("devices/filesystem/binary", "path"),
    # sockets of VNC and SPICE servers, and the DRM node that renders
    ("path", "graphics"): _each("devices/graphics devices/graphics/listen", "socket")
    + _each("devices/graphics/gl devices/video/model/acceleration", "rendernode"),
    ("path", "rom"): _each("devices/*/rom", "file"),
    ("pool", ""): _each("devices/disk//source devices/filesystem/source", "pool"),
    ("volume", ""): _each("devices/disk//source devices/filesystem/source", "volume"),
    ("image", ""): _each("devices/disk//source[@protocol]", "name"),
    ("secret", ""): _each("devices/disk//auth/secret devices/disk//encryption/secret", "uuid")
    + _each("devices/tpm/backend/encryption", "secret"),
    ("address", "disk"): _each("devices/disk//source/host devices/hostdev/source/host", "name")
    + _each("devices/disk//source", "tlsHostname"),
    ("address", "character"): _each(f"{_CHARACTER_SOURCE} devices/rng/backend/source", "host"),
    ("address", "interface"): _each("devices/interface/source devices/interface/source/local", "address"),
    # a listen attribute on <graphics> repeats its first <listen>; libvirt refuses two that differ
    ("address", "graphics"): _each("devices/graphics", "listen")
    + _each("devices/graphics/listen[@type='address']", "address"),
    ("tls", "disk"): _each("devices/disk//source[@protocol='nbd'] devices/disk//source[@protocol='vxhs']", "tls"),
    ("tls", "character"): _each(" ".join(f"devices/{d}[@type='tcp']/source" for d in CHARACTER), "tls"),
    ("tls", "graphics"): _each("devices/graphics[@type='spice']", "defaultMode"),
    ("cpus", ""): _each("vcpu cputune/vcpupin cputune/emulatorpin cputune/iothreadpin", "cpuset"),
    ("nodes", ""): _each("numatune/memory numatune/memnode", "nodeset") + _each("devices/memory/source/nodemask", ""),
}
