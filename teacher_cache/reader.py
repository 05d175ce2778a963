"""Opens caches for reading: checked on open, random access by sample id, verified rows."""

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from teacher_cache.codec import decode_targets, load_teacher_head
from teacher_cache.errors import CacheCorrupt, CacheError, CacheIncomplete
from teacher_cache.ledger import CommitRecord, committed_shards, read_record, record_path
from teacher_cache.manifest import Manifest, read_manifest, read_plan
from teacher_cache.schema import SkippedSample, TeacherHead, TeacherTargets
from teacher_cache.seal import read_seal
from teacher_cache.shard import ShardReader
from teacher_cache.storage import local_root, require_digest

_OPEN_SHARDS = 64
_TIERS = {
    "hidden_states": "A",
    "question_hidden_states": "Q",
    "topk_ids": "L",
    "topk_logprobs": "L",
    "logsumexp": "L",
    "target_logprobs": "L",
}


def open_cache(uri: str, *, allow_incomplete: bool = False) -> "TeacherCache":
    """Open a cache for reading: what is committed now, unchanged by a build that goes on.

    Reads the manifest, the plan and all commit records, and no tensor.

    Raises:
        CacheNotFound: there is no cache.
        CacheIncomplete: planned shards are missing and ``allow_incomplete`` is not set.
        CacheCorrupt: what was read differs from what was committed.
        FormatUnsupported: the cache was written in another format version.
    """
    root = local_root(uri)
    manifest = read_manifest(root)
    plan = read_plan(root, manifest)
    seal = read_seal(root, manifest)
    committed = plan.shards if seal is not None else committed_shards(root, plan)
    if len(committed) < len(plan.shards) and not allow_incomplete:
        done = {shard.shard_id for shard in committed}
        missing = [shard.shard_id for shard in plan.shards if shard.shard_id not in done]
        raise CacheIncomplete(
            f"the cache at {uri} lacks {len(missing)} of {len(plan.shards)} shards ({', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}); run the build again to complete it"
        )
    sealed = {} if seal is None else seal.files
    records = [
        read_record(
            root,
            shard,
            fingerprint=manifest.fingerprint,
            sealed=sealed.get(record_path(root, shard.shard_id).relative_to(root).as_posix()),
        )
        for shard in committed
    ]
    return TeacherCache(root, manifest=manifest, records=records)


class TeacherCache:
    """Committed samples of one cache. May be shared by threads, forked and pickled."""

    def __init__(self, root: Path, *, manifest: Manifest, records: list[CommitRecord]) -> None:
        """Take checked records; use :func:`open_cache`."""
        self._root = root
        self._manifest = manifest
        self._records = records
        self.sample_ids = tuple(sample_id for record in records for sample_id in record.samples.sample_id)
        """Ids of the stored samples, in planned order."""
        self._index = {
            sample_id: (shard, row)
            for shard, record in enumerate(records)
            for row, sample_id in enumerate(record.samples.sample_id)
        }
        layouts = {record.layout for record in records if record.layout is not None}
        if len(layouts) > 1:
            raise CacheCorrupt(f"the shards of {root} differ in dtype, hidden size or top-k: {layouts}")
        self._layout = next(iter(layouts), None)
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)

    @property
    def skipped(self) -> tuple[SkippedSample, ...]:
        """Bad samples that the build left out."""
        return tuple(sample for record in self._records for sample in record.skipped)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the content: teacher, processing, data, targets."""
        return self._manifest.identity

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the identity."""
        return self._manifest.fingerprint

    @property
    def provenance(self) -> dict[str, Any]:
        """How the cache came about; ``shards`` lists the same per shard."""
        shards = [{"shard_id": record.shard_id, **record.provenance} for record in self._records]
        return {**self._manifest.provenance, "shards": shards}

    @property
    def hidden_size(self) -> int:
        """Columns of the hidden states."""
        if self._layout is not None:
            return self._layout.hidden_size
        return self._head_entry().hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the teacher head."""
        return self._head_entry().vocab_size

    def read(self, sample_ids: Iterable[str]) -> list[TeacherTargets]:
        """Return the targets of these samples, in this order; reads only their rows, shard by shard.

        Raises:
            CacheError: an id is not stored.
            CacheCorrupt: stored bytes differ from what was committed.
        """
        asked = list(sample_ids)
        rows: dict[int, dict[int, None]] = defaultdict(dict)
        for sample_id in asked:
            shard, row = self._locate(sample_id)
            rows[shard][row] = None
        found: dict[str, TeacherTargets] = {}
        for shard in sorted(rows):
            found |= self._read_shard(shard, sorted(rows[shard]))
        return [found[sample_id] for sample_id in asked]

    def sample_digest(self, sample_id: str) -> str:
        """Return the digest of the sample that the teacher saw."""
        shard, row = self._locate(sample_id)
        return self._records[shard].samples.digest[row]

    def answer_tokens(self, sample_id: str) -> int:
        """Return the number of supervised teacher tokens, all turns together."""
        shard, row = self._locate(sample_id)
        return self._records[shard].samples.answer_tokens[row]

    def num_tokens(self, sample_id: str) -> int:
        """Return the number of teacher tokens, images expanded."""
        shard, row = self._locate(sample_id)
        return self._records[shard].samples.num_tokens[row]

    def tier_bytes(self) -> dict[str, int]:
        """Return the stored bytes per tier: A, Q and L."""
        return tier_bytes(self._records)

    def teacher_head(self) -> TeacherHead:
        """Return the teacher's output projection, after checking its digest.

        Raises:
            CacheError: the cache was built without one.
        """
        entry = self._head_entry()
        path = self._root / entry.file
        require_digest(path, expected=entry.digest, where="teacher head")
        return load_teacher_head(path)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._index

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._root, self._manifest, self._records)

    def _head_entry(self) -> Any:
        if self._manifest.teacher_head is None:
            raise CacheError(f"the cache at {self._root} was built without a teacher head")
        return self._manifest.teacher_head

    def _locate(self, sample_id: str) -> tuple[int, int]:
        try:
            return self._index[sample_id]
        except KeyError:
            skipped = {sample.sample_id: sample.reason for sample in self.skipped}
            reason = f"it was skipped ({skipped[sample_id]})" if sample_id in skipped else "no committed shard names it"
            raise CacheError(f"sample {sample_id!r} is not in the cache at {self._root}: {reason}") from None

    def _open_shard(self, shard: int) -> ShardReader:
        record = self._records[shard]
        return ShardReader(record.folder(self._root), record)

    def _read_shard(self, shard: int, rows: list[int]) -> dict[str, TeacherTargets]:
        table, layout = self._records[shard].samples, self._records[shard].layout
        assert layout is not None
        return {
            table.sample_id[row]: decode_targets(
                table.sample_id[row],
                arrays,
                layout=layout,
                has_question_rows=table.question_rows[row] is not None,
            )
            for row, arrays in zip(rows, self._shard(shard).read(rows), strict=True)
        }


def tier_bytes(records: Iterable[CommitRecord]) -> dict[str, int]:
    """Return the stored bytes per tier (A, Q, L) of some shards."""
    totals = {"A": 0, "Q": 0, "L": 0}
    for record in records:
        for path, digest in record.files.items():
            tier = _TIERS.get(path.split("/")[0])
            if tier is not None:
                totals[tier] += digest.size_bytes
    return totals


def _rebuild(root: Path, manifest: Manifest, records: list[CommitRecord]) -> TeacherCache:
    return TeacherCache(root, manifest=manifest, records=records)
