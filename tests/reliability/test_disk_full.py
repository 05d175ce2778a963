"""R7: a builder whose disk is full or fails says so, loses nothing, and its work is taken up again."""

import errno
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from teacher_cache import open_cache
from teacher_cache.errors import CacheCorrupt, CacheError, CacheNotFound
from teacher_cache.verify import verify_cache
from tests.reliability.checks import require_kept, require_whole
from tests.reliability.faults import NEEDS_SPACE, Refusal, open_for_writing
from tests.reliability.processes import quick_folder, run_in_child, spread
from tests.reliability.scenarios import PARAMETERS, SCENARIOS, Acknowledge, Scenario, ignore
from tests.reliability.shim import CHANGES, Kind, Point, Step, intercept, one_thread, points_of
from tests.teacher_cache.store import assert_same, commit, make_samples, open_builder

LEAST_POINTS = {"create": 30, "build": 250, "extend": 120, "drop": 40, "repair": 8}
BIG = make_samples(24)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How the file system refuses."""

    error: int
    sticky: bool
    kinds: tuple[Kind, ...]


FAULTS = [
    Fault(error=errno.ENOSPC, sticky=True, kinds=NEEDS_SPACE),
    Fault(error=errno.EIO, sticky=False, kinds=CHANGES),
    Fault(error=errno.EIO, sticky=True, kinds=CHANGES),
    Fault(error=errno.ENOSPC, sticky=False, kinds=NEEDS_SPACE),
]


def refuse_and_resume(scenario: Scenario, root: Path, refusal: Refusal) -> bool:
    """Check one failure and what follows; say whether the run reported it."""
    told = set(scenario.acknowledged)
    error: CacheError | None = None
    with intercept(refusal):
        try:
            scenario.act(root, lambda *words: told.update(words))
        except CacheError as caught:
            error = caught
    assert refusal.refused
    assert open_for_writing(root) == []
    if error is not None:
        assert not isinstance(error, CacheCorrupt)
        assert refusal.is_named_by(str(error)), f"{error} names none of {refusal.refused}"
    require_kept(root, scenario, acknowledged=told)
    scenario.resume(root, ignore)
    require_whole(root, scenario)
    return error is not None


def refuse_everywhere(scenario: Scenario, *, every_fault: bool) -> tuple[int, int]:
    """Refuse each step of a scenario; return the numbers of points and of runs."""
    with one_thread(), quick_folder() as folder:
        base = folder / "base"
        scenario.prepare(base)
        reference = folder / "reference"
        if base.exists():
            shutil.copytree(base, reference)
        steps: list[Step] = []
        with intercept(steps.append):
            scenario.act(reference, ignore)
        points = points_of(steps)
        chosen = {point: FAULTS if every_fault else FAULTS[place % 4 :][:1] for place, point in enumerate(points)}
        runs = [(point, fault) for point, faults in chosen.items() for fault in faults]

        def work(run: tuple[Point, Fault], place: Path) -> None:
            point, fault = run
            if base.exists():
                shutil.copytree(base, place / "cache")
            refusal = Refusal(point=point, error=fault.error, sticky=fault.sticky, kinds=fault.kinds)
            kind = steps[point.number - 1].kind
            reported = refuse_and_resume(scenario, place / "cache", refusal)
            assert reported or not fault.sticky or kind not in NEEDS_SPACE, f"nothing was said of {kind}"

        spread(runs, work)
    return len(points), len(runs)


@pytest.mark.parametrize("scenario", PARAMETERS)
def test_a_refused_step_is_reported_and_loses_nothing(scenario: Scenario) -> None:
    points, runs = refuse_everywhere(scenario, every_fault=False)
    assert points >= LEAST_POINTS[scenario.name]
    print(f"R7: {scenario.name}: {points} points, {runs} runs with ENOSPC or EIO, once or sticky: 0 lost, 0 corrupt")


@pytest.mark.nightly
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_every_fault_at_every_step(scenario: Scenario) -> None:
    points, runs = refuse_everywhere(scenario, every_fault=True)
    assert runs == len(FAULTS) * points
    print(f"R7: {scenario.name}: every fault at each of {points} points, {runs} runs: 0 lost, 0 corrupt")


@contextmanager
def small_disk(place: Path, *, limit: str) -> Iterator[Path]:
    """Mount a file system with a limit, given as an option of tmpfs."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"{limit},mode=700", "none", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"R7: a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def build_big(root: Path, acknowledge: Acknowledge) -> None:
    writer = open_builder(root, BIG, per_shard=4)
    for shard in writer.missing_shards():
        commit(writer, shard, BIG)
        acknowledge(*shard.sample_ids)


def require_readable(root: Path, *, ids: set[str]) -> None:
    """Check that these samples are there, and that what is there is right."""
    try:
        cache = open_cache(str(root), allow_incomplete=True)
    except CacheNotFound:
        assert not ids
        return
    assert set(cache.sample_ids) >= ids
    for found in cache.read(cache.sample_ids):
        assert_same(found, BIG[int(found.sample_id.removeprefix("sample-"))])


def require_finished(root: Path) -> None:
    """Finish the work, now that there is space, and check it."""
    build_big(root, ignore)
    require_readable(root, ids={sample.sample_id for sample in BIG})
    report = verify_cache(str(root))
    assert (report.samples, report.problems, report.missing_shards) == (len(BIG), (), ())


@pytest.mark.parametrize("unit", ["size", "nr_inodes"])
def test_a_disk_that_is_really_full(tmp_path: Path, unit: str) -> None:
    limits = range(16, 700, 48) if unit == "size" else range(8, 190, 14)
    kept: list[int] = []
    for limit in limits:
        amount = f"{limit}k" if unit == "size" else str(limit)
        with small_disk(tmp_path / f"disk-{limit}", limit=f"{unit}={amount}") as disk:
            told: set[str] = set()
            with pytest.raises(CacheError, match=rf"{disk}/cache.*No space left on device.*free space"):
                build_big(disk / "cache", lambda *ids, told=told: told.update(ids))
            require_readable(disk / "cache", ids=told)
            kept.append(len(told))
            subprocess.run(["mount", "-o", "remount,size=8m,nr_inodes=1000", str(disk)], check=True)
            require_finished(disk / "cache")
    assert kept[0] == 0
    assert kept[-1] > 0
    print(f"R7: {len(kept)} disks limited by {unit}, {sum(kept)} samples acknowledged on them: 0 lost, all finished")


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    limits = [1, 100, 1000, 1500, 2500, 3500, 5000, 8000, 10000]
    for limit in limits:
        root = tmp_path / str(limit) / "cache"
        message = refusal_under_limit(root, limit=limit)
        assert re.search(rf"File too large, writing bytes \d+ to \d+.*: '{root}/", message), message
        require_readable(root, ids=set())
        require_finished(root)
    print(f"R7: {len(limits)} limits of the size of a file: each reported with file and bytes, all finished")


def refusal_under_limit(root: Path, *, limit: int) -> str:
    """Return what a builder says that may write no longer files."""

    def act(tell: Acknowledge) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(CacheError) as caught:
            build_big(root, ignore)
        tell(str(caught.value).encode().hex())

    status, told = run_in_child(act)
    assert status == 0
    return bytes.fromhex(told[0]).decode()
