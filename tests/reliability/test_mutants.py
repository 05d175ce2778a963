"""R4: each harness that watches over the store is shown mistakes, so that its silence means something."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache import local_store
from teacher_cache.claims import Claims
from teacher_cache.gc import collect_garbage
from teacher_cache.storage import open_store
from tests.reliability import test_damage, test_ext4, test_kill, test_power_loss
from tests.reliability.checks import require_whole
from tests.reliability.mutants import MUTANTS, Mutant
from tests.reliability.processes import quick_folder, spread
from tests.reliability.scenarios import ALL, BUILD, CREATE, SCENARIOS, ignore
from tests.reliability.shim import Point, Step, intercept, one_thread
from tests.teacher_cache.store import commit, open_builder

_EXCEPTION = re.compile(r"^(?:\w+\.)*((?:Assertion|Cache|OS|File)\w+.*)$", re.MULTILINE)


def kill_processes() -> None:
    """R1, but for the steps within shards."""
    for scenario in (CREATE, BUILD):
        test_kill.kill_at_every_step(scenario, within_shards=False)


def lose_power() -> None:
    """R2, for one scenario."""
    test_power_loss.recover_all(
        BUILD, effort=test_power_loss.Effort(states_within_shards=0, recoveries=0, states_per_recovery=0)
    )


def lose_power_on_ext4() -> None:
    """R3, a few power cuts."""
    test_ext4.cut_power(cuts=48)


def meet_others() -> None:
    """R9: at any step of a builder another process does all of its work."""
    with one_thread(), quick_folder() as folder:
        base = folder / "base"
        BUILD.prepare(base)
        shutil.copytree(base, folder / "reference")
        steps = test_kill.steps_of(BUILD, folder / "reference")
        points = [Point(number=step.number) for step in steps if not step.is_within_shard or step.number % 8 == 0]

        def work(point: Point, place: Path) -> None:
            for number, intruder in enumerate((_build, _tidy)):
                root = place / str(number)
                shutil.copytree(base, root)
                with intercept(_let_in(intruder, root, point=point)):
                    _build(root)
                require_whole(root, BUILD)

        spread(points, work)


def flip_bits() -> None:
    """R5, a few flips of each file."""
    test_damage.flip_bits({}, effort=test_damage.FEW)


def lose_answers() -> None:
    """A name that was given is reported as taken, as after a lost answer and a second try."""
    for scenario in SCENARIOS.values():
        with quick_folder() as folder, pytest.MonkeyPatch.context() as patch:
            scenario.prepare(folder / "cache")
            patch.setattr(local_store, "os", _LostAnswers())
            scenario.act(folder / "cache", ignore)
            scenario.resume(folder / "cache", ignore)
            require_whole(folder / "cache", scenario)


def share_work() -> None:
    """One shard is one builder's, until its builder is dead."""
    now = 0.0
    with quick_folder() as folder:
        store = open_store(str(folder))
        first, second, third = (Claims(store, lease_s=1000, clock=lambda: now) for _ in range(3))
        with first, second, third:
            assert first.take("00000")
            for _ in range(4):
                assert not second.take("00000"), "two builders work on one shard"
                now += 600
                first.beat()
            assert not second.take("00000")
            now += 1001
            assert second.take("00000"), "the shard of a dead builder is left alone"
            first.beat()
            first.release("00000")
            assert not third.take("00000"), "a builder has released another's claim"


HARNESSES: dict[str, Callable[[], None]] = {
    "R1": kill_processes,
    "R2": lose_power,
    "R3": lose_power_on_ext4,
    "R5": flip_bits,
    "R9": meet_others,
    "lost answers": lose_answers,
    "claims": share_work,
}


class _LostAnswers:
    """Acts as the module ``os``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)
        raise FileExistsError(target)


def _build(root: Path) -> None:
    writer = open_builder(root, ALL, per_shard=1)
    for shard in writer.missing_shards():
        assert commit(writer, shard, ALL).encode() == writer.standing_record(shard).encode()
    assert writer.complete()


def _tidy(root: Path) -> None:
    collect_garbage(str(root))


def _let_in(intruder: Callable[[Path], None], root: Path, *, point: Point) -> Callable[[Step], None]:
    is_in = False

    def react(step: Step) -> None:
        nonlocal is_in
        if not is_in and point.is_at(step):
            is_in = True
            intruder(root)

    return react


def _run_without_faults() -> None:
    for scenario in SCENARIOS.values():
        with one_thread(), quick_folder() as folder:
            scenario.prepare(folder / "cache")
            scenario.act(folder / "cache", ignore)
            scenario.resume(folder / "cache", ignore)
            require_whole(folder / "cache", scenario)


def _complaint(harness: str) -> str | None:
    """Return why a harness refuses the store as it is now, or None."""
    try:
        HARNESSES[harness]()
    except Exception as error:
        return _EXCEPTION.findall(f"{type(error).__name__}: {error}")[-1]
    return None


def _can_run(harness: str) -> bool:
    return harness != "R3" or test_ext4.obstacle() is None


@pytest.mark.parametrize("harness", ["R5", "R9", "lost answers", "claims"])
def test_the_store_passes_the_harnesses_that_have_no_test_of_their_own(harness: str) -> None:
    HARNESSES[harness]()


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
@pytest.mark.parametrize(
    "all_harnesses", [pytest.param(False, id="named"), pytest.param(True, id="all", marks=pytest.mark.nightly)]
)
def test_a_mistake_does_not_escape_its_harnesses(mutant: Mutant, all_harnesses: bool) -> None:
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        mutant.apply(patch)
        _run_without_faults()
        for harness in HARNESSES if all_harnesses else mutant.killed_by:
            if _can_run(harness):
                seen[harness] = _complaint(harness)
    for harness, complaint in seen.items():
        print(f"R4: {mutant.name}: {harness}: {'not seen' if complaint is None else complaint[:160]}")
    assert [harness for harness in seen if harness in mutant.killed_by and seen[harness] is None] == []
    assert set(seen.values()) != {None}
