"""The fence: the destination stays paused until the source is known to be stopped.

libvirt alone resumes the source when the destination's last reply is lost, and a destination daemon that was only
frozen starts its copy later: two copies run. With the fence libvirt is told to leave the destination paused
(VIR_MIGRATE_PAUSED); only we start it, and only after the source has said that its copy is gone. Whatever hangs, at
most one copy can run. The price is downtime: the guest waits for the source's last step and one round trip more.
"""

from __future__ import annotations

import logging

import libvirt

from virtmig.errors import VirtError
from virtmig.virt.connection import translated
from virtmig.virt.hosts import Host, NoAnswerError, answer_within
from virtmig.virt.job import MigrationJob
from virtmig.whereabouts import Presence

log = logging.getLogger("virtmig.virt")

#: what libvirt is told so that the destination stays paused
HOLD_FLAG = int(libvirt.VIR_MIGRATE_PAUSED)


class Fence:
    """Watches one job. `step()` is called on every turn of the loop and after the call has ended."""

    def __init__(self, job: MigrationJob, source: Host, destination: Host, *, start_guest: bool) -> None:
        self.job = job
        self.source = source
        self.destination = destination
        self.start_guest = start_guest
        self.opened = False

    def step(self) -> None:
        """Start the guest on the destination as soon as the source has said that it is gone there."""
        if self.opened or not self.start_guest or not self._source_may_be_gone():
            return
        answer = self.source.ask(self.job.uuid, incoming=False)
        if answer.presence not in (Presence.ABSENT, Presence.SHUT_OFF):
            return
        try:
            answer_within(10.0, self._resume_destination, "virtmig-fence")
        except NoAnswerError as error:
            log.warning("the destination did not answer when its guest was to be started: %s", error)
        except VirtError as error:
            log.warning("the guest on the destination could not be started yet: %s", error)

    def remove_held_copy(self) -> str:
        """After a failure: destroy the paused copy on the destination, once the source is known to run its own.

        Returns what is left to be done by a person, empty when nothing is. A copy that runs is never touched.
        """
        mine = self.source.ask(self.job.uuid, incoming=False)
        there = self.destination.ask(self.job.uuid, incoming=True)
        if there.presence in (Presence.ABSENT, Presence.SHUT_OFF):
            return ""
        command = f"virsh -c '{self.destination.uri}' destroy {self.job.uuid}"
        if there.presence is Presence.NO_ANSWER:
            return f"when {there.name} is back, a paused copy may be left there; remove it with: {command}"
        if mine.presence is Presence.RUNNING and there.presence in (Presence.PAUSED, Presence.INCOMING):
            try:
                answer_within(10.0, self._destroy_destination, "virtmig-fence")
            except (NoAnswerError, VirtError) as error:
                return f"a paused copy is left on {there.name} ({error}); remove it with: {command}"
        return ""

    def _source_may_be_gone(self) -> bool:
        if self.job.finished:
            return self.job.error is None
        return self.job.saw("source", "stopped", libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED) is not None

    def _resume_destination(self) -> None:
        with translated():
            domain = self.destination.find(self.job.uuid)
            if domain is None:
                raise VirtError("the destination does not know the domain")
            if domain.state(0)[0] == libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()
            self.opened = True

    def _destroy_destination(self) -> None:
        with translated():
            domain = self.destination.find(self.job.uuid)
            # between the question and this line nobody but a person can have resumed it: look once more
            if domain is not None and domain.state(0)[0] == libvirt.VIR_DOMAIN_PAUSED:
                domain.destroy()
