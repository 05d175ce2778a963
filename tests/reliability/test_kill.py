"""R1: a builder that is killed at any step of the file system loses nothing, and its work is taken up again."""

import shutil
import signal
from pathlib import Path

import pytest

from tests.reliability.checks import finish, require_kept
from tests.reliability.processes import quick_folder, run_in_child, spread
from tests.reliability.scenarios import PARAMETERS, Acknowledge, Scenario, ignore
from tests.reliability.shim import Point, Step, intercept, kill_at, one_thread, points_of

LEAST_POINTS = {"create": 30, "build": 250, "extend": 120, "drop": 40, "repair": 8}


def steps_of(scenario: Scenario, root: Path) -> list[Step]:
    """Return the steps of an unbroken run."""
    steps: list[Step] = []
    with intercept(steps.append):
        scenario.act(root, ignore)
    return steps


def kill_at_every_step(scenario: Scenario, *, within_shards: bool = True) -> int:
    """Kill a run at every step, or at those that do not write a shard's files; return how often."""
    with one_thread(), quick_folder() as folder:
        base = folder / "base"
        scenario.prepare(base)
        reference = folder / "reference"
        if base.exists():
            shutil.copytree(base, reference)
        steps = steps_of(scenario, reference)
        points = points_of([step for step in steps if within_shards or not step.is_within_shard])

        def work(point: Point, place: Path) -> None:
            root = place / "cache"
            if base.exists():
                shutil.copytree(base, root)

            def doomed(acknowledge: Acknowledge) -> None:
                with intercept(kill_at(point)):
                    scenario.act(root, acknowledge)

            status, told = run_in_child(doomed)
            assert status == -signal.SIGKILL
            require_kept(root, scenario, acknowledged=scenario.acknowledged | set(told))
            finish(root, scenario)

        spread(points, work)
    return len(points)


@pytest.mark.parametrize("scenario", PARAMETERS)
def test_a_kill_at_any_step_loses_nothing(scenario: Scenario) -> None:
    kills = kill_at_every_step(scenario)
    assert kills >= LEAST_POINTS[scenario.name]
    print(f"R1: {scenario.name}: {kills} kill points, 0 lost, 0 duplicate, 0 corrupt, second run a no-op")
