"""Creates caches and commits shards: whole, durable, exactly once, from any number of processes."""

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.codec import axis_lengths, encode_targets, layout_of, save_teacher_head
from teacher_cache.documents import plain_json
from teacher_cache.errors import CacheError, CacheMismatch, CacheNotFound, ConfigError, TeacherError
from teacher_cache.ledger import CommitRecord, SampleTable, committed_shards, read_record, record_path
from teacher_cache.manifest import (
    HeadEntry,
    Manifest,
    Plan,
    PlannedShard,
    check_plan,
    encode_plan,
    fingerprint,
    read_manifest,
    read_plan,
    require_identity,
)
from teacher_cache.schema import SkippedSample, TeacherHead, TeacherTargets
from teacher_cache.seal import LEFTOVERS, seal_if_complete
from teacher_cache.shard import checksum, write_shard
from teacher_cache.storage import (
    COMMITS,
    MANIFEST,
    SHARDS,
    STAGING,
    digest_file,
    local_root,
    make_folder,
    move_folder,
    publish,
    publish_bytes,
    remove,
    sync_folder,
    sync_tree,
)

logger = logging.getLogger(__name__)


def create_or_open_builder(
    uri: str,
    *,
    identity: dict[str, Any],
    plan: Sequence[PlannedShard],
    provenance: dict[str, Any],
    head: TeacherHead | None,
) -> "CacheWriter":
    """Create a cache, or open one that holds the same content to go on with it.

    A cache that exists keeps its own plan: the asked plan may group the same samples in another way.

    Raises:
        CacheMismatch: the existing cache has another identity or other samples.
        ConfigError: the identity has no stable form, or the plan or the URI cannot be used.
    """
    root = local_root(uri)
    asked = check_plan(plan)
    identity, provenance = plain_json(identity), plain_json(provenance)
    try:
        manifest = read_manifest(root)
    except CacheNotFound:
        manifest = _create(root, identity=identity, plan=asked, provenance=provenance, head=head)
    require_identity(manifest, asked=identity, where=uri)
    stored = read_plan(root, manifest)
    _require_same_samples(stored=stored, asked=asked, where=uri)
    seal_if_complete(root, manifest=manifest, plan=stored)
    return CacheWriter(uri=uri, fingerprint=manifest.fingerprint)


@dataclass(frozen=True)
class CacheWriter:
    """Commits shards of one cache. Pickles as its two fields, so it can be sent to workers."""

    uri: str
    fingerprint: str

    def missing_shards(self) -> list[PlannedShard]:
        """Return the planned shards that are not committed, in planned order."""
        done = {shard.shard_id for shard in committed_shards(self._root, self._plan)}
        return [shard for shard in self._plan.shards if shard.shard_id not in done]

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
            TeacherError: targets fail their checks; nothing is written.
            CacheError: the file system refused a step; the shard may be tried again.
        """
        shard = self._planned(shard_id)
        targets = _in_planned_order(shard, targets=targets, skipped=skipped, digests=sample_digests)
        if record_path(self._root, shard_id).exists():
            return self._standing_record(shard)
        arrays = self._encode(targets)
        attempt = uuid.uuid4().hex
        record = CommitRecord(
            shard_id=shard_id,
            attempt=attempt,
            fingerprint=self.fingerprint,
            layout=layout_of(targets[0]) if targets else None,
            samples=_sample_table(targets, arrays=arrays, digests=sample_digests),
            skipped=tuple(replace(sample, message=_as_unicode(sample.message)) for sample in skipped),
            files={},
            provenance=plain_json(provenance),
        )
        try:
            won = self._commit(record, arrays)
        except OSError as error:
            swept = isinstance(error, FileNotFoundError) and record_path(self._root, shard_id).exists()
            if not swept:
                size = sum(array.nbytes for sample in arrays for array in sample.values())
                raise CacheError(f"shard {shard_id}: cannot write {size} bytes to {self._root}: {error}") from error
            won = False
        finally:
            remove(self._root / STAGING / f"{shard_id}-{attempt}")
        if not won:
            logger.info("shard %s: another attempt committed it first; this one is dropped", shard_id)
            remove(record.folder(self._root))
        else:
            seal_if_complete(self._root, manifest=self._manifest, plan=self._plan)
        return self._standing_record(shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheWriter, (self.uri, self.fingerprint)

    @cached_property
    def _root(self) -> Path:
        return local_root(self.uri)

    @cached_property
    def _manifest(self) -> Manifest:
        manifest = read_manifest(self._root)
        if manifest.fingerprint != self.fingerprint:
            raise CacheMismatch(
                f"{self.uri} now holds cache {manifest.fingerprint[:16]}, but {self.fingerprint[:16]} was opened; "
                "do not replace a cache while it is being built"
            )
        return manifest

    @cached_property
    def _plan(self) -> Plan:
        return read_plan(self._root, self._manifest)

    def _planned(self, shard_id: str) -> PlannedShard:
        for shard in self._plan.shards:
            if shard.shard_id == shard_id:
                return shard
        raise CacheMismatch(f"shard {shard_id!r} is not planned in {self.uri}; take shards from missing_shards()")

    def _standing_record(self, shard: PlannedShard) -> CommitRecord:
        sync_folder(self._root / COMMITS)
        return read_record(self._root, shard, fingerprint=self.fingerprint)

    def _encode(self, targets: Sequence[TeacherTargets]) -> list[dict[str, np.ndarray]]:
        if not targets:
            return []
        head, layout = self._manifest.teacher_head, layout_of(targets[0])
        if head is not None and layout.hidden_size != head.hidden_size:
            raise TeacherError(
                f"sample {targets[0].sample_id!r}: hidden_states has {layout.hidden_size} columns, "
                f"the stored teacher head takes {head.hidden_size}"
            )
        vocab_size = None if head is None else head.vocab_size
        return [encode_targets(sample, layout=layout, vocab_size=vocab_size) for sample in targets]

    def _commit(self, record: CommitRecord, arrays: Sequence[Mapping[str, np.ndarray]]) -> bool:
        if record.layout is not None:
            staged = self._root / STAGING / f"{record.shard_id}-{record.attempt}"
            attributes = {
                "genrecal_fingerprint": record.fingerprint,
                "genrecal_shard_id": record.shard_id,
                "sample_ids": list(record.samples.sample_id),
            }
            offsets = record.samples.offsets()
            write_shard(staged, arrays, layout=record.layout, offsets=offsets, attributes=attributes)
            record = record.model_copy(update={"files": sync_tree(staged)})
            move_folder(staged, record.folder(self._root))
        data = record.encode()
        return publish_bytes(data, record_path(self._root, record.shard_id), staging=self._root / STAGING)


def _create(
    root: Path, *, identity: dict[str, Any], plan: Plan, provenance: dict[str, Any], head: TeacherHead | None
) -> Manifest:
    if root.exists():
        foreign = sorted(path.name for path in root.iterdir() if not LEFTOVERS.fullmatch(path.name))
        if foreign:
            raise ConfigError(f"{root} holds no cache but other files ({', '.join(foreign[:3])}); give an empty folder")
    try:
        for name in (SHARDS, COMMITS, STAGING):
            make_folder(root / name)
        plan_bytes, plan_entry = encode_plan(plan)
        publish_bytes(plan_bytes, root / plan_entry.file, staging=root / STAGING)
        manifest = Manifest(
            identity=identity,
            fingerprint=fingerprint(identity),
            plan=plan_entry,
            teacher_head=None if head is None else _store_head(root, head),
            provenance=provenance,
        )
        publish_bytes(manifest.encode(), root / MANIFEST, staging=root / STAGING)
    except OSError as error:
        raise CacheError(f"cannot create a cache at {root}: {error}") from error
    return read_manifest(root)


def _store_head(root: Path, head: TeacherHead) -> HeadEntry:
    staged = root / STAGING / f"teacher_head.{uuid.uuid4().hex}"
    save_teacher_head(head, staged)
    digest = digest_file(staged)
    vocab_size, hidden_size = head.weight.shape
    entry = HeadEntry(
        file=f"teacher_head-{digest.sha256[:16]}.safetensors",
        digest=digest,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
    )
    publish(staged, root / entry.file)
    return entry


def _sample_table(
    targets: Sequence[TeacherTargets], *, arrays: Sequence[Mapping[str, np.ndarray]], digests: dict[str, str]
) -> SampleTable:
    lengths = [axis_lengths(sample.spans, num_tokens=len(sample.token_ids)) for sample in targets]
    return SampleTable(
        sample_id=tuple(sample.sample_id for sample in targets),
        digest=tuple(digests[sample.sample_id] for sample in targets),
        num_tokens=tuple(row["tokens"] for row in lengths),
        num_turns=tuple(row["turns"] for row in lengths),
        answer_tokens=tuple(row["answer_tokens"] for row in lengths),
        question_rows=tuple(
            None if sample.question_hidden_states is None else row["tier_q"]
            for sample, row in zip(targets, lengths, strict=True)
        ),
        crc32={name: tuple(checksum(sample[name]) for sample in arrays) for name in (arrays[0] if arrays else ())},
    )


def _in_planned_order(
    shard: PlannedShard,
    *,
    targets: Sequence[TeacherTargets],
    skipped: Sequence[SkippedSample],
    digests: dict[str, str],
) -> list[TeacherTargets]:
    found = [sample.sample_id for sample in targets] + [sample.sample_id for sample in skipped]
    if sorted(found) != sorted(shard.sample_ids):
        absent, extra = set(shard.sample_ids) - set(found), set(found) - set(shard.sample_ids)
        raise CacheMismatch(
            f"shard {shard.shard_id}: {len(shard.sample_ids)} samples are planned, {len(found)} were given; "
            f"absent {sorted(absent)[:5]}, not planned {sorted(extra)[:5]}; give each planned sample once"
        )
    undigested = sorted(sample.sample_id for sample in targets if sample.sample_id not in digests)
    if undigested:
        raise CacheMismatch(f"shard {shard.shard_id}: sample_digests lacks {undigested[:5]}")
    order = {sample_id: index for index, sample_id in enumerate(shard.sample_ids)}
    return sorted(targets, key=lambda sample: order[sample.sample_id])


def _as_unicode(text: str) -> str:
    """Escape the lone surrogates that stand for undecodable bytes in file names."""
    return text.encode(errors="backslashreplace").decode()


def _require_same_samples(*, stored: Plan, asked: Plan, where: str) -> None:
    left = {sample_id for shard in stored.shards for sample_id in shard.sample_ids}
    right = {sample_id for shard in asked.shards for sample_id in shard.sample_ids}
    if left != right:
        raise CacheMismatch(
            f"the cache at {where} was planned for other samples: {len(left)} stored, {len(right)} asked; only stored "
            f"{sorted(left - right)[:5]}, only asked {sorted(right - left)[:5]}; give the run another cache uri"
        )
