"""One migration, from request to outcome, top to bottom.

    open both ends -> facts -> plan (or every refusal) -> start -> watch, decide, act -> ask both hosts -> outcome

Nothing is claimed about the guest that a host has not said. Before libvirt's job has started, failures raise
(RequestError, PlanRefused, ConnectionFailed, DomainNotFound); from then on every end is an Outcome that says where
the guest runs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
from tenacity import retry_if_result

from virtmig.attempts import StopRequest, may_try_again, retrying
from virtmig.ends import Ends, check_files, open_ends
from virtmig.engine.agents import Followed
from virtmig.errors import MigrationError, PlanRefused, VirtError
from virtmig.estimate import Estimate
from virtmig.facts import HostFacts
from virtmig.fitting import Fitted, fit
from virtmig.forecast import forecast
from virtmig.link.asking import Carried, Changed, Ended
from virtmig.obstacles import Caution
from virtmig.outlook import Outlook, outlook
from virtmig.plan import Plan, negotiate
from virtmig.policy import Action, Decision, History, Policy, decide
from virtmig.progress import Outcome, PassCounter, Phase, Progress, Status, Whereabouts
from virtmig.relaying import ChannelRates, Relay, find_agents
from virtmig.report.recorder import Recorder
from virtmig.request import MigrationRequest
from virtmig.virt.connection import FENCED_KEEPALIVE
from virtmig.virt.fence import HOLD_FLAG, Fence
from virtmig.virt.job import MigrationJob
from virtmig.virt.parameters import migrate_call
from virtmig.watchers import Behind, Both, Interventions, Silent, Watcher
from virtmig.whereabouts import HostAnswer, Presence, judge, sentence

log = logging.getLogger("virtmig")

SAMPLE_S = 0.2
#: how long hosts may take to settle after the call has ended before what they say counts as the end
SETTLE_S = 8.0


def migrate(
    request: MigrationRequest,
    *,
    source_uri: str | None = None,
    watcher: Watcher | None = None,
    stop: StopRequest | None = None,
) -> Outcome:
    """Migrate as asked, watch it, and say where the guest runs.

    Start failures that may pass are tried again (`--retries`), only while nothing has moved. Raises RequestError,
    PlanRefused, ConnectionFailed, DomainNotFound before anything has started; afterwards returns an Outcome.
    """
    stop = stop or StopRequest()
    check_files(request)
    # each is told of the other's trouble: neither waits for anybody
    recorder = Recorder(warn=lambda text: display.message(text, "warning"))
    display = Behind(watcher or Silent(), warn=lambda text: recorder.message(text, "warning"))
    with open_ends(request, source_uri, stop) as ends, display:
        ends.source_facts, ends.destination_facts = find_agents(request, ends.source_facts, ends.destination_facts)
        plan = negotiate(request, ends.source_facts, ends.destination_facts, ends.guest)
        with _recorded_refusals(recorder, request, plan, ends):
            plan.raise_if_refused()
            _refuse_blind_fence(plan.request, ends)
        fitted = fit(ends.domain, request, source=ends.source.name, destination=ends.destination_name)
        foretold = _outlook(plan, ends) if "estimate" in request else None
        _begin_record(recorder, request, plan, ends, fitted, foretold.estimate if foretold else None)
        display.start(ends.name, ends.source.name, ends.destination_name, plan)
        run = _Run(ends, plan, display, stop, fitted, recorder)
        if foretold is not None:
            way_out = f" -> {foretold.advice}" if foretold.advice else ""
            run.watcher.message(f"forecast: {foretold.words}{way_out}")
        with _recorded_failures(recorder, run):
            outcome: Outcome = retrying(request, stop, retry_if_result(may_try_again))(run.once)
        outcome = msgspec.structs.replace(outcome, report_id=recorder.id)
        run.watcher.finish(outcome)
        return outcome


def _begin_record(
    recorder: Recorder,
    request: MigrationRequest,
    plan: Plan,
    ends: Ends,
    fitted: Fitted | None = None,
    foretold: Estimate | None = None,
) -> None:
    changes = [f"{change}  [{change.rule}]" for change in fitted.changes] if fitted else []
    recorder.begin(request, plan, source=ends.source_facts, destination=ends.destination_facts, guest=ends.guest,
                   changes=changes, estimate=foretold)  # fmt: skip


def _outlook(plan: Plan, ends: Ends) -> Outlook | None:
    return None if plan.refused else outlook(ends.source.connection, ends.domain, plan, ends.guest)


@contextlib.contextmanager
def _recorded_refusals(recorder: Recorder, request: MigrationRequest, plan: Plan, ends: Ends) -> Iterator[None]:
    try:
        yield
    except PlanRefused as error:
        _begin_record(recorder, request, plan, ends)
        recorder.refused(error.reasons)
        raise


@contextlib.contextmanager
def _recorded_failures(recorder: Recorder, run: _Run) -> Iterator[None]:
    """Whatever ends an attempt without an outcome ends the record with its reason: it was not virtmig that died."""
    try:
        yield
    except PlanRefused as error:
        recorder.refused(error.reasons)
        raise
    except BaseException as error:
        with contextlib.suppress(Exception):  # a connection that broke too must not hide why
            recorder.finish(msgspec.structs.replace(run.without_outcome(error), report_id=recorder.id))
        raise


def plan_only(request: MigrationRequest, *, source_uri: str | None = None) -> tuple[Plan, HostFacts, HostFacts]:
    """What `migrate` would do, refusals included, and the facts of both hosts; starts nothing."""
    check_files(request)
    with open_ends(request, source_uri, StopRequest()) as ends:
        ends.source_facts, ends.destination_facts = find_agents(request, ends.source_facts, ends.destination_facts)
        plan = negotiate(request, ends.source_facts, ends.destination_facts, ends.guest)
        fitted = fit(ends.domain, request, source=ends.source.name, destination=ends.destination_name)
        notes = tuple(Caution("xml", f"{change}  [{change.rule}]") for change in fitted.changes)
        if (found := _outlook(plan, ends)) is not None:
            notes += (Caution("forecast", found.words, found.advice),)
        plan = msgspec.structs.replace(plan, notes=plan.notes + notes)
        return plan, ends.source_facts, ends.destination_facts


class _Run:
    """One attempt: start the job, watch it, conclude. The state of an attempt, nothing of the next."""

    def __init__(
        self, ends: Ends, plan: Plan, display: Watcher, stop: StopRequest, fitted: Fitted, recorder: Recorder
    ) -> None:
        self.made_at = time.monotonic()
        self.display = display
        self.watcher = Both(recorder, display)
        self.fitted = fitted
        self.recorder = recorder
        self.rates = ChannelRates()
        self.ends = ends
        self.plan = plan
        self.request = plan.request
        self.stop = stop

    def once(self) -> Outcome:
        self.begun = False
        fenced = "fence" in self.request
        self.relay = self._shake_hands() if self.plan.transport == "relay" else None
        to_libvirt = self.relay.request if self.relay else self.request
        call = self.fitted.into(migrate_call(to_libvirt, extra_flags=HOLD_FLAG if fenced else 0))
        ends = self.ends
        keepalive = FENCED_KEEPALIVE if fenced else None
        self.job = MigrationJob(
            ends.source, ends.destination, ends.uuid, self.request.destination_uri, call, keepalive=keepalive
        )
        self.fence: Fence | None = None
        if fenced and ends.destination is not None:
            start_guest = "suspend" not in self.request and ends.guest.running
            self.fence = Fence(self.job, ends.source, ends.destination, start_guest=start_guest)
        self.policy = Policy.from_request(self.request)
        self.history = History()
        self.passes = PassCounter()
        self.interventions = Interventions(postcopy="postcopy-resume" in self.request)
        self.started = False
        self.events_kept = 0
        self.stops_seen = len(self.stop.requests)
        self.previous_downtime_ms = self._set_downtime_limit()
        try:
            self.job.start()
            self.begun = True
            while not self.job.wait(SAMPLE_S):
                self._turn()
                if self.detached:
                    return self._outcome(Status.DETACHED, *self._ask())
                if self.stop.now and self.job.abort_asked:
                    break
            return self._conclude()
        finally:
            self.job.close()
            if self.relay is not None and self.split:
                self.relay.session.leave()
            elif self.relay is not None and not self.detached:
                self.relay.session.close()

    def _shake_hands(self) -> Relay:
        """Before libvirt is told anything: a refusal of the other host's agent leaves nothing behind."""
        relay = Relay(self.plan, self.ends.guest, self.ends.source_facts, self._agents_say,
                      self.recorder.agents)  # fmt: skip
        self.recorder.agents(relay.agreed)
        self.watcher.message(relay.words)
        for row in relay.agreed.answer.verdicts:
            if row.outcome == "adjusted":
                self.watcher.message(f"--{row.feature}: {row.asked} -> {row.given}: {row.reason}", "warning")
        return relay

    def _agents_say(self, said: Followed) -> None:
        """In the thread that follows the session."""
        self.recorder.agents(said)
        if isinstance(said, Carried):
            self.rates.update(said)
        if isinstance(said, Changed) and said.state == "reconnecting":
            self.watcher.message(
                f"the agents have lost each other ({said.words}); the guest does not notice", "warning"
            )
        elif isinstance(said, Ended) and said.state != "finished":
            self.watcher.message("the agents gave up: " + "; ".join(row.reason for row in said.reasons), "warning")

    # -- watching --------------------------------------------------------------------------------------------------

    begun = False
    started = False
    detached = False
    split = False
    gave_up = ""

    def _keep_events(self) -> None:
        """Of both libvirts; iterations stand in the samples."""
        events = self.job.events[self.events_kept :]
        self.events_kept += len(events)
        for event in events:
            if event.what != "iteration":
                self.recorder.event(event.at, event.host, event.what, event.detail)

    def _turn(self) -> None:
        self._keep_events()
        progress = self.job.sample()
        if progress is not None:
            progress = msgspec.structs.replace(
                progress, full_passes=self.passes.update(progress), channel_bytes_per_s=self.rates.now
            )
            self.started = self.started or bool(progress.processed_bytes)
            for text, what, value in self.interventions.update(progress):
                self.recorder.intervened(text, what, value)
                self.display.message(text)
            decision = decide(self.policy, self.history, progress, time.monotonic())
            self.history.add(progress, decision, time.monotonic())
            self.watcher.sample(progress, forecast(self.history, self.policy))
            self._act(decision)
        if self.fence is not None:
            self.fence.step()
        if progress is not None and progress.phase in (Phase.STORAGE, Phase.PRECOPY) and self.job.destination_lost:
            self._give_up(f"the connection to the libvirt daemon of {self.ends.destination_name} was lost")
        if len(self.stop.requests) > self.stops_seen or (self.stops_seen and not self.job.abort_asked):
            self.stops_seen = len(self.stop.requests)
            self._stop(progress)

    def _act(self, decision: Decision) -> None:
        if not decision.notable:
            return
        self.watcher.decided(decision)
        try:
            match decision.action:
                case Action.SET_DOWNTIME:
                    self.job.set_downtime_limit(int(decision.value or 0))
                case Action.START_POSTCOPY:
                    self.job.start_postcopy()
                case Action.SUSPEND:
                    self.job.suspend()
                case Action.ABORT:
                    self.job.abort()
            self.interventions.ours(decision)
        except VirtError as error:
            self.history.failed(decision)
            self.watcher.message(f"{decision.action.value} was refused: {error}", "warning")

    def _stop(self, progress: Progress | None) -> None:
        """Abort safely. In postcopy an abort would lose the guest: say so and let go of it instead."""
        _, what = self.stop.requests[-1]
        if progress is not None and progress.phase in (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED):
            self._detach(what)
            return
        try:
            first = not self.job.abort_asked
            self.job.abort()
            if first:
                self.watcher.message(f"{what}: aborting; the guest stays on {self.ends.source.name}")
        except VirtError as error:
            if "post-copy" in error.message:
                self._detach(what)
            else:  # no job yet, or no job any more: asked again on the next turn, and the end tells
                log.debug("abort: %s", error)
                self.job.abort_asked = False

    def _give_up(self, why: str) -> None:
        """Abort for a reason of our own: the outcome is a failure, not somebody's wish."""
        if not self.gave_up:
            self.watcher.message(f"{why}: aborting; the guest stays on {self.ends.source.name}", "warning")
            self.gave_up = why
            with contextlib.suppress(VirtError):
                self.job.abort()

    def _detach(self, what: str) -> None:
        self.watcher.message(
            f"{what}: the guest already runs on {self.ends.destination_name} and needs the rest of its memory from "
            f"{self.ends.source.name}; aborting now would lose it. The migration goes on without this command; "
            f"watch it with: virtmig watch {self.ends.name}",
            "warning",
        )
        self.detached = True

    # -- the end ---------------------------------------------------------------------------------------------------

    def _conclude(self) -> Outcome:
        error = self.job.error if self.job.finished else None
        hint = ""
        if self.fence is not None:
            if error is None and self.job.finished:
                self._open_fence()
            elif error is not None:
                hint = self.fence.remove_held_copy()
        source, destination = self._ask_until_settled()
        self._keep_events()
        place = judge(source, destination, call_succeeded=self.job.finished and error is None)
        self.split = place is Whereabouts.SPLIT
        if self.fence is not None and place is Whereabouts.UNKNOWN and source.presence is Presence.RUNNING:
            place = Whereabouts.SOURCE  # a copy held by the fence cannot have started by itself
        if place is Whereabouts.UNKNOWN and source.presence is Presence.RUNNING and self._never_handed_over():
            place = Whereabouts.SOURCE
        if place is Whereabouts.SOURCE and self.previous_downtime_ms is not None:
            with contextlib.suppress(VirtError):
                self.job.set_downtime_limit(self.previous_downtime_ms)
        return self._outcome(self._status(place), source, destination, place=place, error=error, hint=hint)

    def _never_handed_over(self) -> bool:
        """The agents have held back the word that lets a destination start: its silence leaves nothing open."""
        return self.relay is not None and self.relay.session.kept_by_source(SETTLE_S)

    def _open_fence(self) -> None:
        assert self.fence is not None
        deadline = time.monotonic() + SETTLE_S
        while self.fence.start_guest and not self.fence.opened and time.monotonic() < deadline:
            self.fence.step()
            if not self.fence.opened:
                time.sleep(0.05)

    def _status(self, place: Whereabouts) -> Status:
        if place in (Whereabouts.DOUBLED, Whereabouts.LOST, Whereabouts.NEITHER):
            return Status.COMPLETED if self._offline_done() else Status.FAILED
        if self.job.finished and self.job.error is None:
            return Status.COMPLETED
        if place is Whereabouts.DESTINATION:
            return Status.COMPLETED  # the call failed, yet the guest has arrived: the hosts' word counts
        if place is Whereabouts.SPLIT:
            return Status.INTERRUPTED
        if place is Whereabouts.SOURCE and not self.gave_up and (self.job.abort_asked or self._aborted_elsewhere()):
            return Status.ABORTED
        return Status.FAILED

    def _offline_done(self) -> bool:
        return "offline" in self.request and self.job.finished and self.job.error is None

    def _aborted_elsewhere(self) -> bool:
        return self.job.error is not None and self.job.error.code == 78  # VIR_ERR_OPERATION_ABORTED

    def _ask(self) -> tuple[HostAnswer, HostAnswer]:
        ends = self.ends
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="virtmig-ask") as pool:
            mine = pool.submit(ends.source.ask, ends.uuid, incoming=False)
            if ends.destination is None:
                return mine.result(), HostAnswer(ends.destination_name, Presence.NO_ANSWER, "not reachable from here")
            theirs = pool.submit(ends.destination.ask, ends.uuid, incoming=True)
            return mine.result(), theirs.result()

    def _ask_until_settled(self) -> tuple[HostAnswer, HostAnswer]:
        """Both answers, asked again while a host is still cleaning up (a copy that leaves or arrives)."""
        deadline = time.monotonic() + SETTLE_S
        passing = (Presence.LEAVING, Presence.INCOMING)
        while True:
            source, destination = self._ask()
            settled = source.presence not in passing and destination.presence not in passing
            if settled or self.stop.now or time.monotonic() > deadline:
                return source, destination
            time.sleep(0.1)

    def _outcome(
        self,
        status: Status,
        source: HostAnswer,
        destination: HostAnswer,
        *,
        place: Whereabouts | None = None,
        error: VirtError | None = None,
        hint: str = "",
    ) -> Outcome:
        job, ends = self.job, self.ends
        if place is None:
            place = judge(source, destination)
        completed = job.completed
        return Outcome(
            status=status,
            guest=place,
            domain=ends.name,
            source=source.name,
            destination=destination.name,
            sentence=self._sentence(place, source, destination),
            elapsed_s=time.monotonic() - job.started_at,
            downtime_ms=completed.get("downtime"),
            observed_downtime_ms=job.observed_downtime_ms(),
            total_bytes=completed.get("data_total"),
            processed_bytes=completed.get("data_processed"),
            iterations=completed.get("memory_iteration"),
            actions=tuple(f"{decision.action.value}: {decision.reason}" for decision in self.history.taken),
            error=self.gave_up or (error.message if error else ""),
            error_code=error.code if error else -1,
            error_domain=error.domain if error else -1,
            hint=hint or self._hint(place, detached=status is Status.DETACHED),
            started=self.started,
        )

    def without_outcome(self, error: BaseException) -> Outcome:
        """For the record alone, where an error ended it: `begun` tells whether libvirt's job may go on without us."""
        ends, known = self.ends, error if isinstance(error, MigrationError) else None
        place = Whereabouts.SPLIT if "postcopy-resume" in self.request else Whereabouts.SOURCE
        words = f"nothing was started; {ends.name} is where it was"
        if self.begun:
            place = Whereabouts.UNKNOWN
            words = f"the migration of {ends.name} may go on without virtmig; both hosts can tell where the guest is"
        place = known.guest if known is not None and known.guest is not None else place
        return Outcome(
            status=Status.FAILED,
            guest=place,
            domain=ends.name,
            source=ends.source.name,
            destination=ends.destination_name,
            sentence=words,
            elapsed_s=time.monotonic() - self.made_at,
            error=known.message if known is not None else f"{type(error).__name__}: {error}",
            error_code=error.code if isinstance(error, VirtError) else -1,
            error_domain=error.domain if isinstance(error, VirtError) else -1,
            hint=(known.hint if known is not None else "") or self._hint(place),
            started=self.started,
        )

    def _sentence(self, place: Whereabouts, source: HostAnswer, destination: HostAnswer) -> str:
        name = self.request.text("dname") or self.ends.name
        if "offline" in self.request:
            if self._offline_done():
                return f"the definition of {name} is now on {destination.name}; it does not run"
            return f"the definition of {name} is still on {source.name}; it does not run"
        if self.fence is not None and place is Whereabouts.SOURCE and destination.presence is Presence.NO_ANSWER:
            return f"{name} still runs on {source.name}; its copy on {destination.name} is held by the fence"
        return sentence(name, place, source, destination)

    def _hint(self, place: Whereabouts, *, detached: bool = False) -> str:
        name = self.ends.name
        if detached:  # nothing is broken: it goes on
            return f"virtmig -c '{self.ends.source.full_uri()}' watch {name}"
        mine, theirs = f"virsh -c '{self.ends.source.full_uri()}'", f"virsh -c '{self.request.destination_uri}'"
        match place:
            case Whereabouts.SPLIT:
                again = self.request.replace(live=True, postcopy=True, postcopy_resume=True)
                return again.virtmig_line(self.ends.source.full_uri())
            case Whereabouts.DOUBLED:
                return (
                    f"both write to the same disks; stop one at once: {mine} destroy {name}, or {theirs} destroy {name}"
                )
            case Whereabouts.UNKNOWN:
                return f"before anything is resumed or started: {mine} domstate {name}; {theirs} domstate {name}"
            case Whereabouts.LOST:
                return f"{mine} destroy {name}; {theirs} destroy {name}; then start it anew on one of them"
        return ""

    def _set_downtime_limit(self) -> int | None:
        """Set --max-downtime before the start; the limit that was there before, to be put back after a failure."""
        before = self.job.read_downtime_limit() if self.ends.guest.running else None
        wanted = self.request.number("max-downtime")
        if wanted is None or not self.ends.guest.running:
            return None
        self.job.set_downtime_limit(wanted)
        return before


def _refuse_blind_fence(request: MigrationRequest, ends: Ends) -> None:
    if "fence" in request and ends.destination is None:
        raise PlanRefused(
            [("fence", "the fence needs to reach the destination itself, and only the source can",
              f"run it where {request.destination_uri} can be opened, or leave out --fence")]
        )  # fmt: skip
