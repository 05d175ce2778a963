"""R5: a flipped bit anywhere in a cache is noticed, and no reader takes it for what was stored."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from teacher_cache import TeacherCache, open_cache
from teacher_cache.codec import stored_fields
from teacher_cache.errors import CacheError
from teacher_cache.manifest import read_manifest
from teacher_cache.plan import read_plan
from teacher_cache.schema import TIERS, Tier
from teacher_cache.shard_checks import check_file, check_shard
from teacher_cache.snapshot import map_index, read_snapshot
from teacher_cache.standing import read_standing
from teacher_cache.storage import open_store
from teacher_cache.verify import verify_cache
from tests.reliability.processes import quick_folder
from tests.teacher_cache.store import assert_same, build, make_samples

SAMPLES = make_samples(2)
KINDS: dict[str, dict[str, Any]] = {"raw": {}, "zstd": {"compression": "zstd"}, "fp8": {"codec": "fp8"}}
LEAST_FLIPS = 15_000
READ_TIERS: dict[Tier, tuple[Tier, ...]] = {"A": (), "Q": ("Q",), "L": ("L",)}
"""What is read to read the arrays of a tier."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How many bits of each file are flipped, one at a time."""

    every_byte_up_to: int
    """Length of the longest file of which every byte is damaged."""
    positions: int
    """Of a longer file."""
    in_full: int | None
    """Flips of each file that all of the verification and all reads are shown, None for every one; of the others these
    are shown the one file."""


DEFAULT = Effort(every_byte_up_to=4096, positions=500, in_full=4)
LONG = Effort(every_byte_up_to=4096, positions=2000, in_full=None)
FEW = Effort(every_byte_up_to=0, positions=100, in_full=0)


class IntactCache:
    """A cache of one shard, and what it tells before it is damaged."""

    def __init__(self, root: Path, options: dict[str, Any]) -> None:
        build(root, SAMPLES, **options)
        self.uri = str(root)
        self.store = open_store(self.uri)
        self.manifest = read_manifest(self.store)
        self.plan = read_plan(self.store, self.manifest)
        self.snapshot = read_snapshot(self.store, 0, fingerprint=self.manifest.fingerprint)
        self.index = map_index(self.store, self.snapshot)
        standing = read_standing(self.store, self.plan, fingerprint=self.manifest.fingerprint)
        (self.record,) = (record for record, _ in standing.values())
        of_shard = {f"{self.record.folder}/{path}": digest for path, digest in self.record.files.items()}
        self.digests = {**self.snapshot.files, **of_shard}
        self._reader = open_cache(self.uri)
        self._is_compressed = options.get("compression", "none") != "none"
        self.told, self.head = told_by(self._reader), self._reader.teacher_head()
        assert self.record.layout is not None
        self.fields = stored_fields(self.record.layout)
        self.samples = {
            tiers: self._reader.read(self._reader.sample_ids, tiers=tiers) for tiers in [*READ_TIERS.values(), TIERS]
        }
        if self.manifest.codec == "exact":
            for found, sample in zip(self.samples[TIERS], SAMPLES, strict=True):
                assert_same(found, sample)

    def verify(self, name: str) -> list[str]:
        """Return what verification says of one file."""
        shard_id, fingerprint = self.record.shard_id, self.manifest.fingerprint
        messages: list[str] = []
        with refusals(messages):
            if name in self.digests:
                owner = shard_id if name.startswith("shards/") else None
                problems = [*check_file(self.store, name, expected=self.digests[name], shard_id=owner, level="full")]
                messages += [problem.message for problem in problems]
            elif name == self.record.name:
                (shard,), (entry,) = self.plan.shards, self.index.shards
                check = check_shard(self.store, shard, revision=0, entry=entry, fingerprint=fingerprint, level="quick")
                messages += [problem.message for problem in check.problems]
            else:
                read_snapshot(self.store, 0, fingerprint=fingerprint)
        return messages

    def verify_all(self) -> list[str]:
        """Return what a full verification says."""
        messages: list[str] = []
        with refusals(messages):
            messages += [problem.message for problem in verify_cache(self.uri).problems]
        return messages

    def read(self, name: str) -> list[str]:
        """Take from the cache what a reader takes from one file; return what was refused, and check the rest."""
        messages: list[str] = []
        with refusals(messages):
            if name.startswith("shards/"):
                array = name.split("/")[2]
                if "/c." in name and array in self.fields:
                    # what a reader knows of a compressed array it has read once
                    cache = self._fresh() if self._is_compressed else self._reader
                    messages += self._read_samples(cache, READ_TIERS[self.fields[array].tier])
            elif name.startswith("teacher_head"):
                self._require_head(self._fresh())
            elif name.startswith("commits/"):
                self._require_told(self._fresh())
            else:
                is_indexed = name.startswith(("snapshots/", "index/"))
                self._require_told(open_cache(self.uri, allow_incomplete=not is_indexed))
        return messages

    def read_all(self) -> list[str]:
        """Take all that readers can take from the cache, like :meth:`read`."""
        messages: list[str] = []
        for allow_incomplete in (False, True):
            with refusals(messages):
                cache = open_cache(self.uri, allow_incomplete=allow_incomplete)
                messages += self._read_samples(cache, TIERS)
                with refusals(messages):
                    self._require_told(cache)
                with refusals(messages):
                    self._require_head(cache)
        return messages

    def _fresh(self) -> TeacherCache:
        return TeacherCache(self.store, manifest=self.manifest, data=self.snapshot.data, index=self.index, snapshot=0)

    def _read_samples(self, cache: TeacherCache, tiers: tuple[Tier, ...]) -> list[str]:
        messages: list[str] = []
        for sample in self.samples[tiers]:
            refused: list[str] = []
            with refusals(refused):
                assert_same(cache.read([sample.sample_id], tiers=tiers)[0], sample)
            assert all(f"shard {self.record.shard_id}, sample {sample.sample_id!r}" in message for message in refused)
            messages += refused
        return messages

    def _require_head(self, cache: TeacherCache) -> None:
        assert cache.teacher_head().weight.equal(self.head.weight)

    def _require_told(self, cache: TeacherCache) -> None:
        assert told_by(cache) == self.told


def told_by(cache: TeacherCache) -> tuple[object, ...]:
    return cache.identity, cache.provenance, cache.sample_ids, [cache.sample_digest(id_) for id_ in cache.sample_ids]


@contextmanager
def refusals(messages: list[str]) -> Iterator[None]:
    """Note why the cache refuses what is done within the block, if it does."""
    try:
        yield
    except CacheError as error:
        messages.append(str(error))


@contextmanager
def flipped_bit(path: Path, intact: bytes, *, byte: int, bit: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, bytes([intact[byte] ^ 1 << bit]), byte)
        yield
        os.pwrite(descriptor, intact[byte : byte + 1], byte)
    finally:
        os.close(descriptor)


def positions_in(intact: bytes, effort: Effort, chooser: random.Random) -> list[int]:
    """Choose which bytes are damaged; half of them where something is stored, for most of a last chunk is padding."""
    if len(intact) <= max(effort.every_byte_up_to, effort.positions):
        return list(range(len(intact)))
    stored = [place for place, byte in enumerate(intact) if byte]
    chosen = set(chooser.sample(stored, min(effort.positions // 2, len(stored))))
    others = [place for place in range(len(intact)) if place not in chosen]
    return [*chosen, *chooser.sample(others, effort.positions - len(chosen))]


def flip_bits(options: dict[str, Any], *, effort: Effort) -> Counter[str]:
    """Flip bits in every file of a cache, each alone; count what came of it."""
    counts: Counter[str] = Counter()
    chooser = random.Random(0)
    with quick_folder() as folder:
        cache = IntactCache(folder / "cache", options)
        for name in [entry.name for entry in cache.store.list("")]:
            path = folder / "cache" / name
            intact = path.read_bytes()
            places = positions_in(intact, effort, chooser)
            in_full = set(places if effort.in_full is None else chooser.sample(places, effort.in_full))
            shard = f"shard {cache.record.shard_id}" if name.startswith(("shards/", "commits/")) else ""
            for place in places:
                with flipped_bit(path, intact, byte=place, bit=chooser.randrange(8)):
                    noticed = cache.verify(name)
                    noticed_in_full = cache.verify_all() if place in in_full else noticed
                    refused = cache.read(name)
                    refused_in_full = cache.read_all() if place in in_full else refused
                assert noticed, f"byte {place} of {name} is not noticed"
                assert any(name in message for message in noticed_in_full)
                assert not refused or any(name in message for message in refused_in_full)
                for message in [*refused, *noticed]:
                    assert str(path) in message, message
                    assert shard in message, message
                counts.update(flips=1, refused=bool(refused), same=not refused)
            counts["files"] += 1
    return counts


@pytest.mark.parametrize("kind", ["raw", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "raw")])
@pytest.mark.parametrize(
    "effort",
    [pytest.param(DEFAULT, id="default"), pytest.param(LONG, id="long", marks=[pytest.mark.slow, pytest.mark.nightly])],
)
def test_every_flipped_bit_is_noticed(kind: str, effort: Effort) -> None:
    counts = flip_bits(KINDS[kind], effort=effort)
    assert counts["flips"] >= LEAST_FLIPS
    assert counts["refused"] > 0
    print(
        f"R5: {kind}: {counts['flips']} flips in {counts['files']} files: all noticed by verification; readers refused "
        f"{counts['refused']} and met {counts['same']} that change nothing they read: 0 wrong data"
    )
