"""R2: whatever subset of the unsynced names and bytes a power cut leaves, no acknowledged sample is lost."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.reliability.checks import require_kept, require_whole
from tests.reliability.crash_states import Moment, Recorder, State, distinct, states_of
from tests.reliability.processes import quick_folder, spread
from tests.reliability.scenarios import PARAMETERS, Act, Scenario, ignore
from tests.reliability.shim import Point, one_thread


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How many states are checked, of each scenario."""

    states_within_shards: int | None
    """At most, of each moment at which a shard is being written; of all other moments every state is checked."""
    recoveries: int
    """From power cuts, that are cut off by a second one."""
    states_per_recovery: int


QUICK = Effort(states_within_shards=7, recoveries=5, states_per_recovery=6)
LONG = Effort(states_within_shards=None, recoveries=40, states_per_recovery=20)
LEAST_STATES = {"create": 35, "build": 600, "extend": 350, "drop": 90, "repair": 5}
LEAST_COMPOUND = 30


def record(act: Act, place: Path, *, acknowledged: frozenset[str]) -> list[Moment]:
    """Return the moments of an unbroken run on the cache under ``place``."""
    recorder = Recorder(place, acknowledged=acknowledged)
    with recorder.following():
        act(place / "cache", recorder.acknowledge)
    return recorder.moments


def record_scenario(scenario: Scenario) -> list[Moment]:
    """Return the moments of an unbroken run of a scenario."""
    with quick_folder() as place:
        scenario.prepare(place / "cache")
        return record(scenario.act, place, acknowledged=scenario.acknowledged)


def record_restart(scenario: Scenario, *, killed_at: Point) -> list[Moment]:
    """Return the moments of a run that goes on where another process was killed; what that one wrote may not last."""
    with quick_folder() as place:
        scenario.prepare(place / "cache")
        recorder = Recorder(place, acknowledged=scenario.acknowledged)
        with recorder.following(stop=killed_at):
            scenario.act(place / "cache", recorder.acknowledge)
        done = len(recorder.moments)
        with recorder.following():
            scenario.resume(place / "cache", recorder.acknowledge)
        return recorder.moments[done:]


def states_of_run(moments: Sequence[Moment], *, most_within_shards: int | None) -> list[State]:
    """Return distinct states that a power cut during a run may leave."""
    chooser = random.Random(0)
    others = states_of((moment for moment in moments if not moment.is_within_shard), chooser=chooser)
    within = (moment for moment in moments if moment.is_within_shard)
    return distinct([*others, *states_of(within, chooser=chooser, most=most_within_shards)])


def states_of_recoveries(states: Sequence[State], scenario: Scenario, *, effort: Effort) -> list[State]:
    """Return states that a second power cut may leave, during the recovery from a first one."""
    chooser = random.Random(1)
    found: list[State] = []
    for state in chooser.sample(states, min(effort.recoveries, len(states))):
        with quick_folder() as place:
            state.disk.write_to(place)
            moments = record(scenario.resume, place, acknowledged=state.acknowledged)
        for moment in chooser.sample(moments, min(effort.states_per_recovery, len(moments))):
            found += states_of([moment], chooser=chooser, most=1)
    return found


def states_of_restarts(moments: Sequence[Moment], scenario: Scenario) -> list[State]:
    """Return states after the power fails for a process that goes on where another one was killed.

    The kills are those that leave a name which is not durable yet; of such names nothing reaches the disk.
    """
    points = [
        Point(number=after.last.number)
        for before, after in pairwise(moments)
        if after.last is not None and after.last.kind == "sync folder" and not after.is_within_shard
        if len(after.pending) < len(before.pending)
    ]
    restarts = [record_restart(scenario, killed_at=point) for point in points]
    return distinct(moment.state({}) for restart in restarts for moment in restart if not moment.is_within_shard)


def recover(state: State, place: Path, scenario: Scenario) -> None:
    """Check a state as it is, bring the work to its end, and check that too."""
    state.disk.write_to(place)
    require_kept(place / "cache", scenario, acknowledged=state.acknowledged)
    scenario.resume(place / "cache", ignore)
    require_whole(place / "cache", scenario)


def recover_all(scenario: Scenario, *, effort: Effort) -> tuple[int, int]:
    """Recover from states of one scenario; return how many power cuts and how many compound crashes there were."""
    with one_thread():
        moments = record_scenario(scenario)
        states = states_of_run(moments, most_within_shards=effort.states_within_shards)
        spread(states, lambda state, place: recover(state, place, scenario))
        compound = states_of_restarts(moments, scenario) + states_of_recoveries(states, scenario, effort=effort)
        spread(compound, lambda state, place: recover(state, place, scenario))
    return len(states), len(compound)


@pytest.mark.parametrize("scenario", PARAMETERS)
@pytest.mark.parametrize(
    "effort", [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.nightly)]
)
def test_no_state_after_a_power_cut_loses_a_sample(effort: Effort, scenario: Scenario) -> None:
    states, compound = recover_all(scenario, effort=effort)
    print(f"R2: {scenario.name}: {states} states, {compound} after a second crash: 0 lost, 0 corrupt, none raised")
    assert states >= LEAST_STATES[scenario.name]
    assert compound >= LEAST_COMPOUND
