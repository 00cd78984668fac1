"""Every exception virtmig raises. Each one says where the guest is, what to try, and whether trying again can help.

    MigrationError                 .guest (Whereabouts)  .hint  .retryable
      RequestError                 what was asked cannot be: bad option, conflict; .option .problems
      PlanRefused                  .reasons: all of them, each with its way out
      LabError                     the two-host lab could not do what was asked
      ProtocolError                bytes on a channel broke the rules; .channel .offset
        RemoteProtocolError        the peer broke them
        LocalProtocolError         we would have broken them
      ChannelError                 refused, closed, timed out, unidentified
      GuestMemoryError             unknown address, page out of range, userfaultfd not available
      ImageError                   a folder is no image of a guest, a damaged one, or cannot be made
      DomainXmlError               missing element, guest ABI changed; .differences
      VirtError                    wraps libvirtError, keeps its .code and .domain
        ConnectionFailed           a libvirt connection could not be opened, or broke
        DomainNotFound             no such domain at that host
        MigrationFailed            the job ended without success; .guest tells where the guest is
        PostcopyInterrupted        the guest is split, recoverable; the hint is the command that recovers it
        GuestDoubled               the same guest runs on both hosts; the hint says what to do at once
      MigrationAborted             asked to stop; the guest runs on the source

Data in the exception, words in __str__: the text is made from the attributes, so that JSON output and the
terminal never tell two stories.
"""

from __future__ import annotations

from collections.abc import Sequence

from virtmig.progress import Whereabouts


class MigrationError(Exception):
    """The root. `message` is one sentence without a final full stop; `hint` is what the person can do about it."""

    default_guest: Whereabouts | None = None

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        guest: Whereabouts | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.guest = guest if guest is not None else self.default_guest
        self.retryable = retryable
        self.exit_status = 1

    def __str__(self) -> str:
        return self.message


class RequestError(MigrationError):
    """What was asked cannot be. Raised before any connection is opened; nothing was touched."""

    default_guest = Whereabouts.SOURCE

    def __init__(self, message: str, *, option: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.option = option
        #: every problem found, as (option, message, way out); the message above joins them line by line
        self.problems: tuple[tuple[str, str, str], ...] = ((option, message, hint),)


class PlanRefused(MigrationError):
    """The two hosts cannot do what was asked. `reasons` are all refusals as (feature, reason, way out)."""

    default_guest = Whereabouts.SOURCE

    def __init__(self, reasons: Sequence[tuple[str, str, str]]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("; ".join(reason for _, reason, _ in self.reasons) or "the plan was refused")
        self.hint = "; or ".join(dict.fromkeys(way_out for _, _, way_out in self.reasons if way_out))


class LabError(MigrationError):
    """The two-host lab could not do what was asked (no rights, a missing binary, a daemon that did not start)."""


class ProtocolError(MigrationError):
    """Bytes on a channel broke the rules. `offset` counts bytes from the start of that channel's stream."""

    def __init__(self, message: str, *, channel: str = "", offset: int | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.channel = channel
        self.offset = offset


class RemoteProtocolError(ProtocolError):
    """The peer broke the rules."""


class LocalProtocolError(ProtocolError):
    """We were about to break the rules."""


class ChannelError(MigrationError):
    """A channel was refused, closed, timed out, or could not be identified."""


class GuestMemoryError(MigrationError):
    """An address outside the guest, a page out of range, or no userfaultfd on this host."""


class ImageError(MigrationError):
    """A folder is no image of a guest, or a damaged one, or cannot be made."""


class DomainXmlError(MigrationError):
    """A domain XML lacks what is needed, or what the guest sees would change; `differences` lists each."""

    default_guest = Whereabouts.SOURCE

    def __init__(self, message: str, *, differences: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.differences = tuple(differences)


class VirtError(MigrationError):
    """libvirt said no. `code` and `domain` are libvirtError's numbers (VIR_ERR_*, VIR_FROM_*), -1 when unknown."""

    def __init__(
        self,
        message: str,
        *,
        code: int = -1,
        domain: int = -1,
        hint: str = "",
        guest: Whereabouts | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message, hint=hint, guest=guest, retryable=retryable)
        self.code = code
        self.domain = domain


class ConnectionFailed(VirtError):
    """A connection to a libvirt daemon could not be opened, or broke; `uri` names it."""

    def __init__(self, message: str, *, uri: str = "", code: int = -1, domain: int = -1, hint: str = "") -> None:
        super().__init__(message, code=code, domain=domain, hint=hint, retryable=True)
        self.uri = uri


class DomainNotFound(VirtError):
    """No domain of that name, id or UUID at that host."""


class MigrationAborted(MigrationError):
    """Asked to stop, and stopped: the guest runs on the source as before."""

    default_guest = Whereabouts.SOURCE


class MigrationFailed(VirtError):
    """The job ended without success. `guest` is where the guest was found afterwards, by asking both hosts."""


class PostcopyInterrupted(VirtError):
    """A broken postcopy: the guest is split between the hosts and can be recovered; the hint is the command."""

    default_guest = Whereabouts.SPLIT


class GuestDoubled(VirtError):
    """The same guest runs on both hosts. Never continue quietly after this."""

    default_guest = Whereabouts.DOUBLED
