"""R6: a file of a cache that is gone, cut, replaced or of an older state is refused, and repaired where that can be."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from teacher_cache import TeacherCache, open_cache
from teacher_cache.durable_files import FileDigest
from teacher_cache.errors import CacheError
from teacher_cache.manifest import read_manifest
from teacher_cache.plan import read_plan
from teacher_cache.repair import repair_cache
from teacher_cache.schema import TeacherTargets
from teacher_cache.standing import read_standing
from teacher_cache.storage import open_store
from teacher_cache.verify import verify_cache
from tests.reliability.checks import leftovers
from tests.reliability.processes import quick_folder, spread
from tests.teacher_cache.store import TURNS, assert_same, build, flip_bit, make_samples, make_targets

SAMPLES = make_samples(2)
OLD_SAMPLE = make_targets("sample-0", spans=TURNS[0], num_tokens=24, seed=99)
OPTIONS = {"raw": {}, "zstd": {"compression": "zstd"}}
REPAIRED = ("zarr.json", "hidden_states/zarr.json", "hidden_states/c.0.0", "offsets/c.0.0")
"""Files of a shard that stand for the others where each repair is tried."""
BEYOND_REPAIR = ("CACHE.json", "plans/", "teacher_head-")
"""What neither a repair nor a build can tell from the rest."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """New contents of some files, None for a file that is gone."""

    name: str
    """The file that it is about."""
    kind: str
    changes: dict[str, bytes | None] = field(repr=False)

    def apply(self, root: Path) -> None:
        for name, data in self.changes.items():
            if data is None:
                (root / name).unlink()
            else:
                (root / name).write_bytes(data)


@dataclass(frozen=True, kw_only=True)
class IntactCache:
    """A cache of two shards with a past: the first was damaged, repaired and built anew, the second came later."""

    root: Path
    files: dict[str, bytes]
    older: dict[str, bytes]
    """What some of the files held in an earlier state, or what came before them."""

    def undo(self, damage: Damage, root: Path) -> None:
        for name in damage.changes:
            (root / name).write_bytes(self.files[name])

    def neighbour(self, name: str) -> str:
        """Return the most similar other file: of the other shard, of the same folder, or the next one."""
        others = sorted(set(self.files) - {name})
        top, _, rest = name.partition("/")
        shard, _, within = rest.partition("/")
        same = [other for other in others if top == "shards" and other.endswith(f"/{within}") and shard not in other]
        near = [other for other in others if other.split("/")[0] == top]
        return (same or near or others)[0]

    def damages(self, name: str) -> Iterator[Damage]:
        """Yield the ways in which a file is damaged."""
        data, neighbour = self.files[name], self.neighbour(name)
        changes: dict[str, dict[str, bytes | None]] = {
            "deleted": {name: None},
            "truncated": {name: data[: len(data) // 2]},
            "emptied": {name: b""},
            "extended": {name: data + b"\0"},
            "swapped": {name: self.files[neighbour], neighbour: data},
            "older": {name: self.older.get(name, data)},
        }
        for kind, changed in changes.items():
            if any(self.files[changed_name] != new for changed_name, new in changed.items()):
                yield Damage(name=name, kind=kind, changes=changed)


def make_cache(root: Path, options: dict[str, str]) -> IntactCache:
    build(root, [OLD_SAMPLE], per_shard=1, **options)
    (old_folder,) = (root / "shards").iterdir()
    old_files = {path.relative_to(old_folder).as_posix(): path.read_bytes() for path in files_in(old_folder)}
    flip_bit(old_folder / "hidden_states/c.0.0", byte=3, bit=1)
    assert repair_cache(str(root)).withdrawn_shards == ("00000",)
    build(root, SAMPLES[:1], per_shard=1, **options)
    build(root, SAMPLES, per_shard=1, extend=True, **options)
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in files_in(root)}
    older = {name: old_files[name.split("/", 2)[2]] for name in files if name.startswith("shards/00000-")}
    for folder in ("commits/00000.", "plans/", "snapshots/"):
        chain = [name for name in files if name.startswith(folder)]
        older |= {name: files[before] for before, name in pairwise(chain)}
    indexes = [name for name in files if name.startswith("index/")]
    older |= {name: files[other] for name, other in zip(indexes, indexes[1:] + indexes[:1], strict=True)}
    return IntactCache(root=root, files=files, older=older)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def problems_of(root: Path) -> list[tuple[str | None, str, str]]:
    """Return shard, file and message of all that verification finds."""
    try:
        return [(problem.shard_id, problem.path, problem.message) for problem in verify_cache(str(root)).problems]
    except CacheError as error:
        return [(None, "", str(error))]


def shard_of(name: str) -> str | None:
    return name.split("/")[1][:5] if name.startswith(("shards/", "commits/")) else None


def is_harmless(damage: Damage) -> bool:
    """Tell whether it takes away a record that another one superseded, as a repair does."""
    return damage.kind == "deleted" and damage.name in ("commits/00000.0.json", "commits/00000.1.json")


def require_noticed(damage: Damage, cache: IntactCache) -> None:
    """Check that verification names the file, and its shard; a snapshot at the end is missed by its index alone."""
    problems = problems_of(cache.root)
    if is_harmless(damage):
        assert problems == []
        return
    names = set(damage.changes)
    if damage.name.startswith("snapshots/"):
        names.add(json.loads(cache.files[damage.name])["index"])
    shard_id = shard_of(damage.name)
    named = [message for owner, _, message in problems if owner == shard_id and any(name in message for name in names)]
    assert named, f"{damage.name} {damage.kind}: {problems}"
    assert shard_id is None or all(f"shard {shard_id}" in message for message in named)


def require_right(root: Path) -> int:
    """Read all that is there in every way; check it, and return how often a reader was refused."""
    refused = 0
    for allow_incomplete in (False, True):
        try:
            cache = open_cache(str(root), allow_incomplete=allow_incomplete)
        except CacheError:
            refused += 1
        else:
            refused += sum(is_refused(cache, sample) for sample in SAMPLES if sample.sample_id in cache)
    return refused


def is_refused(cache: TeacherCache, sample: TeacherTargets) -> bool:
    message = ""
    try:
        assert_same(cache.read([sample.sample_id])[0], sample)
    except CacheError as error:
        message = str(error)
    assert not message or f"sample {sample.sample_id!r}" in message
    return bool(message)


@pytest.mark.parametrize("options", [pytest.param("raw"), pytest.param("zstd", marks=pytest.mark.nightly)])
def test_a_file_that_is_not_the_committed_one_is_refused(options: str) -> None:
    count = refused = 0
    with quick_folder() as folder:
        cache = make_cache(folder / "cache", OPTIONS[options])
        for name in cache.files:
            for damage in cache.damages(name):
                damage.apply(cache.root)
                require_noticed(damage, cache)
                refused += require_right(cache.root)
                cache.undo(damage, cache.root)
                count += 1
        assert problems_of(cache.root) == []
    print(f"R6: {options}: {count} damages to {len(cache.files)} files: each named, {refused} reads refused, 0 wrong")


def repair(damage: Damage, cache: IntactCache, place: Path) -> None:
    """Repair a damaged cache and build it; where it says that this is not enough, restore the file first."""
    root = place / "cache"
    shutil.copytree(cache.root, root)
    damage.apply(root)
    try:
        is_beyond = bool(repair_cache(str(root)).beyond_repair)
    except CacheError:
        is_beyond = True
    assert is_beyond == damage.name.startswith(BEYOND_REPAIR), damage.kind
    if is_beyond:
        cache.undo(damage, root)
        assert {path.relative_to(root).as_posix(): path.read_bytes() for path in files_in(root)} == cache.files
    build(root, SAMPLES, per_shard=1, extend=True)
    assert problems_of(root) == []
    assert require_right(root) == 0
    assert open_cache(str(root)).sample_ids == ("sample-0", "sample-1")
    assert digests_of(root) == digests_of(cache.root)
    assert leftovers(root) == []


def digests_of(root: Path) -> list[dict[str, FileDigest]]:
    """Return the digests of the files of each shard."""
    store = open_store(str(root))
    manifest = read_manifest(store)
    standing = read_standing(store, read_plan(store, manifest), fingerprint=manifest.fingerprint)
    return [record.files for record, _ in standing.values()]


@pytest.mark.parametrize("every_file", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.nightly])])
def test_a_repair_and_a_build_restore_every_bit(every_file: bool) -> None:
    with quick_folder() as folder:
        cache = make_cache(folder / "cache", {})
        chosen = [
            damage
            for name in cache.files
            if every_file or not name.startswith("shards/") or name.split("/", 2)[2] in REPAIRED
            for damage in cache.damages(name)
        ]
        spread(chosen, lambda damage, place: repair(damage, cache, place))
    print(f"R6: {len(chosen)} damages repaired: the same bits as before, but for what only a copy restores")
