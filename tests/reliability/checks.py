"""What must hold of a cache after an interruption, and after the work was taken up again."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from teacher_cache import open_cache
from teacher_cache.errors import CacheCorrupt, CacheIncomplete, CacheNotFound
from teacher_cache.reader import TeacherCache
from teacher_cache.schema import TeacherTargets
from teacher_cache.snapshot import snapshot_name
from teacher_cache.verify import verify_cache
from tests.reliability.scenarios import COMPLETE, CREATED, SAMPLES, Scenario, ignore
from tests.reliability.shim import CHANGES, Step, intercept
from tests.teacher_cache.store import assert_same


def require_kept(root: Path, scenario: Scenario, *, acknowledged: Collection[str]) -> None:
    """Check an interrupted cache: every acknowledged sample is there, and every sample that is there is right."""
    try:
        committed = open_cache(str(root), allow_incomplete=True)
    except CacheNotFound:
        assert CREATED not in acknowledged, "the cache is gone"
        return
    ids = set(acknowledged) & SAMPLES.keys()
    require_right(committed, scenario, ids=ids)
    try:
        complete = open_cache(str(root))
    except CacheIncomplete:
        assert COMPLETE not in acknowledged, "the complete cache is incomplete"
    else:
        require_right(complete, scenario, ids=ids if COMPLETE in acknowledged else ())
    # files that nothing names and a snapshot yet to be written are what an interruption may leave behind
    harmless = [("missing", snapshot_name(0))]
    problems = [problem for problem in verify_cache(str(root)).problems if problem.kind != "extra"]
    serious = [problem for problem in problems if (problem.kind, problem.path) not in harmless]
    assert {problem.shard_id for problem in serious} <= {f"0000{list(SAMPLES).index(x)}" for x in scenario.damaged}


def require_right(cache: TeacherCache, scenario: Scenario, *, ids: Iterable[str]) -> None:
    """Check that a cache holds these samples and no sample twice, and that all it holds are bit-equal."""
    assert len(set(cache.sample_ids)) == len(cache.sample_ids), "a sample is there twice"
    lost = set(ids) - set(cache.sample_ids)
    assert not lost, f"acknowledged samples are lost: {sorted(lost)}"
    for sample_id in cache.sample_ids:
        try:
            (found,) = cache.read([sample_id])
        except CacheCorrupt:
            assert sample_id in scenario.damaged
            continue
        expected = SAMPLES[sample_id]
        if scenario.drops_questions and found.question_hidden_states is None:
            expected = without_questions(expected)
        assert_same(found, expected)


def require_whole(root: Path, scenario: Scenario) -> None:
    """Check a cache whose work was finished: complete, verified, bit-equal, and nothing is left over."""
    report = verify_cache(str(root))
    assert report.problems == ()
    assert report.missing_shards == ()
    assert report.samples == len(scenario.samples)
    cache = open_cache(str(root))
    assert cache.sample_ids == tuple(sample.sample_id for sample in scenario.samples)
    for found, sample in zip(cache.read(cache.sample_ids), scenario.samples, strict=True):
        assert_same(found, without_questions(sample) if scenario.drops_questions else sample)
    assert leftovers(root) == []
    assert len(list((root / "shards").iterdir())) == len(scenario.samples)


def finish(root: Path, scenario: Scenario) -> None:
    """Run a scenario to its end, then once more, which must change nothing."""
    scenario.resume(root, ignore)
    require_whole(root, scenario)
    changes: list[Step] = []
    with intercept(changes.append, kinds=[kind for kind in CHANGES if not kind.startswith("sync")]):
        scenario.resume(root, ignore)
    assert changes == [], "a second run changed something"


def leftovers(root: Path) -> list[str]:
    """Return temporary files and claims; verification finds all other files that do not belong."""
    return [path.name for folder in ("staging", "claims") for path in (root / folder).glob("*")]


def without_questions(sample: TeacherTargets) -> TeacherTargets:
    """Return a sample as it is after tier Q was dropped."""
    return replace(sample, question_hidden_states=None)
