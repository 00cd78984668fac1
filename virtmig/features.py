"""THE TABLE of negotiable features: what each needs on either host, what it excludes, and what QEMU is told.

    row.when      tokens of a request that ask for it (virtmig.request.tokens)
    row.say       who decides: "asked" only the person; "automatic" libvirt, when both ends can; "always" libvirt
                  wherever QEMU has it; "never" nothing in a migration between hosts
    row.qemu      the QEMU capability behind it; row.sides where it is set, row.needed where the versions must hold
    row.excludes  what cannot be on at the same time, and until which QEMU that holds

`qemu_settings()` mirrors libvirt's mapping (qemu_migration_params.c: qemuMigrationParamsFromFlags and ...Check): from
the option table's `qemu` column, with libvirt's order of keys and libvirt's units turned into QEMU's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from virtmig.facts import version
from virtmig.options import BY_NAME, MIB, Option
from virtmig.request import MigrationRequest, tokens

Say = Literal["asked", "automatic", "always", "never"]


class Exclusion(msgspec.Struct, frozen=True):
    """`other` is a feature, or guest:KIND. `qemu_until`: it holds while one QEMU is older than this; 0: always."""

    other: str
    reason: str
    qemu_until: int = 0
    source: str = ""


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """One row. Versions as facts.version() writes them; 0 means any that libvirt 9.0 still runs with."""

    name: str
    help: str
    when: tuple[str, ...] = ()
    say: Say = "asked"
    qemu: str = ""
    sides: str = "SD"
    needed: str = "SD"
    qemu_since: int = 0
    qemu_until: int = 0  # first QEMU without it
    libvirt_since: int = 0
    needs: tuple[str, ...] = ()
    excludes: tuple[Exclusion, ...] = ()
    many_channels: bool = False  # cannot work on a transport that carries one
    source: str

    @property
    def deciding_ends(self) -> str:
        """S, D or SD: the hosts whose versions decide about it."""
        return self.sides if self.say in ("always", "automatic") else self.needed


_MULTIFD_POSTCOPY = "QEMU before 10.1 cannot do multifd and postcopy together"

# fmt: off
FEATURES: tuple[Feature, ...] = (
    Feature(name="live", help="the guest runs while its memory is sent", when=("live",), needed="",
            source="libvirt VIR_MIGRATE_LIVE"),
    Feature(name="p2p", help="the source daemon drives, and goes on without this client", when=("p2p",), needed="",
            source="libvirt VIR_MIGRATE_PEER2PEER"),
    Feature(name="offline", help="only the definition moves", when=("offline",), needed="",
            source="libvirt VIR_MIGRATE_OFFLINE"),
    Feature(name="tunnelled", help="all data through both daemons, one way, one thread", when=("tunnelled",),
            needs=("p2p",), needed="",
            excludes=(Exclusion("multifd", "a tunnel carries one channel"),
                      Exclusion("postcopy", "a tunnel is one-way: the destination cannot ask for pages"),
                      Exclusion("storage-copy", "libvirt copies no storage through a tunnel"),
                      Exclusion("tls", "the tunnel runs inside libvirt's own connection")),
            source="libvirt qemu_migration.c; libvirt-domain.c VIR_EXCLUSIVE_FLAGS"),
    Feature(name="multifd", help="several connections at once (libvirt's --parallel)", when=("parallel",),
            qemu="multifd", qemu_since=version(4), libvirt_since=version(5, 2), many_channels=True,
            excludes=(Exclusion("postcopy", _MULTIFD_POSTCOPY, version(10, 1),
                                "QEMU 7.2 accepts the pair and loses the guest; 8.0 to 10.0: 'Postcopy is not yet "
                                "compatible with multifd'"),
                      Exclusion("xbzrle", "Multifd is not compatible with xbzrle", 0, "QEMU migrate_caps_check"),
                      Exclusion("compress", "Multifd is not compatible with compress", 0, "QEMU migrate_caps_check"),
                      Exclusion("rdma", "RDMA carries one channel", 0, "QEMU migrate_multi_channels_is_allowed")),
            source="QEMU migration/options.c; libvirt VIR_MIGRATE_PARALLEL"),
    Feature(name="postcopy", help="the guest runs on the destination and fetches the rest of its memory there",
            when=("postcopy",), qemu="postcopy-ram", qemu_since=version(2, 6), libvirt_since=version(1, 3, 3),
            needs=("live",),
            excludes=(Exclusion("guest:vfio", "VFIO devices write memory that cannot be fetched afterwards",
                                0, "nova: VFIO with postcopy is rejected; QEMU vfio migration blocker"),
                      Exclusion("fence", "the fence holds the destination until the source has stopped")),
            source="libvirt VIR_MIGRATE_POSTCOPY; QEMU docs/devel/migration/postcopy.rst"),
    Feature(name="postcopy-preempt", help="a channel of its own for pages that the guest waits for",
            when=("postcopy-preempt=on",), say="automatic", qemu="postcopy-preempt", qemu_since=version(7, 1),
            libvirt_since=version(10), needs=("postcopy",), many_channels=True,
            excludes=(Exclusion("compress", "Postcopy preempt not compatible with compress", 0,
                                "QEMU migrate_caps_check"),),
            source="libvirt 10.0 qemuMigrationParams (optional capability); QEMU 7.1"),
    Feature(name="postcopy-resume", help="go on with a postcopy that broke; nothing is negotiated again",
            when=("postcopy-resume",), qemu_since=version(3), libvirt_since=version(8, 5), needs=("postcopy",),
            source="libvirt VIR_MIGRATE_POSTCOPY_RESUME"),
    Feature(name="return-path", help="the destination answers the source", say="always", qemu="return-path",
            excludes=(Exclusion("tunnelled", "a tunnel is one-way"),),
            source="libvirt: set for every migration that is not tunnelled"),
    Feature(name="switchover-ack", help="the destination says when it is ready for the last step", say="automatic",
            qemu="switchover-ack", qemu_since=version(8, 1), needs=("return-path",),
            # 9.0 does not have it and 11.3 does; the releases between were not looked at
            libvirt_since=version(11, 3), source="libvirt 11.3 qemu_migration_params.c; QEMU 8.1"),
    Feature(name="pause-before-switchover", help="disks are handed over while the guest stands still", say="always",
            qemu="pause-before-switchover", sides="S", qemu_since=version(2, 11),
            source="libvirt: always on where QEMU has it"),
    Feature(name="late-block-activate", help="the destination opens its disks as late as it can", say="always",
            qemu="late-block-activate", sides="D", qemu_since=version(3),
            source="libvirt: always on where QEMU has it"),
    Feature(name="xbzrle", help="pages sent again travel as differences", when=("comp-methods=xbzrle",),
            qemu="xbzrle", source="libvirt qemuMigrationParamsSetCompression"),
    Feature(name="compress", help="compression by threads of QEMU's old kind", when=("comp-methods=mt",),
            qemu="compress", qemu_until=version(9, 1), source="QEMU 9.1 removed it"),
    Feature(name="multifd-zlib", help="parallel channels compress with zlib", when=("comp-methods=zlib",),
            qemu_since=version(5), libvirt_since=version(9, 4), needs=("multifd",), source="libvirt 9.4; QEMU 5.0"),
    Feature(name="multifd-zstd", help="parallel channels compress with zstd", when=("comp-methods=zstd",),
            qemu_since=version(5), libvirt_since=version(9, 4), needs=("multifd",), source="libvirt 9.4; QEMU 5.0"),
    Feature(name="zero-copy-send", help="pages leave the source without being copied by the kernel",
            when=("zerocopy",), qemu="zero-copy-send", sides="S", needed="S", qemu_since=version(7, 1),
            libvirt_since=version(8, 5), needs=("multifd",),
            excludes=tuple(Exclusion(other, "Zero copy only available for non-compressed non-TLS multifd migration",
                                     0, "QEMU migrate_params_check")
                           for other in ("multifd-zlib", "multifd-zstd", "xbzrle", "compress", "tls")),
            source="libvirt VIR_MIGRATE_ZEROCOPY; QEMU 7.1"),
    Feature(name="auto-converge", help="the guest's CPUs are slowed down until memory converges",
            when=("auto-converge",), qemu="auto-converge", sides="S", needed="S",
            source="libvirt VIR_MIGRATE_AUTO_CONVERGE"),
    Feature(name="tls", help="the memory stream is encrypted by QEMU", when=("tls",), qemu_since=version(2, 7),
            source="libvirt VIR_MIGRATE_TLS; QEMU tls-creds"),
    Feature(name="storage-copy", help="disks are copied to the destination (NBD) before memory",
            when=("copy-storage-all", "copy-storage-inc"), source="libvirt VIR_MIGRATE_NON_SHARED_*"),
    Feature(name="synchronous-writes", help="guest writes wait until they are on the destination too",
            when=("copy-storage-synchronous-writes",), libvirt_since=version(8), needs=("storage-copy",),
            source="libvirt VIR_MIGRATE_NON_SHARED_SYNCHRONOUS_WRITES"),
    Feature(name="rdma", help="memory through an RDMA network", when=("migrateuri=rdma",),
            source="libvirt migrate URI rdma://"),
    Feature(name="rdma-pin-all", help="all memory pinned before RDMA starts", when=("rdma-pin-all",),
            qemu="rdma-pin-all", needs=("rdma",), source="libvirt VIR_MIGRATE_RDMA_PIN_ALL"),
    Feature(name="mapped-ram", help="memory at fixed places in a file", say="never", qemu="mapped-ram",
            qemu_since=version(9), libvirt_since=version(11),
            excludes=tuple(Exclusion(other, f"mapped-ram excludes {other}", 0, "QEMU migrate_caps_check")
                           for other in ("xbzrle", "postcopy", "tls")),
            source="libvirt: saving to a file only; it changes the file's layout, so the person decides"),
    Feature(name="fence", help="the destination stays paused until the source is known to be stopped",
            when=("fence",), needed="", source="virtmig"),
)
# fmt: on

BY_FEATURE: dict[str, Feature] = {row.name: row for row in FEATURES}


def features_asked(request: MigrationRequest) -> frozenset[str]:
    """Names of the features that the request itself turns on."""
    present = tokens(request)
    found = {row.name for row in FEATURES if not present.isdisjoint(row.when)}
    if "compressed" in present and "comp-methods" not in present:
        found.add("xbzrle")  # libvirt's default method (qemuMigrationParamsSetCompression)
    return frozenset(found)


def conflicts(on: Iterable[str], *qemu_versions: int | None) -> Iterator[tuple[Feature, Exclusion]]:
    """Pairs of the table that cannot be on together between these QEMUs; an unknown version counts as new enough.

    `on` names features and guest:KIND tokens.
    """
    present = frozenset(on)
    oldest = min((number for number in qemu_versions if number is not None), default=None)
    for row in FEATURES:
        if row.name not in present:
            continue
        for exclusion in row.excludes:
            if exclusion.other not in present:
                continue
            if exclusion.qemu_until == 0 or (oldest is not None and oldest < exclusion.qemu_until):
                yield row, exclusion


def capabilities_of(qemu_version: int, libvirt_version: int) -> frozenset[str]:
    """QEMU migration capabilities that a libvirt of that version can use in a QEMU of that version."""
    return frozenset(
        row.qemu
        for row in FEATURES
        if row.qemu
        and row.qemu_since <= qemu_version
        and not (row.qemu_until and qemu_version >= row.qemu_until)
        and row.libvirt_since <= libvirt_version
    )


# -- what QEMU is told ---------------------------------------------------------------------------------------------

Parameter = int | str

#: libvirt's orders (enum qemuMigrationCapability, enum qemuMigrationParam): the order of keys on the wire
CAPABILITY_ORDER = (
    "xbzrle", "auto-converge", "rdma-pin-all", "events", "postcopy-ram", "compress", "pause-before-switchover",
    "late-block-activate", "multifd", "dirty-bitmaps", "return-path", "zero-copy-send", "postcopy-preempt",
    "switchover-ack", "mapped-ram",
)  # fmt: skip
PARAMETER_ORDER = (
    "compress-level", "compress-threads", "decompress-threads", "cpu-throttle-initial", "cpu-throttle-increment",
    "tls-creds", "tls-hostname", "max-bandwidth", "downtime-limit", "block-incremental", "xbzrle-cache-size",
    "max-postcopy-bandwidth", "multifd-channels", "multifd-compression", "multifd-zlib-level", "multifd-zstd-level",
    "avail-switchover-bandwidth", "direct-io",
)  # fmt: skip

#: libvirt's default speed, INT64_MAX rounded down to whole MiB/s (QEMU_DOMAIN_MIG_BANDWIDTH_MAX), in bytes/s
UNLIMITED_BYTES_PER_S = (((1 << 63) - 1) // MIB) * MIB
TLS_OBJECT = "objlibvirt_migrate_tls0"


class QemuSettings(msgspec.Struct, frozen=True):
    """What libvirt sends to one QEMU. `capabilities` are those set to true; `required` those it insists on.

    `parameters` come from the request; `every_run` are those that libvirt adds to any run.
    """

    capabilities: tuple[str, ...] = ()
    parameters: dict[str, Parameter] = {}
    every_run: dict[str, Parameter] = {}
    required: tuple[str, ...] = ()

    def sent(self) -> dict[str, Parameter]:
        """All parameters, in libvirt's order."""
        return _ordered({**self.every_run, **self.parameters})


def qemu_settings(
    request: MigrationRequest,
    side: Literal["source", "destination"],
    *,
    here: frozenset[str],
    peer: frozenset[str],
) -> QemuSettings:
    """Capabilities and parameters that libvirt sets on `side` for `request`.

    `here` and `peer` are the capabilities that this QEMU and the other one have and their libvirts know
    (`capabilities_of`). Bandwidths in bytes/s. An optional capability is on only if both have it; one that is always
    on only if this side has it; a required one is in `required` whether it is there or not.
    """
    letter = "S" if side == "source" else "D"
    if "offline" in request:
        return QemuSettings()
    if "postcopy-resume" in request:  # libvirt sends the bandwidth again and leaves everything else alone
        again = {name: value for name, value in _parameters(request, letter) if name == "max-postcopy-bandwidth"}
        return QemuSettings(parameters=again)
    required = set(_capabilities(request, letter)) | {"return-path"}
    if "tunnelled" in request:
        required.discard("return-path")
    optional = set()
    if "postcopy" in request:
        optional.add("postcopy-preempt")
    if "return-path" in required:
        optional.add("switchover-ack")
    always = {row.qemu for row in FEATURES if row.say == "always" and row.qemu != "return-path" and row.sides == letter}
    on = required | {name for name in optional if name in here and name in peer} | (always & here)
    parameters = dict(_parameters(request, letter))
    every_run: dict[str, Parameter] = {}
    if "tls" not in request:
        every_run |= {"tls-creds": "", "tls-hostname": ""}
    if side == "source" and not parameters.get("max-bandwidth"):
        parameters.pop("max-bandwidth", None)  # libvirt reads 0 as "no limit of this run"
        every_run["max-bandwidth"] = UNLIMITED_BYTES_PER_S
    return QemuSettings(
        capabilities=tuple(name for name in CAPABILITY_ORDER if name in on),
        parameters=_ordered(parameters),
        every_run=_ordered(every_run),
        required=tuple(name for name in CAPABILITY_ORDER if name in required),
    )


def _column(option: Option, kind: str, letter: str) -> str:
    """The name in the row's `qemu` column if it is of that kind and concerns that side, else empty."""
    if option.ours or not option.qemu:
        return ""
    what, _, sides = option.qemu.rpartition(" ")
    prefix, _, name = what.partition(":")
    return name if prefix == kind and letter in sides and not name.startswith("!") else ""


def _capabilities(request: MigrationRequest, letter: str) -> Iterator[str]:
    for name in request:
        if capability := _column(BY_NAME[name], "cap", letter):
            yield capability
    asked = features_asked(request)
    yield from (name for name in ("xbzrle", "compress") if name in asked)


def _parameters(request: MigrationRequest, letter: str) -> Iterator[tuple[str, Parameter]]:
    if "tls" in request:
        yield "tls-hostname", ""
    for name in request:
        option = BY_NAME[name]
        parameter = _column(option, "par", letter)
        if not parameter:
            continue
        value = request[name]
        if parameter == "tls-creds":
            yield parameter, TLS_OBJECT
        elif isinstance(value, int):
            yield parameter, int(value) * MIB if option.unit == "MiB/s" else int(value)
        else:
            yield parameter, str(value)
    for method in request.words("comp-methods"):
        if method in ("zlib", "zstd"):
            yield "multifd-compression", method


def _ordered(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    return {name: parameters[name] for name in PARAMETER_ORDER if name in parameters}
