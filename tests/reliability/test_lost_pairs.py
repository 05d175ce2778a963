"""R6: two files that are gone at once, and whatever comes before they are missed, cost no intact shard."""

import shutil
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Literal

import pytest

from teacher_cache import open_cache
from teacher_cache.errors import CacheError, GenrecalError
from teacher_cache.gc import collect_garbage
from teacher_cache.repair import repair_cache
from tests.reliability.processes import quick_folder, spread
from tests.reliability.test_lost_files import BEYOND_REPAIR, files_in, problems_of, shard_of
from tests.teacher_cache.store import assert_same, build, make_samples

SAMPLES = make_samples(3)
FILE_OF_A_SHARD = "/hidden_states/c.0.0"
"""Stands for the others."""
Before = Literal["nothing", "build", "collect"]


def make_cache(root: Path) -> dict[str, bytes]:
    """Make a cache that was extended twice; return its files."""
    for count in range(1, len(SAMPLES) + 1):
        build(root, SAMPLES[:count], per_shard=1, extend=True)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files_in(root)}


def committed(root: Path) -> set[str]:
    return set(open_cache(str(root), allow_incomplete=True).shard_ids)


def live_through(root: Path, lost: tuple[str, str], *, files: dict[str, bytes], before: Before) -> None:
    """Lose two files, go on as if nothing were, repair, restore what no repair can, and build."""
    for name in lost:
        (root / name).unlink()
    with suppress(GenrecalError):
        if before == "collect":
            collect_garbage(str(root))
        if before != "nothing":
            build(root, SAMPLES, per_shard=1)
            collect_garbage(str(root))
    irreplaceable = [name for name in lost if name.startswith(BEYOND_REPAIR)]
    try:
        beyond = {problem.path for problem in repair_cache(str(root)).beyond_repair}
    except CacheError:
        beyond = set(irreplaceable)
    assert beyond == {name for name in irreplaceable if not (root / name).is_file()} or "CACHE.json" in lost
    for name in irreplaceable:
        (root / name).write_bytes(files[name])
    repair_cache(str(root))
    intact = {f"{number:05d}" for number in range(len(SAMPLES))} - {shard_of(name) for name in lost}
    assert intact <= committed(root), lost
    build(root, SAMPLES, per_shard=1)
    assert problems_of(root) == []
    cache = open_cache(str(root))
    for found, sample in zip(cache.read([sample.sample_id for sample in SAMPLES]), SAMPLES, strict=True):
        assert_same(found, sample)


@pytest.mark.parametrize(
    "before",
    [
        pytest.param("collect", marks=pytest.mark.slow),
        *(pytest.param(before, marks=pytest.mark.nightly) for before in ("nothing", "build")),
    ],
)
def test_no_pair_of_lost_files_costs_an_intact_shard(before: Before) -> None:
    with quick_folder() as folder:
        original = folder / "cache"
        files = make_cache(original)
        named = [name for name in files if not name.startswith("shards/") or name.endswith(FILE_OF_A_SHARD)]
        pairs = list(combinations(named, 2))

        def try_pair(lost: tuple[str, str], place: Path) -> None:
            shutil.copytree(original, place / "cache")
            live_through(place / "cache", lost, files=files, before=before)

        spread(pairs, try_pair)
    print(f"R6: {before} before the repair: {len(pairs)} pairs of lost files: 0 intact shards lost, all whole again")
