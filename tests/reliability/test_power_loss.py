"""R2: whatever subset of the unsynced names and bytes a power cut leaves, no acknowledged sample is lost."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.reliability.checks import require_kept, require_whole
from tests.reliability.crash_states import Moment, Recorder, State, distinct_states
from tests.reliability.processes import quick_folder, spread
from tests.reliability.scenarios import SCENARIOS, Act, Scenario, ignore
from tests.reliability.shim import one_thread


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How many states are checked."""

    states: int
    """At most, per scenario."""
    recoveries: int
    """Of each scenario, that are cut off in their turn."""
    states_per_recovery: int


QUICK = Effort(states=480, recoveries=5, states_per_recovery=6)
LONG = Effort(states=10_000, recoveries=40, states_per_recovery=20)
LEAST_STATES = {"create": 35, "build": 400, "extend": 400, "drop": 160, "repair": 5}
LEAST_COMPOUND = 20


def record(act: Act, place: Path, *, acknowledged: frozenset[str]) -> list[Moment]:
    """Return the moments of an unbroken run on the cache under ``place``."""
    recorder = Recorder(place, acknowledged=acknowledged)
    with recorder.following():
        act(place / "cache", recorder.acknowledge)
    return recorder.moments


def recorded_states(scenario: Scenario, *, limit: int) -> list[State]:
    """Return distinct states that a power cut during a scenario may leave.

    Where there are too many, a random choice of those in which files of a shard were being written.
    """
    with quick_folder() as place:
        scenario.prepare(place / "cache")
        moments = record(scenario.act, place, acknowledged=scenario.acknowledged)
    chooser = random.Random(0)
    within = [moment.last is not None and "shards" in moment.last.path.parts for moment in moments]
    few = distinct_states((m for m, is_within in zip(moments, within, strict=True) if not is_within), chooser=chooser)
    many = distinct_states((m for m, is_within in zip(moments, within, strict=True) if is_within), chooser=chooser)
    chooser.shuffle(many)
    return [*few, *many][:limit]


def recover(state: State, place: Path, scenario: Scenario) -> None:
    """Check a state as it is, bring the work to its end, and check that too."""
    state.disk.write_to(place)
    require_kept(place / "cache", scenario, acknowledged=state.acknowledged)
    scenario.resume(place / "cache", ignore)
    require_whole(place / "cache", scenario)


def states_of_recoveries(states: Sequence[State], scenario: Scenario, *, effort: Effort) -> list[State]:
    """Return states that a second power cut may leave, during the recovery from a first one."""
    chooser = random.Random(1)
    found: list[State] = []
    for state in chooser.sample(states, min(effort.recoveries, len(states))):
        with quick_folder() as place:
            state.disk.write_to(place)
            moments = record(scenario.resume, place, acknowledged=state.acknowledged)
        for moment in chooser.sample(moments, min(effort.states_per_recovery, len(moments))):
            found += chooser.choices(distinct_states([moment], chooser=chooser))
    return found


def check(scenario: Scenario, *, effort: Effort) -> tuple[int, int]:
    """Recover from states of one scenario; return how many power cuts and how many double ones there were."""
    with one_thread():
        states = recorded_states(scenario, limit=effort.states)
        spread(states, lambda state, place: recover(state, place, scenario))
        twice = states_of_recoveries(states, scenario, effort=effort)
        spread(twice, lambda state, place: recover(state, place, scenario))
    print(f"R2: {scenario.name}: {len(states)} states, {len(twice)} of recoveries, 0 lost, 0 corrupt, none raised")
    return len(states), len(twice)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
@pytest.mark.parametrize(
    "effort", [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.nightly)]
)
def test_no_state_after_a_power_cut_loses_a_sample(effort: Effort, scenario: Scenario) -> None:
    states, twice = check(scenario, effort=effort)
    assert states >= LEAST_STATES[scenario.name]
    assert twice >= LEAST_COMPOUND
