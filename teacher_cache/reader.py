"""Opens caches for reading: checked on open, random access by sample id, verified rows."""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property, lru_cache, partial
from typing import Any

from teacher_cache.checked_file import checked_file
from teacher_cache.codec import Layout, decode_targets, load_teacher_head, stored_fields
from teacher_cache.durable_files import digest_bytes
from teacher_cache.errors import CacheCorrupt, CacheError, CacheIncomplete
from teacher_cache.ledger import decode_record
from teacher_cache.manifest import HeadEntry, Manifest, fingerprint, read_document, read_manifest
from teacher_cache.plan import read_plan
from teacher_cache.sample_index import SampleIndex
from teacher_cache.schema import TIERS, SkippedSample, TeacherHead, TeacherTargets, Tier
from teacher_cache.shard_reader import RowRange, ShardReader
from teacher_cache.snapshot import latest_snapshot, map_index, read_snapshot, snapshot_name
from teacher_cache.standing import read_standing
from teacher_cache.storage import Store, open_store

_OPEN_SHARDS = 32


def open_cache(uri: str, *, allow_incomplete: bool = False, snapshot: int | None = None) -> "TeacherCache":
    """Open a cache for reading: a complete state of it, unchanged by a build that goes on.

    Reads the manifest, a snapshot and the index of the samples, and no tensor.

    Args:
        uri: Where the cache lies.
        allow_incomplete: Open what is committed now, complete or not.
        snapshot: Number of the snapshot to open, by default the latest.

    Raises:
        CacheNotFound: there is no cache.
        CacheIncomplete: planned shards are missing and ``allow_incomplete`` is not set.
        CacheCorrupt: what was read differs from what was committed.
        CacheError: there is no snapshot of that number.
        FormatUnsupported: the cache was written in another format version.
    """
    store = open_store(uri)
    manifest = read_manifest(store)
    latest = latest_snapshot(store)
    number = latest if snapshot is None else snapshot
    if allow_incomplete:
        return _open_committed(store, manifest)
    if number is None:
        plan = read_plan(store, manifest)
        done = _open_committed(store, manifest).shard_ids
        missing = [shard.shard_id for shard in plan.shards if shard.shard_id not in done]
        if not missing:
            raise CacheIncomplete(
                f"all shards of the cache at {uri} are committed, but its snapshot is not written yet; "
                "run the build again to write it"
            )
        raise CacheIncomplete(
            f"the cache at {uri} lacks {len(missing)} of {len(plan.shards)} shards ({', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}); run the build again to complete it"
        )
    if number < 0 or (number > (-1 if latest is None else latest) and store.size(snapshot_name(number)) is None):
        raise CacheError(f"the cache at {uri} has no snapshot {number}; its latest is {latest}")
    return _open_snapshot(store, manifest, number)


class TeacherCache:
    """Committed samples of one cache. May be shared by threads, forked and pickled."""

    def __init__(
        self, store: Store, *, manifest: Manifest, data: dict[str, Any], index: SampleIndex, snapshot: int | None
    ) -> None:
        """Take checked parts; use :func:`open_cache`."""
        self._store = store
        self._manifest = manifest
        self._data = data
        self._index = index
        self.snapshot = snapshot
        """Number of the snapshot that is read, None for a cache that was opened incomplete."""
        layouts = {shard.layout for shard in index.shards if shard.layout is not None}
        if len({(layout.dtype, layout.codec, layout.hidden_size, layout.topk) for layout in layouts}) > 1:
            raise CacheCorrupt(f"the shards of {store.uri} differ in dtype, codec, hidden size or top-k: {layouts}")
        self._layout: Layout | None = next(iter(layouts), None)
        head = manifest.teacher_head
        if self._layout is not None and (
            self._layout.codec != manifest.codec or (head and head.hidden_size != self._layout.hidden_size)
        ):
            raise CacheCorrupt(f"{store.uri}: {self._layout} differs from the codec or hidden size in the manifest")
        # it knows nothing of ``self``: a cache in no cycle closes its files when it is let go
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(partial(_open_shard, store, index))

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Ids of the stored samples, in planned order."""
        return self._index.sample_ids

    @property
    def shard_ids(self) -> frozenset[str]:
        """Ids of the committed shards."""
        return frozenset(shard.shard_id for shard in self._index.shards)

    @property
    def skipped(self) -> tuple[SkippedSample, ...]:
        """Bad samples that the build left out."""
        return tuple(sample for shard in self._index.shards for sample in shard.skipped)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the content: teacher, processing, targets, codec, and the data."""
        return {**self._manifest.identity, "data": self._data}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the identity."""
        return fingerprint(self.identity)

    @property
    def targets_fingerprint(self) -> str:
        """SHA-256 (hex) of the identity without the data: equal wherever a sample would get the same targets."""
        return self._manifest.fingerprint

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """How the cache came about; ``shards`` lists the same per shard, from the commit records."""
        shards = []
        for entry in self._index.shards:
            where = f"shard {entry.shard_id}"
            data = read_document(self._store, entry.record_name, where=where)
            if digest_bytes(data) != entry.record:
                raise CacheCorrupt(f"{where}: {self._store.uri}/{entry.record_name} was changed")
            record = decode_record(data, where=where)
            cost = {} if record.codec_cost is None else {"codec_cost": asdict(record.codec_cost)}
            shards.append({"shard_id": record.shard_id, **cost, **record.provenance})
        return {**self._manifest.provenance, "shards": shards}

    @property
    def hidden_size(self) -> int:
        """Columns of the hidden states."""
        return self._head_entry().hidden_size if self._layout is None else self._layout.hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the teacher head."""
        return self._head_entry().vocab_size

    def read(
        self,
        sample_ids: Iterable[str],
        *,
        tiers: Collection[Tier] = TIERS,
        verify: bool = True,
        threads: int = 1,
    ) -> list[TeacherTargets]:
        """Return the targets of these samples, in this order; reads only their rows, one request per array.

        Args:
            sample_ids: Stored samples; one that is named twice is read once.
            tiers: Which targets to read beside the token ids: A answer rows (always), Q question rows, L logits.
            verify: Check every row that is read against its checksum.
            threads: Samples that are read at the same time.

        Raises:
            CacheError: an id is not stored.
            CacheCorrupt: stored bytes differ from what was committed.
        """
        asked = list(sample_ids)
        positions = {sample_id: self._locate(sample_id) for sample_id in asked}
        in_stored_order = sorted(positions, key=positions.__getitem__)
        if threads == 1:
            found = self._read_ahead(in_stored_order, positions, tiers=tiers, verify=verify)
        else:
            with ThreadPoolExecutor(threads) as pool:
                jobs = {
                    sample_id: pool.submit(self._read_one, sample_id, positions[sample_id], tiers=tiers, verify=verify)
                    for sample_id in in_stored_order
                }
                found = {sample_id: job.result() for sample_id, job in jobs.items()}
        return [found[sample_id] for sample_id in asked]

    def sample_digest(self, sample_id: str) -> str:
        """Return the digest of the sample that the teacher saw."""
        return self._index.digest(self._locate(sample_id))

    def answer_tokens(self, sample_id: str) -> int:
        """Return the number of supervised teacher tokens, all turns together."""
        return self._index.counts(self._locate(sample_id))[2]

    def num_tokens(self, sample_id: str) -> int:
        """Return the number of teacher tokens, images expanded."""
        return self._index.counts(self._locate(sample_id))[0]

    def tier_bytes(self) -> dict[str, int]:
        """Return the stored bytes per tier: A, Q and L."""
        return self._index.tier_bytes()

    def teacher_head(self) -> TeacherHead:
        """Return the teacher's output projection, after checking its digest.

        Raises:
            CacheCorrupt: it is missing or was changed.
            CacheError: the cache was built without one, or it cannot be read.
        """
        entry = self._head_entry()
        with checked_file(self._store, entry.file, expected=entry.digest, where="teacher head") as path:
            return load_teacher_head(path, vocab_size=entry.vocab_size, hidden_size=entry.hidden_size)

    def __len__(self) -> int:
        return int(self._index.first_sample[-1])

    def __contains__(self, sample_id: str) -> bool:
        return self._index.position(sample_id) is not None

    def __reduce__(self) -> tuple[Any, ...]:
        if self.snapshot is not None:
            return _open_snapshot, (self._store, self._manifest, self.snapshot)
        return _rebuild, (self._store, self._manifest, self._data, self._index)

    def _head_entry(self) -> HeadEntry:
        if self._manifest.teacher_head is None:
            raise CacheError(f"the cache at {self._store.uri} was built without a teacher head")
        return self._manifest.teacher_head

    def _locate(self, sample_id: str) -> int:
        position = self._index.position(sample_id)
        if position is None:
            skipped = {sample.sample_id: sample.reason for sample in self.skipped}
            reason = f"it was skipped ({skipped[sample_id]})" if sample_id in skipped else "no committed shard names it"
            raise CacheError(f"sample {sample_id!r} is not in the cache at {self._store.uri}: {reason}")
        return position

    def _read_ahead(
        self, sample_ids: Sequence[str], positions: dict[str, int], *, tiers: Collection[Tier], verify: bool
    ) -> dict[str, TeacherTargets]:
        found = {}
        ahead: deque[tuple[ShardReader, dict[str, RowRange]]] = deque()
        for number, sample_id in enumerate(sample_ids):
            for coming in sample_ids[number + len(ahead) : number + 2]:
                reader, ranges = self._ranges(coming, positions[coming], tiers=tiers, verify=verify)
                for name, rows in ranges.items():
                    reader.prefetch(name, rows)
                ahead.append((reader, ranges))
            found[sample_id] = self._read_ranges(*ahead.popleft(), positions[sample_id], tiers=tiers)
        return found

    def _read_one(self, sample_id: str, position: int, *, tiers: Collection[Tier], verify: bool) -> TeacherTargets:
        return self._read_ranges(*self._ranges(sample_id, position, tiers=tiers, verify=verify), position, tiers=tiers)

    def _read_ranges(
        self, reader: ShardReader, ranges: dict[str, RowRange], position: int, *, tiers: Collection[Tier]
    ) -> TeacherTargets:
        shard = self._index.shard_of(position)
        row = position - int(self._index.first_sample[shard])
        table, layout = self._index.rows_of_shard(shard), self._index.shards[shard].layout
        assert layout is not None
        return decode_targets(
            ranges["token_ids"].sample_id,
            {name: reader.read(name, rows) for name, rows in ranges.items()},
            spans=table.spans_of(row),
            layout=layout,
            tiers=tiers,
            has_question_rows="Q" in self._index.shards[shard].tiers and int(table.counts[row, 3]) >= 0,
        )

    def _ranges(
        self, sample_id: str, position: int, *, tiers: Collection[Tier], verify: bool
    ) -> tuple[ShardReader, dict[str, RowRange]]:
        shard = self._index.shard_of(position)
        row = position - int(self._index.first_sample[shard])
        entry, table = self._index.shards[shard], self._index.rows_of_shard(shard)
        assert entry.layout is not None
        ranges = {}
        for column, (name, field) in enumerate(stored_fields(entry.layout).items()):
            if name != "spans" and field.tier in entry.tiers and (field.tier == "A" or field.tier in tiers):
                start, stop = table.offsets[field.axis][row : row + 2]
                crc32c = int(table.crc32c[row, column]) if verify else None
                ranges[name] = RowRange(sample_id=sample_id, start=int(start), stop=int(stop), crc32c=crc32c)
        return self._shard(shard), ranges


def _open_shard(store: Store, index: SampleIndex, shard: int) -> ShardReader:
    entry, rows = index.shards[shard], index.rows_of_shard(shard)
    assert entry.layout is not None
    return ShardReader(
        store,
        entry.folder,
        shard_id=entry.shard_id,
        layout=entry.layout,
        num_rows={axis: int(offsets[-1]) for axis, offsets in rows.offsets.items()},
        samples=entry.samples,
    )


def _open_snapshot(store: Store, manifest: Manifest, number: int) -> TeacherCache:
    snapshot = read_snapshot(store, number, fingerprint=manifest.fingerprint)
    index = map_index(store, snapshot)
    return TeacherCache(store, manifest=manifest, data=snapshot.data, index=index, snapshot=number)


def _open_committed(store: Store, manifest: Manifest) -> TeacherCache:
    plan = read_plan(store, manifest)
    standing = read_standing(store, plan, fingerprint=manifest.fingerprint).values()
    records = [(record, digest) for record, digest in standing if record.withdrawn is None]
    index = SampleIndex.from_records(records, digests=plan.digests(), where=store.uri)
    return _rebuild(store, manifest, plan.data, index)


def _rebuild(store: Store, manifest: Manifest, data: dict[str, Any], index: SampleIndex) -> TeacherCache:
    return TeacherCache(store, manifest=manifest, data=data, index=index, snapshot=None)
