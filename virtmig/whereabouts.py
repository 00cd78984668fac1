"""Where the guest is, judged from what both hosts say. A lost or late reply is never taken for a no.

Each host is asked for the domain by UUID and answers with one Presence, NO_ANSWER included. The table below says
what each pair means; a pair that is not in it is UNKNOWN, never a guess.
"""

from __future__ import annotations

import enum

import msgspec

from virtmig.progress import Whereabouts


class Presence(enum.StrEnum):
    """What one host says about the domain. The numbers of libvirt's states are read in virt/hosts.py."""

    ABSENT = "absent"  # the host answered: it does not know the domain
    SHUT_OFF = "shut off"  # it knows a definition, nothing runs
    RUNNING = "running"
    PAUSED = "paused"
    INCOMING = "incoming"  # paused, being migrated to this host
    LEAVING = "leaving"  # stopped by the switchover, being migrated away
    POSTCOPY = "postcopy"  # source: stopped for good, serving pages; destination: running, asking for pages
    POSTCOPY_FAILED = "postcopy failed"
    NO_ANSWER = "no answer"


class HostAnswer(msgspec.Struct, frozen=True):
    """One host's answer. `name` is the host's name for people; `detail` says why there was no answer."""

    name: str
    presence: Presence
    detail: str = ""

    @property
    def active(self) -> bool:
        return self.presence not in (Presence.ABSENT, Presence.SHUT_OFF, Presence.NO_ANSWER)


_GONE = (Presence.ABSENT, Presence.SHUT_OFF)
_STOPPED = (Presence.PAUSED, Presence.LEAVING)

#: (what the source says, what the destination says) -> where the guest is
TABLE: dict[tuple[Presence, Presence], Whereabouts] = {
    # the source runs it; a copy on the destination that is not running is no second guest
    (Presence.RUNNING, Presence.ABSENT): Whereabouts.SOURCE,
    (Presence.RUNNING, Presence.SHUT_OFF): Whereabouts.SOURCE,
    (Presence.RUNNING, Presence.INCOMING): Whereabouts.SOURCE,
    (Presence.RUNNING, Presence.PAUSED): Whereabouts.SOURCE,
    (Presence.RUNNING, Presence.RUNNING): Whereabouts.DOUBLED,
    (Presence.RUNNING, Presence.POSTCOPY): Whereabouts.DOUBLED,
    (Presence.RUNNING, Presence.POSTCOPY_FAILED): Whereabouts.DOUBLED,
    # the source runs it, but the destination may have started it as well
    (Presence.RUNNING, Presence.NO_ANSWER): Whereabouts.UNKNOWN,
    # stopped on the source
    **{(stopped, gone): Whereabouts.SOURCE for stopped in _STOPPED for gone in _GONE},
    **{(stopped, Presence.INCOMING): Whereabouts.SOURCE for stopped in _STOPPED},
    **{(stopped, Presence.RUNNING): Whereabouts.DESTINATION for stopped in _STOPPED},
    # handed over but started on neither host: nobody may guess
    **{(stopped, Presence.PAUSED): Whereabouts.UNKNOWN for stopped in _STOPPED},
    **{(stopped, Presence.NO_ANSWER): Whereabouts.UNKNOWN for stopped in _STOPPED},
    # gone from the source
    **{(gone, Presence.RUNNING): Whereabouts.DESTINATION for gone in _GONE},
    **{(gone, Presence.PAUSED): Whereabouts.DESTINATION for gone in _GONE},
    **{(gone, Presence.INCOMING): Whereabouts.UNKNOWN for gone in _GONE},
    **{(gone, there): Whereabouts.NEITHER for gone in _GONE for there in _GONE},
    **{(gone, Presence.NO_ANSWER): Whereabouts.UNKNOWN for gone in _GONE},
    **{(gone, Presence.POSTCOPY_FAILED): Whereabouts.LOST for gone in _GONE},
    # the last moment of a postcopy: the source is done and gone, the destination has not said "running" yet
    **{(gone, Presence.POSTCOPY): Whereabouts.DESTINATION for gone in _GONE},
    # postcopy: CPUs there, memory on both
    (Presence.POSTCOPY, Presence.POSTCOPY): Whereabouts.SPLIT,
    (Presence.POSTCOPY, Presence.RUNNING): Whereabouts.SPLIT,
    (Presence.POSTCOPY, Presence.INCOMING): Whereabouts.SPLIT,
    (Presence.POSTCOPY, Presence.POSTCOPY_FAILED): Whereabouts.SPLIT,
    (Presence.POSTCOPY, Presence.NO_ANSWER): Whereabouts.SPLIT,
    (Presence.POSTCOPY_FAILED, Presence.POSTCOPY): Whereabouts.SPLIT,
    (Presence.POSTCOPY_FAILED, Presence.RUNNING): Whereabouts.SPLIT,
    (Presence.POSTCOPY_FAILED, Presence.POSTCOPY_FAILED): Whereabouts.SPLIT,
    (Presence.POSTCOPY_FAILED, Presence.NO_ANSWER): Whereabouts.SPLIT,
    **{(Presence.LEAVING, there): Whereabouts.SPLIT for there in (Presence.POSTCOPY, Presence.POSTCOPY_FAILED)},
    **{(broken, gone): Whereabouts.LOST
       for broken in (Presence.POSTCOPY, Presence.POSTCOPY_FAILED) for gone in _GONE},
    # the source does not answer
    (Presence.NO_ANSWER, Presence.RUNNING): Whereabouts.UNKNOWN,
    (Presence.NO_ANSWER, Presence.POSTCOPY): Whereabouts.SPLIT,
    (Presence.NO_ANSWER, Presence.POSTCOPY_FAILED): Whereabouts.SPLIT,
}  # fmt: skip


def judge(source: HostAnswer, destination: HostAnswer, *, call_succeeded: bool = False) -> Whereabouts:
    """Where the guest is. `call_succeeded` (libvirt's migrate call returned success) settles what silence leaves open:
    libvirt returns success only after the destination confirmed the guest and the source let go of it.
    """
    place = TABLE.get((source.presence, destination.presence), Whereabouts.UNKNOWN)
    if place is Whereabouts.UNKNOWN and call_succeeded:
        if destination.presence is Presence.NO_ANSWER and source.presence in (*_GONE, Presence.NO_ANSWER):
            return Whereabouts.DESTINATION
        if source.presence is Presence.NO_ANSWER and destination.active:
            return Whereabouts.DESTINATION
    return place


def sentence(domain: str, place: Whereabouts, source: HostAnswer, destination: HostAnswer) -> str:
    """One sentence for people: where the guest runs now."""
    paused_there = destination.presence is Presence.PAUSED
    match place:
        case Whereabouts.SOURCE if source.presence is Presence.RUNNING:
            return f"{domain} still runs on {source.name}, unchanged"
        case Whereabouts.SOURCE:
            return f"{domain} is still on {source.name}, paused"
        case Whereabouts.DESTINATION if paused_there:
            return f"{domain} is now on {destination.name}, paused"
        case Whereabouts.DESTINATION:
            return f"{domain} now runs on {destination.name}"
        case Whereabouts.SPLIT:
            return f"{domain} runs on {destination.name}, part of its memory is still on {source.name}"
        case Whereabouts.DOUBLED:
            return f"DANGER: {domain} runs on both {source.name} and {destination.name}"
        case Whereabouts.NEITHER:
            return f"{domain} runs on neither {source.name} nor {destination.name}"
        case Whereabouts.LOST:
            return (
                f"{domain} lost its newest memory: {source.name} says {source.presence.value}, "
                f"{destination.name} says {destination.presence.value}; what is left must not be resumed"
            )
    said = [
        f"{answer.name} did not answer{f' ({answer.detail})' if answer.detail else ''}"
        if answer.presence is Presence.NO_ANSWER
        else f"{answer.name} says {answer.presence.value}"
        for answer in (source, destination)
    ]
    return f"where {domain} runs is not certain: {said[0]}; {said[1]}"
