"""What libvirt calls the things that virtmig refuses, and how a failure is said to a caller who knows libvirt's errors.

A refusal has libvirt's own code and part for the same thing, looked up in libvirt 9.0's source (the function named in
the last column) or seen from it; what libvirt has no word for is "Operation not supported".
"""

from __future__ import annotations

import re

import msgspec

from virtmig.errors import (
    DomainXmlError,
    MigrationAborted,
    MigrationError,
    PlanRefused,
    RequestError,
    VirtError,
)
from virtmig.progress import Outcome, Status
from virtmig.virt.facade import Named, libvirt_error

_QEMU, _DOMAIN, _NONE, _CPU = "VIR_FROM_QEMU", "VIR_FROM_DOMAIN", "VIR_FROM_NONE", "VIR_FROM_CPU"
_INVALID = Named("VIR_ERR_OPERATION_INVALID", _QEMU)
_FAILED = Named("VIR_ERR_OPERATION_FAILED", _QEMU)
_ABORTED = Named("VIR_ERR_OPERATION_ABORTED", _QEMU)
_UNSUPPORTED = Named("VIR_ERR_OPERATION_UNSUPPORTED", _QEMU)
_ARGUMENT = Named("VIR_ERR_ARGUMENT_UNSUPPORTED", _QEMU)
_BAD_ARGUMENT = Named("VIR_ERR_INVALID_ARG", _QEMU)
_CONFIG = Named("VIR_ERR_CONFIG_UNSUPPORTED", _QEMU)
_INTERNAL = Named("VIR_ERR_INTERNAL_ERROR", _QEMU)


class Row(msgspec.Struct, frozen=True):
    """`words`: a regular expression that the refusal's reason begins with; `source` where libvirt says it."""

    words: str
    name: Named
    source: str


# fmt: off
#: refusals of a plan (virtmig/plan.py, obstacles.py, known_bad.py) in the order in which libvirt comes to them: the
#: caller's library, the source's Begin, the destination's Prepare, QEMU. The first row that fits is what libvirt says
REFUSALS: tuple[Row, ...] = (
    Row("this libvirt is too old for", Named("VIR_ERR_ARGUMENT_UNSUPPORTED", _NONE), "virTypedParamsValidate; seen"),
    Row("Attempt to migrate guest to the same host", Named("VIR_ERR_INVALID_ARG", _DOMAIN, bare=True),
        "virDomainMigrateCheckNotLocal; seen"),
    Row("another job is already running for domain '.*': migration", _INVALID, "qemuMigrationJobIsAllowed; seen"),
    Row("another job is already running", Named("VIR_ERR_OPERATION_TIMEOUT", _QEMU),
        "qemuDomainObjBeginJobInternal, after 30 s"),
    Row("domain is not running", Named("VIR_ERR_OPERATION_INVALID", _DOMAIN), "virDomainObjCheckActive; seen"),
    Row("domain '.*' is not being migrated", _INVALID, "qemuMigrationAnyCanResume; seen"),
    Row("domain '.*' is split by a postcopy", _INVALID, "qemuMigrationSrcBeginPhase"),
    Row("post-copy migration is not supported with non-live or paused", _ARGUMENT, "qemuMigrationSrcBeginXML; seen"),
    Row("cannot migrate domain|domain has |domain is marked|shmem device|migration with (virtiofs|transient)",
        _INVALID, "qemuMigrationSrcIsAllowed; seen"),
    Row("Migration without shared storage is unsafe", Named("VIR_ERR_MIGRATE_UNSAFE", _QEMU),
        "qemuMigrationSrcIsSafe; seen"),
    Row("disk target .* not found", _BAD_ARGUMENT, "qemuMigrationSrcBeginPhaseValidateDiskTargetList; seen"),
    Row(".* runs .* guests, .* runs .* guests", _FAILED, "qemuMigrationSrcPerformPeer2Peer"),
    Row("source and destination are the same host", _INTERNAL, "qemuMigrationEatCookie; seen"),
    Row(".* does not run domain '.*': there is no other half", _INVALID, "qemuMigrationDstPrepareResume"),
    Row("domain '.*' with UUID .* is already active on", Named("VIR_ERR_OPERATION_INVALID", _DOMAIN),
        "virDomainObjListAddLocked; seen"),
    Row(".* knows UUID .* under the name", Named("VIR_ERR_OPERATION_FAILED", _DOMAIN),
        "virDomainObjListAddLocked; seen"),
    Row("domain '.*' already exists on", Named("VIR_ERR_OPERATION_FAILED", _DOMAIN),
        "virDomainObjListAddLocked; seen"),
    Row("cannot start RDMA migration with no memory hard limit", _INVALID, "qemuMigrationDstPrepareAny; seen"),
    Row(r"machine type|.* runs no \S+ guests|.* has no \S+ for \S+, only", _CONFIG,
        "virQEMUCapsIsMachineSupported, qemuProcessStart"),
    Row(".* cannot run this guest's emulator", _CONFIG, "virQEMUCapsCacheLookup"),
    Row("the guest's CPU does not fit", Named("VIR_ERR_CPU_INCOMPATIBLE", _CPU), "virCPUx86Compare"),
    Row("Cannot migrate empty or read-only disk", _UNSUPPORTED, "qemuMigrationDstStartNBDServer; seen"),
    Row("Migration option '.*' is not supported by QEMU binary", _ARGUMENT, "qemuMigrationParamsCheck"),
    Row("TLS migration is not supported with this QEMU binary", _UNSUPPORTED, "qemuMigrationParamsEnableTLS"),
    Row("no certificates for QEMU", _INTERNAL, "QEMU's object-add; seen"),
    Row("zero-copy needs .* locked memory", Named("VIR_ERR_SYSTEM_ERROR", _NONE),
        "virProcessSetMaxMemLock; seen"),
    Row("Postcopy is not supported", _INTERNAL, "QEMU's migrate-set-capabilities"),
    Row(".* excludes |this QEMU (accepts multifd with postcopy|refuses the pair)", _INTERNAL,
        "QEMU's migrate-set-capabilities"),
)

#: rules of the option table (options.py RULES) that some libvirt takes without a word, with harm
HARMFUL: tuple[Row, ...] = (
    Row("No compression algorithm selected for parallel migration", _BAD_ARGUMENT,
        "qemuMigrationParamsSetCompression since 9.4; 9.0 sets xbzrle with multifd"),
    Row("Compression method '.*' isn't supported with parallel migration", _BAD_ARGUMENT,
        "qemuMigrationParamsSetCompression since 9.4"),
    Row("migration of non-shared storage is not supported with tunnelled migration", _UNSUPPORTED,
        "qemuMigrationSrcBeginPhase; 9.0 reports it and goes on"),
    Row("Failed to get option 'dname': Option argument is empty", _BAD_ARGUMENT,
        "virCheckNonEmptyStringArg since 9.1; 9.0 starts a guest without a name"),
)
# fmt: on


def harm(error: RequestError) -> Exception | None:
    """The libvirtError for a request that libvirt itself might carry out although it must not; else None."""
    for _, message, _hint in error.problems:
        for row in HARMFUL:
            if re.match(row.words, message):
                return _said(row.name, message)
    return None


def refused(reason: str) -> Named:
    """What libvirt calls this refusal."""
    at = _place(reason)
    return REFUSALS[at].name if at < len(REFUSALS) else _UNSUPPORTED


def _place(reason: str) -> int:
    """Its row in REFUSALS; behind all of them what libvirt does not refuse at all."""
    return next((at for at, row in enumerate(REFUSALS) if re.match(row.words, reason)), len(REFUSALS))


def as_libvirt(error: MigrationError, guest: str) -> Exception:
    """The libvirtError for what virtmig raised before anything had started; `guest` names it for people.

    The reason that libvirt would come to first decides about the code and stands in front; every reason, the way out
    and where the guest is are in the message.
    """
    if isinstance(error, VirtError) and error.code > 0:
        return libvirt_error(error.message, error.code, max(error.domain, 0))
    if isinstance(error, PlanRefused) and error.reasons:
        error = PlanRefused(sorted(error.reasons, key=lambda row: _place(row[1])))
        name = refused(error.reasons[0][1])
    elif isinstance(error, (PlanRefused, DomainXmlError, RequestError)):
        name = _CONFIG
    elif isinstance(error, MigrationAborted):
        name = _ABORTED
    else:
        name = _FAILED
    tail = [error.hint] if error.hint else []
    return _said(name, error.message, *tail, f"nothing was started, {guest} is where it was")


def of_outcome(outcome: Outcome) -> Exception | None:
    """None when the guest has arrived; else the error of libvirt's own call, with where the guest is behind it."""
    if outcome.status is Status.COMPLETED:
        return None
    tail = [outcome.sentence, *([outcome.hint] if outcome.hint else [])]
    if outcome.error_code > 0:
        return libvirt_error(_joined(outcome.error, *tail), outcome.error_code, max(outcome.error_domain, 0))
    name = _ABORTED if outcome.status is Status.ABORTED else _FAILED
    return _said(name, outcome.error or outcome.status.value, *tail)


def broken(error: Exception, guest: str) -> Exception:
    """A defect of virtmig's own: the caller gets an error of the kind that it handles."""
    return _said(_INTERNAL, f"virtmig: {type(error).__name__}: {error}", f"ask both hosts where {guest} runs")


def settings_error(error: MigrationError) -> Exception:
    return _said(_CONFIG, f"virtmig's settings: {error}", *([error.hint] if error.hint else []))


def no_connection(method: str) -> Exception:
    """A managed migration to None, for which the binding of 9.0 crashes."""
    function = "virDomain" + method[:1].upper() + method[1:]
    code, domain = Named("VIR_ERR_INVALID_CONN", _DOMAIN).numbers
    return libvirt_error(f"invalid connection pointer in {function}", code, domain)


def _said(name: Named, reason: str, *tail: str) -> Exception:
    return libvirt_error(_joined(name.say(reason), *tail), *name.numbers)


def _joined(*parts: str) -> str:
    """libvirt's words come first, so that callers who look for them find them."""
    first, *rest = (part.replace("\n", "; ") for part in parts if part)
    return f"{first} ({'; '.join(rest)})" if rest else first
