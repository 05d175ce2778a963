"""Creates caches and commits shards: whole, durable, exactly once, from any number of processes."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from teacher_cache.checked_file import checked_file
from teacher_cache.codec import encode_teacher_head, load_teacher_head
from teacher_cache.config import Compression, RowCodec, Sharing
from teacher_cache.documents import plain_json
from teacher_cache.durable_files import digest_bytes
from teacher_cache.errors import CacheCorrupt, CacheError, CacheMismatch, CacheNotFound, ConfigError
from teacher_cache.gc import LEFTOVERS, find_leftovers, sweep
from teacher_cache.ledger import COMMITS, CommitRecord, record_name
from teacher_cache.local_store import LocalStore
from teacher_cache.manifest import (
    LIMIT_BYTES,
    MANIFEST,
    HeadEntry,
    Manifest,
    fingerprint,
    read_manifest,
    require_identity,
)
from teacher_cache.plan import (
    PLANS,
    Plan,
    PlannedShard,
    append_generation,
    check_plan,
    first_generation,
    read_plan,
    require_samples,
)
from teacher_cache.schema import SkippedSample, TeacherHead, TeacherTargets
from teacher_cache.shard_attempt import ShardAttempt
from teacher_cache.snapshot import SNAPSHOTS, publish_snapshot
from teacher_cache.standing import read_record, read_standing, standing_revisions
from teacher_cache.storage import Store, open_store, require_create

if TYPE_CHECKING:
    from teacher_cache.teacher_copy import TeacherCopy

logger = logging.getLogger(__name__)

_HEAD_ENTRY_BYTES = 1024
"""More than a manifest says of a head."""


def create_or_open_builder(
    uri: str,
    *,
    identity: dict[str, Any],
    plan: Sequence[PlannedShard],
    provenance: dict[str, Any],
    head: TeacherHead | None,
    codec: RowCodec = "exact",
    compression: Compression = "none",
    sharing: Sharing = "private",
    extend: bool = False,
    teacher: "TeacherCopy | None" = None,
) -> "CacheWriter":
    """Create a cache, or open one that holds the same content to go on with it.

    A cache that exists keeps its own plan: the asked plan may group the same samples in another way, or name some of
    them only. With ``extend``, shards of samples that the cache does not plan yet are added to its plan.

    Raises:
        CacheMismatch: the existing cache has another identity, codec or other samples.
        ConfigError: the identity has no stable form, or the plan or the URI cannot be used.
    """
    asked = check_plan(plan)
    identity, provenance = plain_json({**identity, "codec": codec}), plain_json(provenance)
    with _store_errors(f"cannot create or open the cache at {uri}"):
        store = open_store(uri)
        try:
            manifest = read_manifest(store)
        except CacheNotFound:
            store = open_store(uri, create=True, sharing=sharing)
            if not isinstance(store, LocalStore):
                require_create(store)
            manifest = _create(store, identity=identity, plan=asked, provenance=provenance, head=head, codec=codec)
        require_identity(manifest, asked=identity, where=uri)
        stored = read_plan(store, manifest)
        # whoever wrote the plan may have died before its name was durable
        store.sync(PLANS)
        digests = Plan(shards=asked, generations=()).digests()
        require_samples(stored, asked=digests, where=uri, extend=extend)
        if new := _new_shards(stored, asked=asked):
            append_generation(store, manifest, stored=stored, shards=new)
    writer = CacheWriter(uri=uri, fingerprint=manifest.fingerprint, compression=compression, teacher=teacher)
    writer.complete()
    return writer


@dataclass(frozen=True)
class CacheWriter:
    """Commits shards of one cache. Pickles as its fields, so it can be sent to workers."""

    uri: str
    fingerprint: str
    compression: Compression = "none"
    teacher: "TeacherCopy | None" = None
    """What the copies of the teacher are compared with that workers load."""

    def missing_shards(self) -> list[PlannedShard]:
        """Return the planned shards that are not committed, in planned order."""
        standing = standing_revisions(self.store)
        # only a later revision may withdraw a shard
        later = Plan(shards=tuple(s for s in self.plan.shards if standing.get(s.shard_id, 0) > 0), generations=())
        records = read_standing(self.store, later, fingerprint=self.fingerprint) if later.shards else {}
        withdrawn = {shard_id for shard_id, (record, _) in records.items() if record.withdrawn is not None}
        done = standing.keys() - withdrawn
        return [shard for shard in self.plan.shards if shard.shard_id not in done]

    def start_shard(self, shard_id: str) -> ShardAttempt:
        """Start to write a shard sample by sample.

        Raises:
            CacheMismatch: the shard is not planned.
            CacheError: the store does not tell which records there are.
        """
        shard = self._planned.get(shard_id)
        if shard is None:
            raise CacheMismatch(f"shard {shard_id!r} is not planned in {self.uri}; take shards from missing_shards()")
        if self._has_later_record(shard_id):
            self._listed.update(standing_revisions(self.store))
        previous = self._record(shard, self._listed) if shard_id in self._listed else None
        return ShardAttempt(self, shard, previous=previous)

    def commit_shard(
        self,
        shard_id: str,
        targets: Sequence[TeacherTargets],
        *,
        sample_digests: dict[str, str],
        skipped: Sequence[SkippedSample],
        provenance: dict[str, Any],
    ) -> CommitRecord:
        """Write a shard durably and commit it; return the record that now stands.

        When another attempt has committed the shard, that one stands and this one leaves nothing behind.

        Raises:
            CacheMismatch: the samples are not the planned ones.
            TeacherError: targets fail their checks; nothing is committed.
            CacheError: the store refused a step; the shard may be tried again.
        """
        with self.start_shard(shard_id) as attempt:
            attempt.require_planned([sample.sample_id for sample in targets], skipped=skipped, digests=sample_digests)
            order = {sample_id: place for place, sample_id in enumerate(attempt.shard.sample_ids)}
            for sample in sorted(targets, key=lambda sample: order[sample.sample_id]):
                attempt.append(sample)
            record = attempt.commit(skipped=skipped, provenance=provenance)
        self.note_committed(shard_id)
        return record

    def note_committed(self, shard_id: str) -> None:
        """Complete the cache when this was the last of the shards that were missing.

        Raises:
            CacheError: the store refused a step.
        """
        self._open_shards.discard(shard_id)
        if not self._open_shards:
            self.complete()

    def complete(self) -> bool:
        """Make the snapshot of a complete cache and remove what lost attempts left; say whether it is complete.

        Any number of processes may do this at once.

        Raises:
            CacheError: the store refused a step.
        """
        standing = standing_revisions(self.store)
        if any(shard.shard_id not in standing for shard in self.plan.shards):
            return False
        with _store_errors(f"{self.uri}: all shards are committed, but what is left over cannot be removed"):
            found = find_leftovers(self.store)
            records = publish_snapshot(self.store, manifest=self.manifest)
            if records is None:
                return False
            sweep(self.store, found=found, manifest=self.manifest, records=records)
        return True

    def standing_record(self, shard: PlannedShard) -> CommitRecord:
        """Return the record that stands for a committed shard, once its name is durable.

        Raises:
            CacheCorrupt: it is gone.
            CacheError: the store refused a step.
        """
        with _store_errors(f"shard {shard.shard_id}: cannot make sure of its record in {self.uri}/{COMMITS}"):
            self.store.sync(COMMITS)
        return self._record(shard, standing_revisions(self.store))

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheWriter, (self.uri, self.fingerprint, self.compression, self.teacher)

    @cached_property
    def store(self) -> Store:
        """The files of the cache."""
        return open_store(self.uri)

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest that was there when the writer was opened.

        Raises:
            CacheMismatch: another cache has taken its place.
        """
        manifest = read_manifest(self.store)
        if manifest.fingerprint != self.fingerprint:
            raise CacheMismatch(
                f"{self.uri} now holds cache {manifest.fingerprint[:16]}, but {self.fingerprint[:16]} was opened; "
                "do not replace a cache while it is being built"
            )
        return manifest

    @cached_property
    def plan(self) -> Plan:
        """All planned shards."""
        return read_plan(self.store, self.manifest)

    @cached_property
    def head(self) -> TeacherHead | None:
        """The stored teacher head."""
        entry = self.manifest.teacher_head
        if entry is None:
            return None
        with checked_file(self.store, entry.file, expected=entry.digest, where="teacher head") as path:
            return load_teacher_head(path, vocab_size=entry.vocab_size, hidden_size=entry.hidden_size)

    @cached_property
    def _planned(self) -> dict[str, PlannedShard]:
        return {shard.shard_id: shard for shard in self.plan.shards}

    @cached_property
    def _listed(self) -> dict[str, int]:
        """The revisions that stood when records were listed last: a listing for every shard would be quadratic."""
        return standing_revisions(self.store)

    def _has_later_record(self, shard_id: str) -> bool:
        with _store_errors(f"shard {shard_id}: cannot look for its record in {self.uri}/{COMMITS}"):
            return self.store.size(record_name(shard_id, self._listed.get(shard_id, -1) + 1)) is not None

    @cached_property
    def _open_shards(self) -> set[str]:
        """Shards that this writer has not seen committed: with the last of them it looks whether all are."""
        return {shard.shard_id for shard in self.missing_shards()}

    def _record(self, shard: PlannedShard, standing: dict[str, int]) -> CommitRecord:
        revision = standing.get(shard.shard_id)
        if revision is None:
            raise CacheCorrupt(
                f"shard {shard.shard_id}: its commit record is gone from {self.uri}/{COMMITS}; run the build again"
            )
        return read_record(self.store, shard, revision=revision, fingerprint=self.fingerprint)[0]


def _create(
    store: Store,
    *,
    identity: dict[str, Any],
    plan: Sequence[PlannedShard],
    provenance: dict[str, Any],
    head: TeacherHead | None,
    codec: RowCodec,
) -> Manifest:
    foreign = [entry.name for entry in store.list("") if not LEFTOVERS.fullmatch(entry.name)]
    if foreign and store.size(MANIFEST) is None:
        if any(name.startswith((f"{COMMITS}/", f"{SNAPSHOTS}/")) for name in foreign):
            raise CacheCorrupt(f"{store.uri}/{MANIFEST} is missing from what was a cache; restore it from a copy")
        raise ConfigError(
            f"{store.uri} holds no cache but other files ({', '.join(foreign[:3])}); give an empty folder"
        )
    plan_bytes, plan_entry = first_generation(plan)
    manifest = Manifest(
        identity=identity,
        fingerprint=fingerprint(identity),
        codec=codec,
        plan=plan_entry,
        teacher_head=None,
        provenance=provenance,
    )
    size = len(manifest.encode()) + _HEAD_ENTRY_BYTES
    if size > LIMIT_BYTES:  # looked at before the first file is there, so that nothing is left behind
        raise ConfigError(
            f"the manifest of {store.uri} would have {size} bytes, at most {LIMIT_BYTES} are read; say less in its "
            "provenance or its identity"
        )
    if not store.create_content(plan_entry.file, plan_bytes):
        raise CacheError(f"{store.uri}/{plan_entry.file} holds other bytes than its name says; remove it")
    if head is not None:
        manifest = manifest.model_copy(update={"teacher_head": _store_head(store, head)})
    store.create(MANIFEST, manifest.encode())
    standing = read_manifest(store)
    if standing.plan != manifest.plan:  # another builder was first
        store.remove(manifest.plan.file)
    if manifest.teacher_head not in (None, standing.teacher_head):
        store.remove(manifest.teacher_head.file)
    return standing


def _store_head(store: Store, head: TeacherHead) -> HeadEntry:
    data = encode_teacher_head(head)
    digest = digest_bytes(data)
    name = f"teacher_head-{digest.blake3[:16]}.safetensors"
    if not store.create_content(name, data):
        raise CacheError(f"{store.uri}/{name} holds other bytes than its name says; remove it and build again")
    vocab_size, hidden_size = head.weight.shape
    return HeadEntry(file=name, digest=digest, vocab_size=vocab_size, hidden_size=hidden_size)


def _new_shards(stored: Plan, *, asked: Sequence[PlannedShard]) -> list[PlannedShard]:
    """Return the asked shards that hold new samples; a shard must not mix them with stored ones."""
    planned = stored.digests()
    new = [shard for shard in asked if any(sample_id not in planned for sample_id in shard.sample_ids)]
    for shard in new:
        known = [sample_id for sample_id in shard.sample_ids if sample_id in planned]
        if known:
            raise ConfigError(
                f"shard {shard.shard_id}: it mixes new samples with stored ones, first {known[0]!r}; "
                "plan new samples apart"
            )
    return new


@contextmanager
def _store_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"{what}: {error}; free space or mend the store, then run the build again") from error
