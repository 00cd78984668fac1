"""KNOWN_BAD: versions that break what was asked, with what happens, the way out, and who saw it. Data only.

A row applies when every token of `when` holds (options of the request, features that are on, guest:KIND), none of
`unless` does, and every range holds: `side` is source, destination, or either (at least one of the two).

    refuse   the guest would be lost or the migration cannot work
    warn     it may go wrong
    note     worth knowing; shown by --plan and doctor, not before every migration
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from virtmig.facts import version, version_text

NEVER = 1 << 62


class Range(msgspec.Struct, frozen=True):
    """`since` is the first bad version, `until` the first good one again."""

    side: Literal["source", "destination", "either"]
    software: Literal["qemu", "libvirt"]
    since: int = 0
    until: int = NEVER

    def __str__(self) -> str:
        low = f"{version_text(self.since)} <= " if self.since else ""
        high = f" < {version_text(self.until)}" if self.until != NEVER else ""
        where = {"either": "either"}.get(self.side, f"{self.side}'s")
        name = {"qemu": "QEMU", "libvirt": "libvirt"}[self.software]
        return f"{low}{where} {name}{high}"


class KnownBad(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    kind: Literal["refuse", "warn", "note"]
    feature: str  # the feature it speaks about
    when: tuple[str, ...]
    unless: tuple[str, ...] = ()
    ranges: tuple[Range, ...]
    consequence: str
    way_out: str
    source: str


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """The four versions that rows are held against; None is unknown and matches no row."""

    source_qemu: int | None = None
    destination_qemu: int | None = None
    source_libvirt: int | None = None
    destination_libvirt: int | None = None

    def of(self, row: Range) -> tuple[int | None, ...]:
        pair = (
            (self.source_qemu, self.destination_qemu)
            if row.software == "qemu"
            else (self.source_libvirt, self.destination_libvirt)
        )
        return {"source": pair[:1], "destination": pair[1:]}.get(row.side, pair)


def known_bad(present: frozenset[str], versions: Versions) -> Iterator[KnownBad]:
    """Rows that apply to this request, guest and pair of hosts."""
    for row in KNOWN_BAD:
        if (
            present.issuperset(row.when)
            and present.isdisjoint(row.unless)
            and all(
                any(number is not None and item.since <= number < item.until for number in versions.of(item))
                for item in row.ranges
            )
        ):
            yield row


_DROP_ONE = "leave out --parallel, or leave out --postcopy, or bring both QEMUs to 10.1"

# fmt: off
KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad(name="paused-twice", kind="refuse", feature="domain", when=("guest:arrived-paused",),
             unless=("unsafe", "offline"), ranges=(Range("source", "qemu", until=version(10, 0)),),
             consequence="this paused guest was migrated here and has used no processor time since; if it never ran, "
                         "the source's QEMU aborts when it is migrated again, and the guest is lost",
             way_out="virsh resume it until it has done something, then suspend it again; or --unsafe if it has run",
             source="seen with QEMU 7.2.22: bdrv_inactivate_recurse assertion; reported to Nova in 2024"),
    KnownBad(name="maybe-paused-twice", kind="warn", feature="domain", when=("guest:maybe-arrived-paused",),
             unless=("unsafe", "offline"), ranges=(Range("source", "qemu", until=version(10, 0)),),
             consequence="if this paused guest was migrated here and has not run since, the source's QEMU aborts and "
                         "the guest is lost",
             way_out="virsh resume it for a second first",
             source="seen with QEMU 7.2.22: bdrv_inactivate_recurse assertion; reported to Nova in 2024"),
    KnownBad(name="multifd-postcopy-loses-guest", kind="refuse", feature="multifd", when=("multifd", "postcopy"),
             ranges=(Range("either", "qemu", 0, version(8)),),
             consequence="this QEMU accepts multifd with postcopy, then its destination aborts after libvirt has "
                         "reported success: the guest is lost on both hosts",
             way_out=_DROP_ONE, source="seen 4 times of 4 with QEMU 7.2.22: yank_unregister_instance assertion"),
    KnownBad(name="multifd-postcopy-refused", kind="refuse", feature="multifd", when=("multifd", "postcopy"),
             ranges=(Range("either", "qemu", version(8), version(10, 1)),),
             consequence="this QEMU refuses the pair: Postcopy is not yet compatible with multifd",
             way_out=_DROP_ONE, source="QEMU 8.0 to 10.0 migrate_caps_check"),
    KnownBad(name="resume-crashes-destination", kind="refuse", feature="postcopy-resume", when=("postcopy-resume",),
             ranges=(Range("destination", "libvirt", version(11, 2), version(11, 4)),),
             consequence="the destination daemon crashes when it resumes a failed postcopy",
             way_out="bring the destination's libvirt to 11.4 first: the guest's QEMU goes on while the daemon is "
                     "replaced; then resume",
             source="libvirt NEWS 11.4.0"),
    KnownBad(name="postcopy-cannot-be-resumed", kind="warn", feature="postcopy", when=("postcopy",),
             unless=("postcopy-resume",),
             ranges=(Range("destination", "libvirt", version(11, 2), version(11, 4)),),
             consequence="if the network breaks during postcopy, this destination daemon crashes at the recovery",
             way_out="bring the destination's libvirt to 11.4, or leave out --postcopy", source="libvirt NEWS 11.4.0"),
    KnownBad(name="resume-reported-failed", kind="warn", feature="postcopy-resume", when=("postcopy-resume",),
             ranges=(Range("either", "libvirt", 0, version(11)),),
             consequence="libvirt may report a recovery as failed that in fact goes on",
             way_out="believe the hosts, not the error: ask both for the domain's state afterwards",
             source="libvirt NEWS 11.0.0, RHEL-73085"),
    KnownBad(name="recovery-must-not-break", kind="warn", feature="postcopy-resume", when=("postcopy-resume",),
             ranges=(Range("either", "qemu", 0, version(8, 2)),),
             consequence="this QEMU ends with a segmentation fault, and the guest with it, if the connection breaks "
                         "again while the recovery is still negotiated",
             way_out="see first that the network between the hosts is sound again; broken later it pauses once more",
             source="QEMU commit f8c543e808f2; seen with 7.2.22"),
    KnownBad(name="nbd-broken", kind="refuse", feature="storage-copy", when=("storage-copy",),
             ranges=(Range("either", "libvirt", version(8, 7), version(8, 8)),),
             consequence="migration with storage copy over NBD is broken in libvirt 8.7",
             way_out="bring libvirt to 8.8, or put the disks on shared storage", source="libvirt NEWS 8.8.0"),
    KnownBad(name="tunnelled-storage-goes-on", kind="refuse", feature="tunnelled", when=("tunnelled", "storage-copy"),
             ranges=(Range("either", "libvirt", version(9), version(9, 1)),),
             consequence="libvirt 9.0 reports that a tunnel cannot copy storage and goes on all the same",
             way_out="leave out --tunnelled, or put the disks on shared storage", source="seen with libvirt 9.0.0"),
    KnownBad(name="restart-during-migration-crashes", kind="warn", feature="p2p", when=(),
             ranges=(Range("either", "libvirt", version(8, 8), version(8, 9)),),
             consequence="restarting this daemon during a migration crashes it",
             way_out="do not restart libvirtd until the migration has ended, or bring it to 8.9",
             source="libvirt NEWS 8.9.0"),
    KnownBad(name="root-squash-nfs", kind="warn", feature="storage", when=("guest:file-disks",),
             ranges=(Range("either", "libvirt", version(10, 1), version(10, 4)),),
             consequence="libvirt 10.1 to 10.3 cannot migrate a guest whose disks are on root-squashed NFS",
             way_out="bring libvirt to 10.4 if the disks are on such an export", source="libvirt NEWS 10.4.0"),
    KnownBad(name="shutdown-during-migration-crashes", kind="note", feature="live", when=("live",),
             ranges=(Range("either", "libvirt", 0, version(10, 5)),),
             consequence="the daemon may crash when the guest shuts itself down while it migrates",
             way_out="bring libvirt to 10.5", source="libvirt NEWS 10.5.0"),
    KnownBad(name="vmx-features-refused", kind="warn", feature="cpu", when=("guest:kvm",),
             ranges=(Range("source", "libvirt", 0, version(9, 10)),
                     Range("destination", "libvirt", version(9, 10), version(10, 2))),
             consequence="a guest started by libvirt before 9.10 on an Intel host may be refused for vmx features",
             way_out="bring the destination's libvirt to 10.2", source="libvirt NEWS 10.2.0"),
    KnownBad(name="ht-refused", kind="warn", feature="cpu", when=(),
             ranges=(Range("destination", "libvirt", 0, version(11, 10)), Range("source", "qemu", 0, version(10)),
                     Range("destination", "qemu", version(10))),
             consequence="the destination may refuse the guest for an extra CPU feature 'ht'",
             way_out="bring the destination's libvirt to 11.10", source="libvirt NEWS 11.10.0"),
    KnownBad(name="xmldesc-times-out", kind="note", feature="watching", when=(),
             ranges=(Range("destination", "libvirt", version(11), version(11, 5)),),
             consequence="asking this destination for the XML of the arriving guest may time out",
             way_out="bring the destination's libvirt to 11.5; virtmig does not ask for it",
             source="libvirt NEWS 11.5.0"),
    KnownBad(name="swtpm-race", kind="warn", feature="tpm", when=("guest:tpm",),
             ranges=(Range("either", "libvirt", 0, version(12)),),
             consequence="the state of an emulated TPM on shared storage can be lost in a race between the hosts",
             way_out="bring libvirt to 12.0, or keep the TPM state off shared storage", source="libvirt NEWS 12.0.0"),
    KnownBad(name="tls-source-crash", kind="warn", feature="tls", when=("tls",),
             ranges=(Range("source", "libvirt", 0, version(11, 6)),),
             consequence="a long TLS migration can crash the source QEMU (GnuTLS rekeying), and this libvirt cannot "
                         "set a TLS priority against it",
             way_out="bring libvirt to 11.6 and set migrate_tls_priority in qemu.conf", source="libvirt NEWS 11.6.0"),
    KnownBad(name="multifd-tls-close", kind="warn", feature="multifd", when=("multifd", "tls"),
             ranges=(Range("source", "qemu", 0, version(9, 2)),
                     Range("destination", "qemu", version(9, 2), version(10))),
             consequence="this destination takes the end of an older QEMU's TLS channels for an error",
             way_out="leave out --parallel, or bring the destination to QEMU 10.0", source="QEMU issue 2720"),
    KnownBad(name="frequent-iterations", kind="note", feature="postcopy", when=("postcopy-after-precopy",),
             ranges=(Range("source", "qemu", version(11)),),
             consequence="QEMU 11 announces an iteration every 100 ms: virsh's --postcopy-after-precopy switches "
                         "almost at once",
             way_out="virtmig counts full passes over memory instead; with virsh, use migrate-postcopy by hand",
             source="seen with QEMU 11.1.3 and libvirt 12.8"),
    KnownBad(name="frozen-daemon-doubles-guest", kind="note", feature="fence", when=("live",),
             unless=("fence", "postcopy"),
             ranges=(Range("either", "libvirt", 0),),
             consequence="a destination daemon that freezes at the end of precopy and is thawed later starts its copy "
                         "although the source runs on",
             way_out="--fence, for precopy", source="seen with libvirt 9.0.0; libvirt leaves this to lock managers"),
)
# fmt: on
