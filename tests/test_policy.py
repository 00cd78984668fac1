from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.curves import MIB, PaperMigration, play, recorded
from virtmig.policy import DOWNTIME_STEPS, TERMINAL, Action, Decision, History, Policy, decide, stall
from virtmig.progress import PassBoundary, Phase, Progress
from virtmig.request import MigrationRequest

STUBBORN = {"dirty": 3000, "hot": 2000}
VERY = {"domain": "web01", "desturi": "qemu+ssh://host-b/system", "live": True}


def actions(said: list[Decision]) -> list[Action]:
    return [decision.action for decision in said]


def sample(now: float = 1.0, **fields: object) -> Progress:
    values = {
        "elapsed_s": now,
        "phase": Phase.PRECOPY,
        "total_bytes": 4096 * MIB,
        "remaining_bytes": 1024 * MIB,
        "memory_total_bytes": 4096 * MIB,
        "memory_remaining_bytes": 1024 * MIB,
        **fields,
    }
    return msgspec.convert(values, Progress)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_options", "expected"),
    [
        ({}, Policy()),
        ({"timeout": 30}, Policy(timeout_s=30, timeout_action=Action.SUSPEND)),
        ({"timeout": 30, "timeout-suspend": True}, Policy(timeout_s=30, timeout_action=Action.SUSPEND)),
        ({"timeout": 31, "timeout-abort": True}, Policy(timeout_s=31, timeout_action=Action.ABORT)),
        (
            {"timeout": 32, "timeout-postcopy": True, "postcopy": True},
            Policy(timeout_s=32, timeout_action=Action.START_POSTCOPY, postcopy_allowed=True),
        ),
        (
            {"postcopy": True, "postcopy-after-precopy": True},
            Policy(postcopy_allowed=True, postcopy_after_passes=1),
        ),
        (
            {"postcopy": True, "postcopy-after-precopy": True, "postcopy-after-passes": 4},
            Policy(postcopy_allowed=True, postcopy_after_passes=4),
        ),
        (
            {"on-stall": "suspend", "stall-passes": 5, "max-downtime": 444, "max-downtime-ceiling": 999},
            Policy(on_stall="suspend", stall_passes=5, max_downtime_ms=444, max_downtime_ceiling_ms=999),
        ),
    ],
)
def test_the_request_becomes_a_policy(given_options: dict, expected: Policy) -> None:
    assert Policy.from_request(MigrationRequest({**VERY, **given_options})) == expected


# -- timeouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [Action.SUSPEND, Action.ABORT, Action.START_POSTCOPY])
def test_timeout(action: Action) -> None:
    policy = Policy(timeout_s=7, timeout_action=action, postcopy_allowed=True, on_stall="continue", stall_passes=900)
    migration = PaperMigration(**STUBBORN)
    history, said = play(migration, policy)
    assert actions(said) == [action]
    assert "--timeout 7 is over" in said[0].reason
    if action is not Action.ABORT:
        assert migration.phase is Phase.COMPLETED
    assert history.samples[-1].elapsed_s > 7


def test_the_timeout_starts_when_data_moves_not_when_the_destination_is_prepared() -> None:
    policy, history = Policy(timeout_s=10), History()
    preparing = Progress(elapsed_s=20.0, phase=Phase.PREPARING, total_bytes=0)
    for now in (0.0, 20.0):
        decision = decide(policy, history, preparing, now)
        assert decision.action is Action.CONTINUE
        history.add(preparing, decision, now)
    history.add(sample(21.0), decide(policy, history, sample(21.0), 21.0), 21.0)
    assert history.moving_since == 21.0
    assert decide(policy, history, sample(30.9), 30.9).action is Action.CONTINUE
    assert decide(policy, history, sample(31.0), 31.0).action is Action.SUSPEND


def test_the_clock_may_begin_anywhere() -> None:
    policy, history = Policy(timeout_s=10), History()
    history.add(sample(0.2), decide(policy, history, sample(0.2), 777_000.0), 777_000.0)
    assert decide(policy, history, sample(9.0), 777_009.9).action is Action.CONTINUE
    assert decide(policy, history, sample(10.5), 777_010.0).action is Action.SUSPEND


def test_timeout_in_a_storage_copy_suspends_but_waits_with_postcopy() -> None:
    """virsh suspends in any phase; QEMU takes the switch to postcopy only while memory moves."""
    storage = sample(50.0, phase=Phase.STORAGE, memory_total_bytes=None, memory_remaining_bytes=None)
    for action, expected in ((Action.SUSPEND, Action.SUSPEND), (Action.START_POSTCOPY, Action.CONTINUE)):
        policy, history = Policy(timeout_s=10, timeout_action=action, postcopy_allowed=True), History()
        history.moving_since = 0.0
        assert decide(policy, history, storage, 50.0).action is expected
        assert decide(policy, history, sample(50.0), 50.0).action is action


# -- postcopy after passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", ["pass", "100ms"])
@pytest.mark.parametrize("passes", [1, 3])
def test_postcopy_after_passes(sync: str, passes: int) -> None:
    migration = PaperMigration(sync=sync, **STUBBORN)
    policy = Policy(postcopy_allowed=True, postcopy_after_passes=passes, on_stall="continue", stall_passes=900)
    _, said = play(migration, policy, every_s=0.1)
    assert actions(said) == [Action.START_POSTCOPY]
    assert said[0].reason.startswith(f"{passes} full pass")
    assert migration.phase is Phase.COMPLETED
    assert migration.true_passes >= passes


def test_qemu_11_does_not_switch_at_its_second_iteration() -> None:
    migration = PaperMigration(sync="100ms", dirty=500)
    policy, history = Policy(postcopy_allowed=True, postcopy_after_passes=1), History()
    for progress in migration.samples(every_s=0.1, until_s=3.5):
        assert decide(policy, history, progress, progress.elapsed_s).action is Action.CONTINUE
        history.add(progress, decide(policy, history, progress, progress.elapsed_s), progress.elapsed_s)
    assert migration.iterations > 30


def test_the_number_of_passes_may_come_with_the_sample() -> None:
    """Who samples may count too; the larger number counts."""
    policy = Policy(postcopy_allowed=True, postcopy_after_passes=2)
    assert decide(policy, History(), sample(full_passes=1), 1.0).action is Action.CONTINUE
    assert decide(policy, History(), sample(full_passes=2), 1.0).action is Action.START_POSTCOPY


# -- convergence -------------------------------------------------------------------------------------------------------


def boundaries(*remaining_mib: float, throttle: tuple[int | None, ...] = ()) -> list[PassBoundary]:
    found, elapsed_s, sent = [], 0.0, 0
    for number, mib in enumerate(remaining_mib):
        found.append(
            PassBoundary(
                full_passes=number,
                elapsed_s=elapsed_s,
                remaining_bytes=int(mib * MIB),
                sent_bytes=sent,
                throttle_percent=throttle[number] if throttle else None,
            )
        )
        elapsed_s, sent = elapsed_s + mib / 100, sent + int(mib * MIB)  # 100 MiB/s
    return found


@pytest.mark.parametrize(
    ("curve", "stalls"),
    [
        ((1000, 800, 800, 800, 800), True),
        ((1000, 800, 900, 1000, 900), True),
        ((1000, 800, 640, 512, 410), False),
        ((1000, 970, 941, 913, 886), False),  # slowly, but falling
        ((1000, 990, 985, 981, 982), True),  # by less than 2 % in three passes
        ((500, 1000, 600, 1000, 600), False),  # a saw-tooth seen from its peak: not yet
        ((500, 600, 1000, 600, 1000), True),  # from its valley
        ((1000, 600, 800, 480, 640), False),  # a saw-tooth that falls
        ((1000, 800, 800), False),  # too few passes
    ],
)
def test_convergence_compares_pass_boundaries(curve: tuple[float, ...], stalls: bool) -> None:
    assert (stall(boundaries(*curve), sample(), 3) is not None) is stalls


def test_a_saw_tooth_that_never_falls_is_noticed_within_a_tooth() -> None:
    curve = [1000, 600, 800] * 5
    first = next(n for n in range(2, len(curve)) if stall(boundaries(*curve[:n]), sample(), 3))
    assert first <= 4 + 3


def test_the_stall_names_its_numbers() -> None:
    reason = stall(boundaries(1000, 800, 800, 810, 820), sample(dirty_bytes_per_s=120 * MIB), 3)
    assert reason == (
        "memory does not converge: 800 MiB remained after pass 1 and never less than 800 MiB in the 3 full passes "
        "since; the guest writes 120 MiB/s, 100 MiB/s are sent"
    )


def test_a_guest_that_has_calmed_down_gets_its_chance() -> None:
    curve = boundaries(1000, 800, 800, 810, 820)
    assert stall(curve, sample(dirty_bytes_per_s=50 * MIB), 3) is None
    assert stall(curve, sample(dirty_bytes_per_s=95 * MIB), 3) is not None, "a hot set is measured near the rate sent"


def test_compressed_bytes_on_the_wire_are_not_the_rate_memory_goes_over() -> None:
    """Passes go over 100 MiB/s of guest memory in 20 MiB/s on the wire: a guest writing 50 MiB/s is behind."""
    curve = boundaries(1000, 800, 800, 810, 820)
    assert stall(curve, sample(dirty_bytes_per_s=50 * MIB, memory_bytes_per_s=20 * MIB), 3) is None


def test_auto_converge_is_waited_for_while_it_takes_more() -> None:
    rising = boundaries(1000, 800, 800, 800, 800, throttle=(None, 20, 30, 40, 50))
    assert stall(rising, sample(throttle_percent=60), 3) is None
    flat = boundaries(1000, 800, 800, 800, 800, throttle=(None, 99, 99, 99, 99))
    assert stall(flat, sample(throttle_percent=99), 3) is not None


def test_storage_copies_have_no_convergence_test() -> None:
    assert stall(boundaries(1000, 800, 800, 800, 800), sample(phase=Phase.STORAGE), 3) is None


@pytest.mark.parametrize("sync", ["pass", "100ms"])
@pytest.mark.parametrize("guest", [{"dirty": 3000, "hot": 600}, {"dirty": 3000, "hot": 2000}, {"dirty": 1300}])
def test_a_guest_that_never_ends_is_noticed(guest: dict, sync: str) -> None:
    migration = PaperMigration(sync=sync, **guest)
    history, said = play(migration, Policy())
    assert actions(said) == [Action.CONTINUE], "said once"
    assert "nothing else was allowed" in said[0].reason
    assert migration.phase is Phase.PRECOPY
    assert history.taken == said


@pytest.mark.parametrize("sync", ["pass", "100ms"])
@pytest.mark.parametrize("every_s", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("guest", [{"dirty": 3000, "hot": 600}, {"dirty": 3000, "hot": 2000}, {"dirty": 1300}])
def test_it_is_noticed_soon(guest: dict, sync: str, every_s: float) -> None:
    migration = PaperMigration(sync=sync, **guest)
    _, said = play(migration, Policy(on_stall="abort"), every_s=every_s)
    assert actions(said) == [Action.ABORT]
    assert 3 <= migration.true_passes <= 13


@pytest.mark.parametrize("sync", ["pass", "100ms"])
@pytest.mark.parametrize("dirty", [0, 100, 512, 800, 900])
@pytest.mark.parametrize("every_s", [0.1, 0.2, 0.5])
def test_a_guest_that_converges_is_left_alone(dirty: int, sync: str, every_s: float) -> None:
    migration = PaperMigration(sync=sync, dirty=dirty)
    _, said = play(migration, Policy(on_stall="abort"), every_s=every_s)
    assert said == []
    assert migration.phase is Phase.COMPLETED


def test_a_busy_hour_after_a_quiet_one_is_not_held_against_the_guest() -> None:
    """Bursts: remaining rises, then falls again; Nova's low-water mark called this stalled."""
    migration = PaperMigration(dirty=lambda now: 1500 if 5 < now < 9 else 400, limit_ms=50)
    _, said = play(migration, Policy(on_stall="abort"))
    assert said == []
    assert migration.phase is Phase.COMPLETED


def replay(name: str, policy: Policy) -> list[Decision]:
    history, said = History(), []
    for progress in recorded(name):
        decision = decide(policy, history, progress, progress.elapsed_s)
        history.add(progress, decision, progress.elapsed_s)
        said += [decision] if decision.notable else []
    return said


def test_real_migrations() -> None:
    assert replay("qemu-7.2-converging", Policy(on_stall="abort")) == []
    (noticed,) = replay("qemu-7.2-hot-set", Policy(on_stall="abort"))
    assert noticed.action is Action.ABORT
    (switched,) = replay("qemu-7.2-hot-set", Policy(postcopy_allowed=True, postcopy_after_passes=1))
    assert switched.action is Action.START_POSTCOPY


# -- what is done about it ---------------------------------------------------------------------------------------------


def test_auto_switches_to_postcopy_when_it_was_allowed() -> None:
    migration = PaperMigration(**STUBBORN)
    _, said = play(migration, Policy(postcopy_allowed=True, max_downtime_ceiling_ms=5000))
    assert actions(said) == [Action.START_POSTCOPY]
    assert "does not converge" in said[0].reason
    assert migration.phase is Phase.COMPLETED


def test_auto_climbs_to_the_ceiling_step_by_step_and_gets_there() -> None:
    migration = PaperMigration(dirty=50_000, hot=800)  # all of it is dirty at any time: 781 ms at 1024 MiB/s
    _, said = play(migration, Policy(max_downtime_ceiling_ms=2000))
    assert set(actions(said)) == {Action.SET_DOWNTIME}
    values = [decision.value for decision in said]
    assert values == sorted(set(values))
    assert values[-2] < 760 < values[-1] < 920, "not one step further than needed"
    assert migration.stopped_for == pytest.approx(0.781, abs=0.03)
    assert said[0].reason.endswith(f"the downtime limit goes from 300 ms to {values[0]} ms (ceiling 2000 ms)")


def test_the_steps_are_geometric_and_end_at_the_ceiling_which_is_said_once() -> None:
    migration = PaperMigration(dirty=3000, hot=2000)
    history, said = play(migration, Policy(max_downtime_ceiling_ms=1200), until_s=300)
    values = [decision.value for decision in said[:-1]]
    assert len(values) == DOWNTIME_STEPS
    assert values[-1] == 1200
    ratios = [b / a for a, b in itertools.pairwise([300, *values])]
    assert ratios == pytest.approx([4 ** (1 / DOWNTIME_STEPS)] * DOWNTIME_STEPS, rel=0.01)
    assert said[-1].action is Action.CONTINUE
    assert "ceiling" in said[-1].reason
    assert history.taken == said


def test_each_step_has_a_pass_to_show_its_effect() -> None:
    migration = PaperMigration(**STUBBORN)
    history, passes = History(), []
    policy = Policy(max_downtime_ceiling_ms=1200)
    for progress in migration.samples(until_s=60):
        decision = decide(policy, history, progress, progress.elapsed_s)
        history.add(progress, decision, progress.elapsed_s)
        if decision.action is Action.SET_DOWNTIME:
            passes.append(history.full_passes)
    assert len(passes) > 3
    assert len(set(passes)) == len(passes)


def test_a_limit_that_somebody_else_set_counts_more_than_the_last_step() -> None:
    policy, history = Policy(max_downtime_ceiling_ms=900), _stalled_history()
    history.add(sample(98.0, downtime_limit_ms=300), Decision(action=Action.CONTINUE, reason="", notable=False), 98.0)
    step = decide(policy, history, sample(98.5, downtime_limit_ms=300), 98.5)
    history.add(sample(98.5, downtime_limit_ms=300), step, 98.5)
    assert history.downtime_limit_ms == step.value
    assert history.changed_limit_ms(sample(99.0, downtime_limit_ms=711)) == 711
    history.add(sample(99.0, downtime_limit_ms=711), Decision(action=Action.CONTINUE, reason="", notable=False), 99.0)
    assert history.downtime_limit_ms == 711
    history.failed(step)
    assert history.downtime_limit_ms is None


def test_the_first_step_starts_from_the_limit_in_force() -> None:
    for sample_limit, asked, start in ((None, None, 300), (None, 450, 450), (640, 450, 640)):
        policy = Policy(max_downtime_ceiling_ms=900, max_downtime_ms=asked)
        history = _stalled_history()
        decision = decide(policy, history, sample(99.0, downtime_limit_ms=sample_limit), 99.0)
        assert decision.action is Action.SET_DOWNTIME
        assert f"from {start} ms to {decision.value} ms" in decision.reason
        assert decision.value == round(start * (900 / start) ** (1 / DOWNTIME_STEPS))


def _stalled_history() -> History:
    history = History()
    migration = PaperMigration(**STUBBORN)
    for progress in migration.samples(until_s=20):
        history.add(progress, decide(Policy(), History(), progress, progress.elapsed_s), progress.elapsed_s)
    assert stall(history.boundaries, history.samples[-1], 3)
    return history


@pytest.mark.parametrize(
    ("on_stall", "action"), [("suspend", Action.SUSPEND), ("abort", Action.ABORT), ("postcopy", Action.START_POSTCOPY)]
)
def test_named_actions(on_stall: str, action: Action) -> None:
    migration = PaperMigration(**STUBBORN)
    _, said = play(migration, Policy(on_stall=on_stall, postcopy_allowed=True))
    assert actions(said) == [action]
    if action is not Action.ABORT:
        assert migration.phase is Phase.COMPLETED


def test_continue_is_said_once() -> None:
    _, said = play(PaperMigration(**STUBBORN), Policy(on_stall="continue", postcopy_allowed=True))
    assert actions(said) == [Action.CONTINUE]


def test_a_ceiling_beside_a_named_action_is_climbed_first() -> None:
    _, said = play(PaperMigration(**STUBBORN), Policy(on_stall="abort", max_downtime_ceiling_ms=600), until_s=300)
    assert actions(said) == [Action.SET_DOWNTIME] * DOWNTIME_STEPS + [Action.ABORT]


def test_stall_passes_are_counted() -> None:
    def noticed_after(stall_passes: int) -> int:
        history, said = play(PaperMigration(**STUBBORN), Policy(on_stall="abort", stall_passes=stall_passes))
        assert actions(said) == [Action.ABORT]
        return history.full_passes

    assert noticed_after(2) < noticed_after(4) < noticed_after(8)
    assert noticed_after(8) >= 8


# -- never twice, never too late ---------------------------------------------------------------------------------------


def test_a_refused_action_is_not_tried_again_and_others_stay_possible() -> None:
    history = _stalled_history()
    policy = Policy(postcopy_allowed=True, max_downtime_ceiling_ms=900, timeout_s=500, timeout_action=Action.ABORT)
    switch = decide(policy, history, sample(99.0), 99.0)
    assert switch.action is Action.START_POSTCOPY
    history.add(sample(99.0), switch, 99.0)
    assert history.over
    history.failed(switch)
    assert not history.over
    assert switch not in history.taken
    step = decide(policy, history, sample(99.2), 99.2)
    assert step.action is Action.SET_DOWNTIME
    history.add(sample(99.2), step, 99.2)
    history.failed(step)
    assert decide(policy, history, sample(700.0), 700.0).action is Action.ABORT


@pytest.mark.parametrize(
    "phase", [Phase.SWITCHOVER, Phase.POSTCOPY, Phase.POSTCOPY_PAUSED, Phase.COMPLETED, Phase.PREPARING]
)
def test_nothing_is_done_in_these_phases(phase: Phase) -> None:
    history = _stalled_history()
    for policy in (Policy(timeout_s=1), Policy(timeout_s=1, timeout_action=Action.ABORT), Policy(on_stall="abort")):
        decision = decide(policy, history, sample(900.0, phase=phase), 900.0)
        assert decision.action is Action.CONTINUE
        assert not decision.notable
        assert decision.reason


def test_postcopy_started_by_somebody_else_ends_the_deciding() -> None:
    history = _stalled_history()
    history.add(sample(99.0, phase=Phase.POSTCOPY), decide(Policy(), history, sample(99.0), 99.0), 99.0)
    decision = decide(Policy(on_stall="abort", timeout_s=1), history, sample(99.5), 99.5)
    assert decision.action is Action.CONTINUE


POLICIES = st.builds(
    Policy,
    timeout_s=st.none() | st.integers(1, 40),
    timeout_action=st.sampled_from(sorted(TERMINAL)),
    postcopy_allowed=st.booleans(),
    postcopy_after_passes=st.none() | st.integers(1, 4),
    on_stall=st.sampled_from(["auto", "continue", "postcopy", "suspend", "abort"]),
    stall_passes=st.integers(1, 4),
    max_downtime_ms=st.none() | st.integers(1, 2000),
    max_downtime_ceiling_ms=st.none() | st.integers(1, 4000),
)
SIZES = st.none() | st.integers(0, 8192 * MIB)
SAMPLES = st.lists(
    st.builds(
        Progress,
        elapsed_s=st.just(0.0),
        phase=st.sampled_from([Phase.PRECOPY] * 6 + list(Phase)),
        total_bytes=SIZES,
        remaining_bytes=SIZES,
        memory_total_bytes=st.none() | st.just(4096 * MIB),
        memory_remaining_bytes=SIZES,
        memory_processed_bytes=SIZES,
        memory_bytes_per_s=SIZES,
        dirty_bytes_per_s=SIZES,
        throttle_percent=st.none() | st.integers(0, 99),
        full_passes=st.integers(0, 5),
    ),
    min_size=5,
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(POLICIES, SAMPLES, st.lists(st.floats(0, 5), min_size=60, max_size=60))
def test_whatever_is_seen(policy: Policy, samples: list[Progress], gaps: list[float]) -> None:
    history, now, said, postcopy_seen = History(), 0.0, [], False
    for number, (progress, gap) in enumerate(zip(samples, gaps, strict=False)):
        now += gap
        decision = decide(policy, history, progress, now)
        assert decision.reason
        if postcopy_seen or progress.phase not in (Phase.STORAGE, Phase.PRECOPY):
            assert decision.action is Action.CONTINUE
        if decision.action is Action.START_POSTCOPY:
            assert policy.postcopy_allowed
            assert progress.phase is Phase.PRECOPY
        if decision.action is Action.SET_DOWNTIME:
            assert policy.max_downtime_ceiling_ms is not None
            assert decision.value is not None
            assert 0 < decision.value <= policy.max_downtime_ceiling_ms
        assert decision == decide(policy, history, progress, now), f"sample {number}: deciding changes nothing"
        history.add(progress, decision, now)
        postcopy_seen = postcopy_seen or progress.phase in (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED)
        if decision.notable:
            said.append((decision.action, decision.value))
    assert sum(action in TERMINAL for action, _ in said) <= 1
    assert len(set(said)) == len(said), "nothing twice"
