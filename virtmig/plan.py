"""negotiate(request, source, destination, guest) -> Plan: every feature on or off, with its reason. Pure.

The order of the word: what the person asked for is done, or refused with every reason at once and a way out of each;
it is adjusted only where less of the same is meant (connections), is said so, and is refused under --strict. What was
left open is decided by what both hosts can do. What would help but is not ours to choose is suggested, never done.
"""

from __future__ import annotations

import msgspec

from virtmig.agreement import Adjustment, Channel, Choice, Plan, Suggestion
from virtmig.draft import Draft
from virtmig.facts import GuestFacts, HostFacts
from virtmig.features import BY_FEATURE, FEATURES, Feature, capabilities_of, conflicts, qemu_settings
from virtmig.known_bad import KnownBad, known_bad
from virtmig.obstacles import Caution, copied_disks, obstacles
from virtmig.options import BY_NAME
from virtmig.request import MigrationRequest, tokens

__all__ = ["Plan", "negotiate", "settings_of"]

#: QEMU's own number of multifd channels when nobody names one
DEFAULT_PARALLEL_CONNECTIONS = 2
#: more connections than this pay only on links of 100 Gbit/s; the suggestion stops here
SUGGESTED_PARALLEL_CONNECTIONS = 4


def _userfaultfd_way_out(host: HostFacts) -> str:
    """The one setting that allows it; the device list is for daemons that may give devices away."""
    device = "" if host.session else ", or /dev/userfaultfd in cgroup_device_acl of qemu.conf with libvirt >= 10.1"
    return f"on the destination: sysctl vm.unprivileged_userfaultfd=1{device}; or leave out --postcopy"


def negotiate(request: MigrationRequest, source: HostFacts, destination: HostFacts, guest: GuestFacts) -> Plan:
    """The plan for `request` between these hosts. Never raises for what cannot be done: that is in `refusals`."""
    if source.label == destination.label:  # two daemons of one machine: every sentence must tell them apart
        source = msgspec.structs.replace(source, hostname=f"{source.label} (source)")
        destination = msgspec.structs.replace(destination, hostname=f"{destination.label} (destination)")
    draft = Draft(request, source, destination, guest)
    for item in obstacles(request, source, destination, guest):
        draft.add(item)
    if "postcopy-resume" in request:
        _plan_resume(draft)
    else:
        _choose_preempt(draft)
        _check_versions(draft)
        _check_capabilities(draft)
        _check_conflicts(draft)
        _check_parallel(draft)
        _check_postcopy(draft)
        _check_zero_copy(draft)
        _check_tls(draft)
        _check_rdma(draft)
        _suggest(draft)
    _check_known_bad(draft)
    _check_agents(draft)
    return _finish(draft)


def _finish(draft: Draft) -> Plan:
    return Plan(
        domain=draft.guest.name or draft.request.domain,
        source=draft.source.label,
        destination=draft.destination.label,
        transport="relay" if draft.relay else "direct",
        transport_reason=draft.transport_reason,
        channels=_channels(draft),
        choices=tuple(_choice(draft, row) for row in FEATURES),
        refusals=tuple(draft.refusals),
        adjustments=tuple(draft.adjustments),
        suggestions=tuple(draft.suggestions),
        warnings=tuple(draft.warnings),
        notes=tuple(draft.notes),
        values={name: draft.request[name] for name in draft.request},
        virsh_line=draft.request.virsh_line(draft.source.uri),
        beyond_virsh=tuple(f"--{name}" for name in draft.request if BY_NAME[name].ours),
    )


# -- what each feature becomes -------------------------------------------------------------------------------------


def _choice(draft: Draft, row: Feature) -> Choice:
    evidence = draft.evidence(row)
    if row.name in draft.reasons:
        on, reason = draft.reasons[row.name]
        return Choice(row.name, on, reason, evidence)
    if draft.resume and row.name not in ("postcopy-resume", "postcopy", "live", "p2p"):
        return Choice(row.name, False, "as it was when the postcopy began; a resume negotiates nothing", "")
    if row.name == "xbzrle" and "xbzrle" in draft.on and "compressed" in draft.request:
        return Choice(row.name, True, "--compressed means xbzrle when no method is named", evidence)
    if row.say == "never":
        return Choice(row.name, False, "only for files: it changes the layout of the stream, so it is never chosen", "")
    if row.say in ("always", "automatic") and row.name not in draft.on:
        return _libvirts_choice(draft, row, evidence)
    if row.name == "return-path":
        return Choice(row.name, True, "libvirt sets it on every migration that is not tunnelled", evidence)
    if row.name in draft.on:
        return Choice(row.name, True, f"asked for with {_spelling(draft, row)}", evidence)
    return Choice(row.name, False, "not asked for", evidence)


def _spelling(draft: Draft, row: Feature) -> str:
    token = next(token for token in row.when if token in tokens(draft.request))
    return "--" + token.replace("=", " ", 1)


def _libvirts_choice(draft: Draft, row: Feature, evidence: str) -> Choice:
    """A feature that libvirt turns on by itself."""
    if "offline" in draft.request:
        return Choice(row.name, False, "no memory is sent", "")
    for other in row.needs:
        if other not in draft.on:
            return Choice(row.name, False, f"it needs {other}, which is off", evidence)
    if row.name == "return-path":
        return Choice(row.name, False, "a tunnel is one-way", evidence)
    lacking, unknown = draft.lacking(row)
    if lacking:
        return Choice(row.name, False, lacking, evidence)
    if unknown:
        return Choice(row.name, None, f"libvirt decides when the daemons meet: {unknown}", evidence)
    who = {"S": "the source", "D": "the destination"}.get(row.sides, "both hosts")
    return Choice(row.name, True, f"libvirt turns it on by itself: {who} can", evidence)


def _choose_preempt(draft: Draft) -> None:
    """libvirt has no switch for it: on when both ends can, whoever asks or not. So on and off are checked, not set."""
    row = BY_FEATURE["postcopy-preempt"]
    asked = draft.request.text("postcopy-preempt")
    draft.on.discard(row.name)
    if "postcopy" not in draft.on:
        return
    lacking, unknown = draft.lacking(row)
    if not lacking and row.many_channels and not draft.transport.many_channels:
        lacking = f"{draft.transport.name} carries one channel"
    if not lacking and not unknown:
        draft.on.add(row.name)
        draft.reasons[row.name] = (True, "postcopy is allowed, both hosts have it, and the transport carries it")
        if asked == "off":
            draft.refuse(
                row.name,
                "--postcopy-preempt off cannot be had: libvirt turns it on by itself when both QEMUs have it, and has "
                "no switch for it",
                "leave out --postcopy-preempt off, or leave out --postcopy",
            )
        return
    if asked == "on" and lacking:
        draft.refuse(
            row.name,
            f"--postcopy-preempt on cannot be had: {lacking}",
            "leave out --postcopy-preempt on: postcopy works without it, with slower faults",
        )
    elif asked != "auto" and unknown:
        draft.warn(row.name, f"whether --postcopy-preempt {asked} can be had is not known: {unknown}")
    if lacking:
        draft.reasons[row.name] = (False, lacking)
    else:
        draft.reasons[row.name] = (None, f"libvirt decides when the daemons meet: {unknown}")


# -- checks --------------------------------------------------------------------------------------------------------


def _check_versions(draft: Draft) -> None:
    for row in FEATURES:
        if row.name not in draft.on or row.say != "asked":
            continue
        lacking, unknown = draft.lacking(row)
        spelled = f"--{row.when[0].partition('=')[0]}"
        if lacking:
            way_out = f"leave out {spelled}" if row.name != "tls" else "upgrade QEMU, or leave out --tls"
            reason = f"{row.name} cannot be had: {lacking}"
            if row.name == "tls":
                reason = f"TLS migration is not supported with this QEMU binary: {lacking}"
            elif row.qemu:
                reason = f"Migration option '{row.qemu}' is not supported by QEMU binary or libvirt: {lacking}"
            draft.refuse(row.name, reason, way_out)
        elif unknown and draft.destination.reachable:
            draft.warn(row.name, f"whether both hosts can do {row.name} is not known: {unknown}")


def _check_capabilities(draft: Draft) -> None:
    """What QEMU said itself, where it was asked, counts more than its version."""
    for side, host, asked in (
        ("source", draft.source, draft.guest.migration_capabilities),
        ("destination", draft.destination, draft.destination.migration_capabilities),
    ):
        if asked is None:
            continue
        here = frozenset(asked)
        settings = qemu_settings(draft.request, "source" if side == "source" else "destination", here=here, peer=here)
        for name in settings.required:
            if name not in here:
                feature = next((row.name for row in FEATURES if row.qemu == name), name)
                reason = f"Migration option '{name}' is not supported by QEMU binary on {host.label}"
                if not any(item.feature == feature for item in draft.refusals):
                    draft.refuse(feature, reason, f"leave out what needs {name}, or upgrade QEMU there")


def _check_conflicts(draft: Draft) -> None:
    present = draft.present
    said = {frozenset(row.when) for row in known_bad(present, draft.versions) if row.kind == "refuse"}
    for row, exclusion in conflicts(present, draft.source_qemu, draft.destination.qemu_version):
        if frozenset((row.name, exclusion.other)) in said:
            continue  # the known-bad row names the consequence as well
        other = exclusion.other
        if other.startswith("guest:"):
            way_out = f"leave out {_option_of(row.name)}, or detach the devices first"
        else:
            way_out = f"leave out {_option_of(row.name)}, or leave out {_option_of(other)}"
        draft.refuse(row.name, f"{row.name} excludes {other.removeprefix('guest:')}: {exclusion.reason}", way_out)
    if {"multifd", "postcopy"} <= draft.on and (draft.source_qemu is None or draft.destination.qemu_version is None):
        draft.warn(
            "multifd",
            "multifd with postcopy loses the guest when either QEMU is older than 10.1, and one version is not known",
            "leave out --parallel, or leave out --postcopy",
        )


def _option_of(feature: str) -> str:
    row = BY_FEATURE[feature]
    return "--" + row.when[0].replace("=", " ", 1) if row.when else feature


def _check_parallel(draft: Draft) -> None:
    if "multifd" not in draft.on:
        return
    asked = draft.request.number("parallel-connections")
    wanted = asked or DEFAULT_PARALLEL_CONNECTIONS
    for _, host, _ in draft.ends:
        limit = host.parallel_connections_max
        if limit is None or wanted <= limit:
            continue
        reason = f"{host.label} allows {limit} parallel connections"
        shown = f"{asked}" if asked else f"{DEFAULT_PARALLEL_CONNECTIONS} (QEMU's own number)"
        if limit < 1:
            draft.refuse("multifd", f"{host.label} allows no parallel connections", "leave out --parallel")
        elif "strict" in draft.request:
            draft.refuse(
                "multifd",
                f"{shown} parallel connections were asked for, {reason}",
                f"--parallel-connections {limit}, or leave out --strict to have it adjusted",
            )
        else:
            draft.adjustments.append(Adjustment("parallel-connections", shown, str(limit), reason))
            draft.request = draft.request.replace(parallel_connections=limit)
            wanted = asked = limit
    for _, host, _ in draft.ends:
        if host.cpus == 1:
            draft.warn(
                "multifd",
                f"{host.label} has one CPU: parallel connections are pure overhead there",
                "leave out --parallel",
            )
        elif host.cpus is not None and wanted > 2 * host.cpus:
            draft.warn(
                "multifd",
                f"{wanted} connections on {host.label} with {host.cpus} CPUs: the threads get in each other's way",
                f"--parallel-connections {host.cpus}",
            )


def _check_postcopy(draft: Draft) -> None:
    if "postcopy" not in draft.on:
        return
    can = draft.destination.userfaultfd
    if can.status == "no":
        draft.refuse(
            "postcopy",
            f"Postcopy is not supported: QEMU's user on {draft.destination.label} may not use userfaultfd "
            f"({can.evidence})",
            _userfaultfd_way_out(draft.destination),
        )
    elif can.status == "unknown":
        draft.warn(
            "postcopy",
            f"whether QEMU's user on {draft.destination.label} may use userfaultfd is not known ({can.evidence}); if "
            "not, the start is refused",
            _userfaultfd_way_out(draft.destination),
        )
    if draft.guest.memory_source == "file":
        draft.warn("postcopy", "the guest's memory is file-backed: QEMU refuses postcopy unless it lies on tmpfs")


def _check_zero_copy(draft: Draft) -> None:
    if "zero-copy-send" not in draft.on:
        return
    source, guest = draft.source, draft.guest
    if draft.transport.name in ("unix", "relay"):
        draft.refuse(
            "zero-copy-send",
            "Zero copy send feature not detected in host kernel: unix sockets do not have it",
            "leave out --zerocopy, or use a tcp migrate URI and --transport direct",
        )
    need = guest.hard_limit_bytes or guest.memory_bytes
    limit = source.locked_memory_limit_bytes
    if source.locked_memory_raisable or need is None or limit == -1:
        return
    if limit is not None and limit < need:
        draft.refuse(
            "zero-copy-send",
            f"zero-copy needs {need >> 20} MiB of locked memory, the limit of the daemon on {source.label} is "
            f"{limit >> 10} KiB and it may not raise it",
            "raise it (LimitMEMLOCK= of the daemon's unit, or ulimit -l before it starts), or leave out --zerocopy",
        )
    elif limit is None:
        draft.warn("zero-copy-send", f"zero-copy needs {need >> 20} MiB of locked memory; the limit there is not known")


def _check_tls(draft: Draft) -> None:
    if "tls" not in draft.on:
        return
    for _, host, _ in draft.ends:
        if host.tls_files.status == "no":
            draft.refuse(
                "tls",
                f"no certificates for QEMU on {host.label}: {host.tls_files.evidence}",
                "put ca-cert.pem, server-*.pem and client-*.pem there, or set migrate_tls_x509_cert_dir in qemu.conf",
            )
        elif host.tls_files.status == "unknown":
            draft.warn("tls", f"the certificates of {host.label} were not seen: {host.tls_files.evidence}")


def _check_agents(draft: Draft) -> None:
    if not draft.relay:
        return
    for host in (draft.source, draft.destination):
        if host.agent.status == "no":
            draft.refuse(
                "relay",
                f"--transport relay needs an agent on {host.label}: {host.agent.evidence}",
                "systemctl start virtmig-agent.socket on that host, or leave out --transport relay",
            )


def _check_rdma(draft: Draft) -> None:
    if "rdma" in draft.on and draft.guest.hard_limit_bytes is None:
        draft.refuse(
            "rdma",
            "cannot start RDMA migration with no memory hard limit set",
            f"virsh memtune {draft.guest.name} --hard-limit KIB, more than the guest's memory",
        )
    if "rdma-pin-all" in draft.on and "rdma" not in draft.on:
        draft.warn("rdma-pin-all", "--rdma-pin-all does nothing without an rdma migrate URI", "leave it out")


def _check_known_bad(draft: Draft) -> None:
    for row in known_bad(draft.present, draft.versions):
        text = f"{row.consequence} ({_ranges(row)}; {row.source})"
        if row.kind == "refuse":
            draft.refuse(row.feature, text, row.way_out)
        elif row.kind == "warn":
            draft.warn(row.feature, text, row.way_out)
        else:
            draft.notes.append(Caution(row.feature, text, row.way_out))


def _ranges(row: KnownBad) -> str:
    return ", ".join(str(item) for item in row.ranges)


def _plan_resume(draft: Draft) -> None:
    draft.on &= {"postcopy-resume", "postcopy", "live", "p2p"}
    _check_versions(draft)
    draft.reasons["postcopy-resume"] = (True, "asked for with --postcopy-resume")
    draft.reasons["postcopy"] = (True, "it is under way; no capability is set again")
    sent = {"domain", "desturi", "live", "p2p", "postcopy", "postcopy-resume", "postcopy-bandwidth", "migrateuri"}
    idle = [name for name in draft.request if name not in sent and not BY_NAME[name].ours]
    if idle:
        names = ", ".join(f"--{name}" for name in idle)
        draft.warn("postcopy-resume", f"a resume sends only --postcopy-bandwidth again; these do nothing: {names}")


# -- suggestions and channels --------------------------------------------------------------------------------------


def _suggest(draft: Draft) -> None:
    if "offline" in draft.request:
        return
    _suggest_multifd(draft)
    if draft.guest.persistent and "persistent" not in draft.request:
        draft.suggestions.append(
            Suggestion("persistent", "--persistent", "the guest is defined here; there it would vanish when it stops")
        )
    live = "live" in draft.on and draft.guest.running
    if (
        live
        and "postcopy" not in draft.on
        and "fence" not in draft.on
        and draft.destination.userfaultfd.status == "yes"
    ):
        row = BY_FEATURE["postcopy"]
        if not any(draft.lacking(row)) and not draft.guest.vfio and draft.transport.both_ways:
            draft.suggestions.append(
                Suggestion("postcopy", "--postcopy", "both hosts can; a busy guest is then sure to arrive")
            )


def _suggest_multifd(draft: Draft) -> None:
    """Suggested where it can pay, never forced: it needs the person's word (the transport, the cores, the guest)."""
    if "multifd" in draft.on:
        return
    row = BY_FEATURE["multifd"]
    why_not, unknown = draft.lacking(row)
    one_core = next((host.label for _, host, _ in draft.ends if host.cpus == 1), "")
    blocked = next(conflicts({*draft.present, "multifd"}, draft.source_qemu, draft.destination.qemu_version), None)
    if row.many_channels and not draft.transport.many_channels:
        why_not = f"{draft.transport.name} carries one channel"
    elif one_core:
        why_not = f"{one_core} has one CPU: more connections are pure overhead there"
    elif blocked and "multifd" in (blocked[0].name, blocked[1].other):
        why_not = blocked[1].reason
    if why_not:
        draft.reasons["multifd"] = (False, f"not asked for, and not suggested: {why_not}")
        return
    cpus = [host.cpus for _, host, _ in draft.ends if host.cpus]
    if unknown or len(cpus) < 2:
        return
    count = max(2, min(SUGGESTED_PARALLEL_CONNECTIONS, *cpus))
    limits = [host.parallel_connections_max for _, host, _ in draft.ends if host.parallel_connections_max is not None]
    count = min([count, *limits])
    if count < 2:
        draft.reasons["multifd"] = (False, "not asked for, and not suggested: one host allows one connection")
        return
    draft.suggestions.append(
        Suggestion(
            "multifd",
            f"--parallel --parallel-connections {count}",
            f"both QEMUs can, the transport carries it, and the hosts have {' and '.join(map(str, cpus))} CPUs",
        )
    )


def _channels(draft: Draft) -> tuple[Channel, ...]:
    if "offline" in draft.request:
        return ()
    both_ways = draft.transport.both_ways
    found = [Channel("main", 1, both_ways, "" if both_ways else "a one-way transport carries one channel")]
    if draft.resume:
        if draft.relay:
            found.append(Channel("priority", 1, False, "if both QEMUs had it before"))
        return tuple(found)
    if "multifd" in draft.on:
        asked = draft.request.number("parallel-connections")
        note = "" if asked else "QEMU's own number"
        found.append(Channel("parallel", asked or DEFAULT_PARALLEL_CONNECTIONS, False, note))
    if "postcopy-preempt" in draft.on:
        found.append(Channel("priority", 1, False, "opened when postcopy starts"))
    elif draft.relay and draft.reasons.get("postcopy-preempt", (False, ""))[0] is None:
        # a QEMU that opens it and is turned away waits for ever; one that does not leaves it unused
        found.append(Channel("priority", 1, False, "if both hosts have it"))
    if disks := copied_disks(draft.request, draft.guest):
        found.append(Channel("storage", len(disks), True, "NBD, before memory"))
    return tuple(found)


def settings_of(plan: Plan, source: HostFacts, destination: HostFacts) -> dict[str, dict[str, object]]:
    """What libvirt will tell each QEMU under `plan`, as far as both versions are known; empty when they are not."""
    able = [
        capabilities_of(host.qemu_version, host.libvirt_version)
        for host in (source, destination)
        if host.qemu_version is not None and host.libvirt_version is not None
    ]
    if len(able) < 2:
        return {}
    mine = qemu_settings(plan.request, "source", here=able[0], peer=able[1])
    theirs = qemu_settings(plan.request, "destination", here=able[1], peer=able[0])
    return {
        side: {"capabilities": list(found.capabilities), "parameters": found.sent()}
        for side, found in (("source", mine), ("destination", theirs))
    }
