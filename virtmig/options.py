"""THE TABLE of options: what a person may ask for, and what it becomes.

One row is one option of `virtmig migrate`. virsh's own rows keep virsh's spelling, order and positional rule
(libvirt 9.0 to 12.8, `virsh help migrate`); our own rows come last. From this table are made the parser, the check
of a request, libvirt's flags and typed parameters, what QEMU is told in the end, shell completion, the option list
of the man page, and one test per row.

    row.flag      name of the libvirt flag it sets           (libvirt-domain.h, virDomainMigrateFlags)
    row.param     key of the libvirt typed parameter         (libvirt-domain.h, VIR_MIGRATE_PARAM_*)
    row.qemu      QEMU capability or parameter it ends in    (libvirt qemu_migration_params.c; cap: / par:, sides S D)

RULES below the options says which go together. A rule speaks about tokens: an option's name when it was given, and
`name=value` for the few whose value decides (`comp-methods=zstd`, `migrateuri=unix`).
"""

from __future__ import annotations

import enum

import msgspec

MIB = 1 << 20
U64_MAX = (1 << 64) - 1
#: QEMU takes bytes per second in 64 bits: the most MiB/s that can be asked for is one less (libvirt reports 82)
BANDWIDTH_LIMIT_MIB_S = U64_MAX // MIB + 1
INT32_MAX = (1 << 31) - 1


class Kind(enum.Enum):
    BOOL = "bool"
    STRING = "string"
    NUMBER = "number"
    LIST = "list"  # comma separated on the command line, a list in libvirt
    FILE = "file"  # a file name on the command line, its content in libvirt
    CHOICE = "choice"


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One row. `since` is the first libvirt that has it (1000000*major + 1000*minor), 0 for anything up to 9.0."""

    name: str
    kind: Kind
    help: str
    flag: str = ""
    param: str = ""
    qemu: str = ""
    unit: str = ""
    minimum: int | None = None
    maximum: int | None = None
    power_of_two: bool = False
    choices: tuple[str, ...] = ()
    default: str = ""
    since: int = 0
    aliases: tuple[str, ...] = ()
    positional: bool = False
    required: bool = False
    ours: bool = False  # virsh has no such option
    group: str = ""

    @property
    def field(self) -> str:
        return self.name.replace("-", "_")

    @property
    def metavar(self) -> str:
        return "<number>" if self.kind is Kind.NUMBER else "<string>"


def _switch(name: str, help: str, flag: str = "", **columns: object) -> Option:
    return msgspec.convert({"name": name, "kind": Kind.BOOL, "help": help, "flag": flag, **columns}, Option)


def _string(name: str, help: str, param: str = "", **columns: object) -> Option:
    return msgspec.convert({"name": name, "kind": Kind.STRING, "help": help, "param": param, **columns}, Option)


def _list(name: str, help: str, param: str, **columns: object) -> Option:
    return msgspec.convert({"name": name, "kind": Kind.LIST, "help": help, "param": param, **columns}, Option)


def _file(name: str, help: str, param: str, **columns: object) -> Option:
    return msgspec.convert({"name": name, "kind": Kind.FILE, "help": help, "param": param, **columns}, Option)


def _number(name: str, help: str, param: str = "", *, low: int = 0, high: int = INT32_MAX, **columns: object) -> Option:
    row = {"name": name, "kind": Kind.NUMBER, "help": help, "param": param, "minimum": low, "maximum": high, **columns}
    return msgspec.convert(row, Option)


def _choice(name: str, help: str, *choices: str, **columns: object) -> Option:
    return msgspec.convert(
        {"name": name, "kind": Kind.CHOICE, "help": help, "choices": choices, "ours": True, **columns}, Option
    )


# fmt: off
#: virsh's rows, in virsh's order; the order of the positional ones is the order in which virsh fills them.
VIRSH_OPTIONS: tuple[Option, ...] = (
    _string("domain", "domain name, id or uuid", positional=True, required=True),
    _string("desturi", "connection URI of the destination host as seen from the client (normal migration) or "
            "source (p2p migration)", positional=True, required=True),
    _switch("live", "live migration", "VIR_MIGRATE_LIVE"),
    _switch("offline", "offline migration: only the definition moves", "VIR_MIGRATE_OFFLINE"),
    _switch("p2p", "peer-2-peer migration: the source daemon drives it", "VIR_MIGRATE_PEER2PEER"),
    _switch("direct", "direct migration: the hypervisor drives it (QEMU cannot)"),
    _switch("tunnelled", "tunnelled migration: all data through the two daemons", "VIR_MIGRATE_TUNNELLED",
            qemu="cap:!return-path SD", aliases=("tunneled",)),
    _switch("persistent", "persist VM on destination", "VIR_MIGRATE_PERSIST_DEST"),
    _switch("undefinesource", "undefine VM on source", "VIR_MIGRATE_UNDEFINE_SOURCE"),
    _switch("suspend", "do not restart the domain on the destination host", "VIR_MIGRATE_PAUSED"),
    _switch("copy-storage-all", "migration with non-shared storage with full disk copy",
            "VIR_MIGRATE_NON_SHARED_DISK"),
    _switch("copy-storage-inc", "migration with non-shared storage with incremental copy (same base image shared "
            "between source and destination)", "VIR_MIGRATE_NON_SHARED_INC"),
    _switch("copy-storage-synchronous-writes", "force guest disk writes to be synchronously written to the "
            "destination to improve storage migration convergence",
            "VIR_MIGRATE_NON_SHARED_SYNCHRONOUS_WRITES"),
    _switch("change-protection", "prevent any configuration changes to domain until migration ends",
            "VIR_MIGRATE_CHANGE_PROTECTION"),
    _switch("unsafe", "force migration even if it may be unsafe", "VIR_MIGRATE_UNSAFE"),
    _switch("verbose", "display the progress of migration"),
    _switch("compressed", "compress repeated pages during live migration", "VIR_MIGRATE_COMPRESSED"),
    _switch("auto-converge", "force convergence during live migration", "VIR_MIGRATE_AUTO_CONVERGE",
            qemu="cap:auto-converge S"),
    _switch("rdma-pin-all", "pin all memory before starting RDMA live migration", "VIR_MIGRATE_RDMA_PIN_ALL",
            qemu="cap:rdma-pin-all SD"),
    _switch("abort-on-error", "abort on soft errors during migration", "VIR_MIGRATE_ABORT_ON_ERROR"),
    _switch("postcopy", "enable post-copy migration; switch to it using migrate-postcopy command",
            "VIR_MIGRATE_POSTCOPY", qemu="cap:postcopy-ram SD"),
    _switch("postcopy-after-precopy", "automatically switch to post-copy migration after one pass of pre-copy"),
    _switch("postcopy-resume", "resume failed post-copy migration", "VIR_MIGRATE_POSTCOPY_RESUME"),
    _switch("zerocopy", "use zero-copy mechanism for migrating memory pages", "VIR_MIGRATE_ZEROCOPY",
            qemu="cap:zero-copy-send S"),
    _string("migrateuri", "migration URI, usually can be omitted", "migrate_uri", positional=True),
    _string("graphicsuri", "graphics URI to be used for seamless graphics migration", "graphics_uri",
            positional=True),
    _string("listen-address", "listen address that destination should bind to for incoming migration",
            "listen_address", positional=True),
    _string("dname", "rename to new name during migration (if supported)", "destination_name", positional=True),
    _number("timeout", "run action specified by --timeout-* option (suspend by default) if live migration exceeds "
            "timeout", unit="s", low=0, high=INT32_MAX // 1000, positional=True),
    _switch("timeout-suspend", "suspend the guest after timeout"),
    _switch("timeout-postcopy", "switch to post-copy after timeout"),
    _file("xml", "filename containing updated XML for the target", "destination_xml", positional=True),
    _list("migrate-disks", "comma separated list of disks to be migrated", "migrate_disks", positional=True),
    _list("migrate-disks-detect-zeroes", "comma separated list of disks to be migrated with zero detection enabled",
          "migrate_disks_detect_zeroes", since=10_009_000),
    _list("migrate-disks-target-zero", "comma separated list of disks to be migrated with assumption that target "
          "image is zeroed", "migrate_disks_target_zero", since=12_002_000),
    _number("disks-port", "port to use by target server for incoming disks migration", "disks_port", high=65535,
            positional=True),
    _string("disks-uri", "URI to use for disks migration (overrides --disks-port)", "disks_uri", positional=True),
    _list("comp-methods", "comma separated list of compression methods to be used", "compression",
          choices=("mt", "xbzrle", "zlib", "zstd"), positional=True),
    _number("comp-mt-level", "compress level for multithread compression", "compression.mt.level", high=9,
            qemu="par:compress-level SD", positional=True),
    _number("comp-mt-threads", "number of compression threads for multithread compression",
            "compression.mt.threads", low=1, high=255, qemu="par:compress-threads SD", positional=True),
    _number("comp-mt-dthreads", "number of decompression threads for multithread compression",
            "compression.mt.dthreads", low=1, high=255, qemu="par:decompress-threads SD", positional=True),
    _number("comp-xbzrle-cache", "page cache size for xbzrle compression", "compression.xbzrle.cache",
            unit="bytes", low=4096, high=1 << 62, power_of_two=True, qemu="par:xbzrle-cache-size SD",
            positional=True),
    _number("auto-converge-initial", "initial CPU throttling rate for auto-convergence", "auto_converge.initial",
            unit="%", low=1, high=99, qemu="par:cpu-throttle-initial S", positional=True),
    _number("auto-converge-increment", "CPU throttling rate increment for auto-convergence",
            "auto_converge.increment", unit="%", low=1, high=99, qemu="par:cpu-throttle-increment S",
            positional=True),
    _file("persistent-xml", "filename containing updated persistent XML for the target", "persistent_xml",
          positional=True),
    _switch("tls", "use TLS for migration", "VIR_MIGRATE_TLS", qemu="par:tls-creds SD"),
    _number("postcopy-bandwidth", "post-copy migration bandwidth limit", "bandwidth.postcopy", unit="MiB/s",
            high=BANDWIDTH_LIMIT_MIB_S - 1, qemu="par:max-postcopy-bandwidth SD", positional=True),
    _switch("parallel", "enable parallel migration (QEMU's multifd)", "VIR_MIGRATE_PARALLEL", qemu="cap:multifd SD",
            aliases=("multifd",)),
    _number("parallel-connections", "number of connections for parallel migration", "parallel.connections",
            low=1, high=255, qemu="par:multifd-channels SD", aliases=("multifd-channels",), positional=True),
    _number("bandwidth", "migration bandwidth limit", "bandwidth", unit="MiB/s", high=BANDWIDTH_LIMIT_MIB_S - 1,
            qemu="par:max-bandwidth S", positional=True),
    _string("tls-destination", "override the destination host name used for TLS verification", "tls.destination",
            qemu="par:tls-hostname S", positional=True),
    _number("comp-zlib-level", "compress level for zlib compression", "compression.zlib.level", high=9,
            qemu="par:multifd-zlib-level SD", since=9_004_000),
    _number("comp-zstd-level", "compress level for zstd compression", "compression.zstd.level", high=20,
            qemu="par:multifd-zstd-level SD", since=9_004_000),
    _number("available-switchover-bandwidth", "bandwidth available for the final phase of migration",
            "bandwidth.avail.switchover", unit="MiB/s", high=BANDWIDTH_LIMIT_MIB_S - 1,
            qemu="par:avail-switchover-bandwidth S", since=11_001_000),
)

#: Our own rows. None of these names is one that virsh may want: each speaks of something virsh does not have.
OUR_OPTIONS: tuple[Option, ...] = (
    _number("threads", "N parallel connections: short for --parallel --parallel-connections N", low=1, high=255,
            ours=True, group="channels"),
    _choice("postcopy-preempt", "a channel of its own for the pages a postcopy guest waits for; libvirt agrees on it "
            "by itself when both QEMUs have it", "on", "off", "auto", default="auto", group="channels"),
    _choice("transport", "who moves the bytes: both QEMUs themselves, or the agents of both hosts between them; auto "
            "lets the plan choose", "auto", "direct", "relay", default="auto", group="channels"),
    _string("agent", "socket of the source host's agent; its usual place when left out", ours=True, group="channels"),
    _string("destination-agent", "where the destination's agent listens, tcp:HOST:PORT, unix:PATH or ssh:HOST, more "
            "than one separated by commas; the host of the destination URI when left out", ours=True,
            group="channels"),
    _switch("strict", "refuse instead of adjusting anything that was asked for", ours=True, group="plan"),
    _switch("plan", "start nothing; print what would be done, why, and on what evidence", ours=True,
            aliases=("dry-run",), group="plan"),
    _switch("estimate", "watch for a second how fast the guest writes, and say beforehand how long it will take; "
            "--plan does so too", ours=True, group="plan"),
    _switch("query-qemu", "ask both QEMUs for their migration capabilities through libvirt's monitor; this marks "
            "the domain as tainted", ours=True, group="plan"),
    _number("max-downtime", "how long the guest may be stopped at the switchover, set before the start",
            unit="ms", low=1, high=2_000_000, ours=True, qemu="par:downtime-limit S", group="policy"),
    _number("max-downtime-ceiling", "raise the downtime limit step by step up to this when memory does not converge",
            unit="ms", low=1, high=2_000_000, ours=True, group="policy"),
    _choice("on-stall", "what to do when memory does not converge; auto: postcopy if --postcopy was given, else the "
            "downtime ceiling if one was given, else go on and say so",
            "auto", "continue", "postcopy", "suspend", "abort", default="auto", group="policy"),
    _number("stall-passes", "passes over all memory without progress before it counts as not converging", low=1,
            high=1000, default="3", ours=True, group="policy"),
    _number("postcopy-after-passes", "switch to post-copy after this many full passes of pre-copy", low=1, high=1000,
            ours=True, group="policy"),
    _switch("timeout-abort", "abort the migration after timeout; the guest stays on the source", ours=True,
            group="policy"),
    _switch("fence", "keep the destination paused until the source is known to be stopped: two copies cannot run, "
            "whatever hangs (precopy)", ours=True, group="policy"),
    _number("retries", "try again this many times when the start fails for a passing reason", low=0, high=100,
            default="2", ours=True, group="policy"),
    _choice("progress", "how to show progress", "auto", "rich", "line", "log", "json", "none", default="auto",
            group="output"),
    _switch("json", "JSON lines on standard output: events, then the result", ours=True, group="output"),
    _string("report", "write a report of the migration to this file: HTML, for a browser without a network", ours=True,
            group="output"),
    _switch("quiet", "nothing but errors", ours=True, group="output"),
    _choice("exit-codes", "virsh: 0 or 1; fine: 0 done, 1 failed and safe on the source, 3 refused, 4 aborted, "
            "5 the guest needs attention", "virsh", "fine", default="virsh", group="output"),
)
# fmt: on

OPTIONS: tuple[Option, ...] = VIRSH_OPTIONS + OUR_OPTIONS
BY_NAME: dict[str, Option] = {row.name: row for row in OPTIONS}
SPELLINGS: dict[str, Option] = BY_NAME | {alias: row for row in OPTIONS for alias in row.aliases}
POSITIONAL: tuple[Option, ...] = tuple(row for row in OPTIONS if row.positional)


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """When every token of `when` was given, one of `needs` must be there too, and none of `excludes`.

    `message` is said in libvirt's (or virsh's) own words where they have words; `source` names where.
    """

    when: tuple[str, ...]
    needs: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    message: str
    hint: str = ""
    source: str = "virsh"


def _virsh_needs(option: str, needed: str) -> Rule:
    return Rule(
        when=(option,),
        needs=(needed,),
        message=f"Option --{needed} is required by option --{option}",
        hint=f"add --{needed}",
    )


def _virsh_excludes(one: str, other: str) -> Rule:
    return Rule(
        when=(one,),
        excludes=(other,),
        message=f"Options --{one} and --{other} are mutually exclusive",
        hint=f"leave out --{one} or --{other}",
    )


def _tune(option: str, needed: str, what: str, hint: str) -> Rule:
    return Rule(
        when=(option,),
        needs=(needed,),
        message=f"Turn {what} on to tune it",
        hint=hint,
        source="libvirt qemuMigrationParamsSetTPInt and neighbours",
    )


_NO_TIMEOUT = "migrate: Unexpected --timeout-* option without --timeout"
_STORAGE = ("copy-storage-all", "copy-storage-inc")


def _storage_needed(option: str) -> Rule:
    return Rule(
        when=(option,),
        needs=_STORAGE,
        message=f"--{option} needs --copy-storage-all or --copy-storage-inc",
        hint="add --copy-storage-all, or leave the disk list out",
        source="libvirt >= 11.3 (84); 9.0 ignores the list silently",
    )


def _not_tunnelled(option: str, message: str) -> Rule:
    return Rule(
        when=("tunnelled", option),
        excludes=("tunnelled",),
        message=message,
        hint=f"leave out --tunnelled, or leave out --{option}",
        source="libvirt qemu_migration.c",
    )


RULES: tuple[Rule, ...] = (
    # virsh's own checks (virsh-domain.c cmdMigrate)
    _virsh_excludes("live", "offline"),
    _virsh_excludes("timeout-suspend", "timeout-postcopy"),
    _virsh_excludes("timeout-abort", "timeout-postcopy"),
    _virsh_excludes("timeout-abort", "timeout-suspend"),
    _virsh_needs("postcopy-after-precopy", "postcopy"),
    _virsh_needs("timeout-postcopy", "postcopy"),
    _virsh_needs("persistent-xml", "persistent"),
    _virsh_needs("tls-destination", "tls"),
    Rule(when=("timeout-suspend",), needs=("timeout",), message=_NO_TIMEOUT,
         hint="add --timeout SECONDS"),
    Rule(when=("timeout-postcopy",), needs=("timeout",), message=_NO_TIMEOUT,
         hint="add --timeout SECONDS"),
    Rule(when=("timeout-abort",), needs=("timeout",), message=_NO_TIMEOUT,
         hint="add --timeout SECONDS"),
    Rule(when=("timeout",), needs=("live",), message="migrate: Unexpected timeout for offline migration",
         hint="add --live"),
    # libvirt's library and driver
    Rule(when=("copy-storage-all", "copy-storage-inc"), excludes=("copy-storage-inc",),
         message="--copy-storage-all and --copy-storage-inc are mutually exclusive",
         hint="leave one of them out", source="libvirt-domain.c, VIR_EXCLUSIVE_FLAGS"),
    Rule(when=("copy-storage-synchronous-writes",), needs=_STORAGE,
         message="--copy-storage-synchronous-writes needs --copy-storage-all or --copy-storage-inc",
         hint="add --copy-storage-all", source="libvirt-domain.c, VIR_REQUIRE_FLAG"),
    _storage_needed("migrate-disks"),
    _storage_needed("migrate-disks-detect-zeroes"),
    _storage_needed("migrate-disks-target-zero"),
    Rule(when=("disks-port", "disks-uri"), excludes=("disks-uri",),
         message="Both port and URI requested for disk migration while being mutually exclusive",
         hint="leave out --disks-port", source="libvirt qemu_driver.c"),
    Rule(when=("offline",), needs=("persistent",),
         message="offline migration must be specified with the persistent flag set", hint="add --persistent",
         source="libvirt qemuMigrationSrcBeginPhase"),
    *(Rule(when=("offline",), excludes=(storage,), message="offline migration cannot handle non-shared storage",
           hint=f"leave out --{storage} and copy the disks yourself", source="libvirt qemuMigrationSrcBeginPhase")
      for storage in _STORAGE),
    Rule(when=("offline",), excludes=("tunnelled",), message="tunnelled offline migration does not make sense",
         hint="leave out --tunnelled", source="libvirt qemuMigrationSrcBeginPhase"),
    Rule(when=("tunnelled",), needs=("p2p",),
         message="cannot perform tunnelled migration without using peer2peer flag", hint="add --p2p",
         source="libvirt-domain.c virDomainMigrate3"),
    _not_tunnelled("parallel", "--tunnelled and --parallel are mutually exclusive"),
    _not_tunnelled("postcopy", "post-copy is not supported with tunnelled migration"),
    _not_tunnelled("migrateuri", "migration URI is not supported by tunnelled migration"),
    _not_tunnelled("listen-address", "listen address is not supported by tunnelled migration"),
    _not_tunnelled("disks-port", "disk port address is not supported by tunnelled migration"),
    _not_tunnelled("disks-uri", "disks URI is ignored by tunnelled migration"),
    _not_tunnelled("copy-storage-all", "migration of non-shared storage is not supported with tunnelled migration"),
    _not_tunnelled("copy-storage-inc", "migration of non-shared storage is not supported with tunnelled migration"),
    _not_tunnelled("tls", "--tls and --tunnelled do not go together: the tunnel runs inside libvirt's own connection"),
    Rule(when=("direct",), excludes=("p2p",), message="--direct and --p2p are mutually exclusive",
         hint="leave out --direct: QEMU's driver has no direct migration", source="libvirt-domain.c"),
    Rule(when=("postcopy",), needs=("live",),
         message="post-copy migration is not supported with non-live or paused migration", hint="add --live",
         source="libvirt qemuMigrationSrcBeginPhase"),
    Rule(when=("postcopy",), excludes=("suspend",),
         message="post-copy migration is not supported with non-live or paused migration",
         hint="leave out --suspend, or leave out --postcopy", source="libvirt qemuMigrationSrcBeginPhase"),
    Rule(when=("postcopy-resume",), needs=("postcopy",),
         message="resuming failed post-copy migration requires post-copy to be enabled", hint="add --postcopy",
         source="libvirt qemuMigrationSrcBegin"),
    Rule(when=("postcopy-after-passes",), needs=("postcopy",),
         message="Option --postcopy is required by option --postcopy-after-passes", hint="add --postcopy",
         source="virtmig"),
    Rule(when=("on-stall=postcopy",), needs=("postcopy",),
         message="--on-stall postcopy needs --postcopy", hint="add --postcopy", source="virtmig"),
    Rule(when=("postcopy-preempt=on",), needs=("postcopy",),
         message="Postcopy preempt requires postcopy-ram", hint="add --postcopy", source="QEMU migrate_caps_check"),
    Rule(when=("zerocopy",), needs=("parallel",), message="zero-copy is only available for parallel migration",
         hint="add --parallel", source="libvirt qemuMigrationSrcBeginPhase"),
    Rule(when=("zerocopy",), excludes=("tls",),
         message="Zero copy only available for non-compressed non-TLS multifd migration",
         hint="leave out --zerocopy, or leave out --tls", source="QEMU migrate_params_check"),
    Rule(when=("zerocopy",), excludes=("comp-methods",),
         message="Zero copy only available for non-compressed non-TLS multifd migration",
         hint="leave out --zerocopy, or leave out --comp-methods", source="QEMU migrate_params_check"),
    _tune("parallel-connections", "parallel", "parallel migration", "add --parallel"),
    _tune("auto-converge-initial", "auto-converge", "auto convergence", "add --auto-converge"),
    _tune("auto-converge-increment", "auto-converge", "auto convergence", "add --auto-converge"),
    _tune("comp-mt-level", "comp-methods=mt", "multithread compression", "add --comp-methods mt"),
    _tune("comp-mt-threads", "comp-methods=mt", "multithread compression", "add --comp-methods mt"),
    _tune("comp-mt-dthreads", "comp-methods=mt", "multithread compression", "add --comp-methods mt"),
    Rule(when=("comp-xbzrle-cache",), needs=("comp-methods=xbzrle", "compressed"),
         message="Turn xbzrle compression on to tune it", hint="add --comp-methods xbzrle",
         source="libvirt qemuMigrationParamsSetCompression"),
    _tune("comp-zlib-level", "comp-methods=zlib", "zlib compression", "add --comp-methods zlib"),
    _tune("comp-zstd-level", "comp-methods=zstd", "zstd compression", "add --comp-methods zstd"),
    Rule(when=("compressed", "parallel"), needs=("comp-methods",),
         message="No compression algorithm selected for parallel migration",
         hint="add --comp-methods zstd or zlib, or leave out --compressed",
         source="libvirt >= 9.4; 9.0 sets xbzrle with multifd silently"),
    *(Rule(when=("parallel", f"comp-methods={method}"), excludes=("parallel",),
           message=f"Compression method '{method}' isn't supported with parallel migration",
           hint="use zstd or zlib with --parallel, or leave out --parallel",
           source="libvirt qemuMigrationParamsSetCompression") for method in ("mt", "xbzrle")),
    *(Rule(when=(f"comp-methods={method}",), needs=("parallel",),
           message=f"Compression method '{method}' is only supported with parallel migration", hint="add --parallel",
           source="libvirt qemuMigrationParamsSetCompression") for method in ("zlib", "zstd")),
    Rule(when=("parallel", "comp-methods=zlib", "comp-methods=zstd"), excludes=("comp-methods=zlib",),
         message="Only one compression method could be specified with parallel compression",
         hint="choose zlib or zstd", source="libvirt qemuMigrationParamsSetCompression"),
    Rule(when=("migrateuri=unix", "listen-address"), excludes=("listen-address",),
         message="Usage of listen-address is forbidden when migration URI uses UNIX transport method",
         hint="leave out --listen-address", source="libvirt qemu_driver.c"),
    *(Rule(when=("migrateuri=unix", storage), needs=("disks-uri",),
           message="NBD URI must be supplied when migration URI uses UNIX transport method",
           hint="add --disks-uri unix:///path", source="libvirt qemu_migration.c") for storage in _STORAGE),
    Rule(when=("migrateuri=unix", "tls"), needs=("tls-destination",),
         message="Explicit destination hostname is required for TLS migration over UNIX socket",
         hint="add --tls-destination HOSTNAME", source="libvirt qemu_migration.c"),
    Rule(when=("disks-uri=unix", "tls"), excludes=("tls",),
         message="NBD migration with TLS is not supported over UNIX socket", hint="use a tcp: disks URI",
         source="libvirt qemu_migration.c"),
    *(Rule(when=("transport=relay", other), excludes=(other,),
           message=f"--transport relay: the agents settle it between them, --{other} cannot be given",
           hint=f"leave out --{other}, or leave out --transport relay", source="virtmig")
      for other in ("migrateuri", "listen-address", "disks-uri", "disks-port")),
    *(Rule(when=("transport=relay", other), excludes=(other,), message=message, hint=hint, source="virtmig")
      for other, message, hint in (
          ("tunnelled", "--tunnelled goes through libvirt's daemons, --transport relay through the agents",
           "leave out --tunnelled: the relay encrypts as well, and carries every channel"),
          ("tls", "--tls of QEMU hides from the agents which channel is which; the link between them has TLS itself",
           "leave out --tls"),
          ("rdma-pin-all", "RDMA cannot go through a relay", "leave out --transport relay"),
          ("offline", "--offline moves no memory: there is nothing to relay", "leave out --transport relay"))),
    Rule(when=("fence",), excludes=("postcopy",),
         message="--fence holds the destination paused until the source has stopped; postcopy must run it earlier",
         hint="leave out --postcopy, or leave out --fence", source="virtmig"),
    Rule(when=("fence",), excludes=("offline",), message="--fence is for running guests; --offline moves a definition",
         hint="leave out --fence", source="virtmig"),
    _virsh_excludes("json", "verbose"),
    _virsh_excludes("quiet", "verbose"),
)  # fmt: skip
