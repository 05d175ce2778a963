"""One attempt at one shard: samples are appended, then the whole is committed or nothing is."""

import logging
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from teacher_cache.codec import Layout, axis_lengths, encode_targets, layout_of
from teacher_cache.documents import plain_json
from teacher_cache.durable_files import FileDigest
from teacher_cache.errors import CacheError, CacheMismatch, TeacherError
from teacher_cache.ledger import COMMITS, SHARDS, CommitRecord, SampleRows, no_rows, record_name
from teacher_cache.plan import PlannedShard
from teacher_cache.row_codec import COST_ROWS, QuantizationCost, quantization_cost
from teacher_cache.schema import SkippedSample, TeacherTargets
from teacher_cache.shard_writer import ShardWriter, shard_attributes
from teacher_cache.standing import record_limit_bytes

if TYPE_CHECKING:
    from teacher_cache.writer import CacheWriter

logger = logging.getLogger(__name__)


class ShardAttempt:
    """Writes one shard under a name of its own. As a context manager it leaves nothing behind unless committed."""

    def __init__(self, writer: "CacheWriter", shard: PlannedShard, *, previous: CommitRecord | None) -> None:
        """Start an attempt; ``previous`` is the record that stands now."""
        self.shard = shard
        self._writer = writer
        self._standing = previous if previous is not None and previous.withdrawn is None else None
        # fixed now: an attempt that outlives a repair must not win after its files were tidied away
        self._revision = 0 if previous is None else previous.revision + 1
        self._attempt = uuid.uuid4().hex
        self._folder = f"{SHARDS}/{shard.shard_id}-{self._attempt}"
        self._layout: Layout | None = None
        self._shard_writer: ShardWriter | None = None
        self._place = 0
        self._ids: list[str] = []
        self._counts: list[list[int]] = []
        self._spans: list[tuple[int, int]] = []
        self._cost_rows: list[Tensor] = []
        self._bytes = 0
        self._committed = False

    @property
    def is_done_elsewhere(self) -> bool:
        """Whether another attempt has committed the shard: what is appended is dropped."""
        return self._standing is not None

    def append(self, targets: TeacherTargets) -> None:
        """Append the next sample, in planned order.

        Raises:
            CacheMismatch: the sample is not planned, or comes after a later one.
            TeacherError: its targets fail their checks.
            CacheError: the store refused a step.
        """
        if self._standing is not None:
            return
        self._require_order(targets.sample_id)
        arrays = encode_targets(targets, layout=self._layout_for(targets), vocab_size=self._vocab_size())
        self._bytes += sum(array.nbytes for array in arrays.values())
        try:
            if self._shard_writer is None:
                assert self._layout is not None
                self._shard_writer = ShardWriter(self._writer.store, self._folder, layout=self._layout)
            self._shard_writer.append(arrays)
        except OSError as error:
            if not self._is_overtaken(error):
                raise self._refused(error) from error
            self._standing = self._writer.standing_record(self.shard)
            return
        lengths = axis_lengths(targets.spans, num_tokens=len(targets.token_ids))
        question_rows = -1 if targets.question_hidden_states is None else lengths["tier_q"]
        self._ids.append(targets.sample_id)
        self._counts.append([lengths["tokens"], lengths["turns"], lengths["answer_tokens"], question_rows])
        self._spans += targets.spans
        self._keep_cost_rows(targets)

    def commit(self, *, skipped: Sequence[SkippedSample], provenance: dict[str, Any]) -> CommitRecord:
        """Make the shard durable and commit it; return the record that now stands.

        Raises:
            CacheMismatch: a planned sample was neither appended nor skipped.
            CacheError: the store refused a step; the shard may be tried again.
        """
        if self._standing is not None:
            return self._writer.standing_record(self.shard)
        self.require_planned(self._ids, skipped=skipped, digests=None)
        skipped = [replace(sample, message=_as_unicode(sample.message)) for sample in skipped]
        try:
            rows, files = self._finish()
            record = CommitRecord(
                shard_id=self.shard.shard_id,
                revision=self._revision,
                attempt=self._attempt,
                fingerprint=self._writer.fingerprint,
                sample_ids=tuple(self._ids),
                rows=rows,
                skipped=tuple(skipped),
                layout=self._layout,
                files=files,
                codec_cost=self._codec_cost(),
                provenance=plain_json(provenance),
            )
            data = record.encode()
            if len(data) > record_limit_bytes(self.shard):
                raise CacheError(
                    f"shard {self.shard.shard_id}: its commit record has {len(data)} bytes, at most "
                    f"{record_limit_bytes(self.shard)} are read; its samples have too many turns or too long messages"
                )
            won = self._writer.store.create(record.name, data)
            # where a repair has removed a damaged record of this revision, a later one stands
            self._committed = won and self._writer.store.size(record_name(record.shard_id, record.revision + 1)) is None
        except OSError as error:
            if not self._is_overtaken(error):
                raise self._refused(error) from error
        if self._committed:
            return record
        logger.info("shard %s: another attempt committed it first; this one is dropped", self.shard.shard_id)
        return self._writer.standing_record(self.shard)

    def require_planned(
        self, sample_ids: Sequence[str], *, skipped: Sequence[SkippedSample], digests: dict[str, str] | None
    ) -> None:
        """Check that samples and skipped samples are exactly the planned ones, with the planned content.

        Raises:
            CacheMismatch: they are not.
        """
        shard = self.shard
        found = [*sample_ids, *(sample.sample_id for sample in skipped)]
        if sorted(found) != sorted(shard.sample_ids):
            absent, extra = set(shard.sample_ids) - set(found), set(found) - set(shard.sample_ids)
            raise CacheMismatch(
                f"shard {shard.shard_id}: {len(shard.sample_ids)} samples are planned, {len(found)} were given; absent "
                f"{sorted(absent)[:5]}, not planned {sorted(extra)[:5]}; give each planned sample once"
            )
        if digests is None:
            return
        planned = dict(zip(shard.sample_ids, shard.sample_digests, strict=True))
        for sample_id in sample_ids:
            if digests.get(sample_id) != planned[sample_id]:
                raise CacheMismatch(
                    f"shard {shard.shard_id}: sample {sample_id!r} has digest {digests.get(sample_id)}, planned was "
                    f"{planned[sample_id]}: its text or images changed since the cache was planned"
                )

    def __enter__(self) -> "ShardAttempt":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard_writer is not None:
            self._shard_writer.close()
            if not self._committed and not self._is_ours():
                with suppress(OSError):  # what stays is tidied away when the cache is complete
                    self._writer.store.remove(self._folder)

    def _is_ours(self) -> bool:
        """Tell whether a record names this attempt although its commit was reported as failed."""
        try:
            return self._writer.store.size(record_name(self.shard.shard_id, self._revision)) is not None and (
                self._writer.standing_record(self.shard).attempt == self._attempt
            )
        except (OSError, CacheError):
            return True  # unknown: files that nobody names are tidied away later

    def _is_overtaken(self, error: OSError) -> bool:
        """Tell whether files are gone because another attempt was committed: whoever completes a cache tidies up."""
        try:
            name = record_name(self.shard.shard_id, self._revision)
            return isinstance(error, FileNotFoundError) and self._writer.store.size(name) is not None
        except OSError:
            return False

    def _finish(self) -> tuple[SampleRows, dict[str, FileDigest]]:
        if self._shard_writer is None:
            return no_rows(), {}
        rows = replace(
            no_rows(), counts=np.array(self._counts, dtype=np.int32), spans=np.array(self._spans, dtype=np.int32)
        )
        attributes = shard_attributes(
            fingerprint=self._writer.fingerprint, shard_id=self.shard.shard_id, sample_ids=self._ids
        )
        written = self._shard_writer.finish(rows.offsets, attributes=attributes)
        return replace(rows, crc32c=written.crc32c), written.files

    def _layout_for(self, targets: TeacherTargets) -> Layout:
        if self._layout is None:
            layout = layout_of(targets, codec=self._writer.manifest.codec, compression=self._writer.compression)
            head = self._writer.manifest.teacher_head
            if head is not None and layout.hidden_size != head.hidden_size:
                raise TeacherError(
                    f"sample {targets.sample_id!r}: hidden_states has {layout.hidden_size} columns, the stored teacher "
                    f"head takes {head.hidden_size}"
                )
            self._layout = layout
        return self._layout

    def _vocab_size(self) -> int | None:
        head = self._writer.manifest.teacher_head
        return None if head is None else head.vocab_size

    def _require_order(self, sample_id: str) -> None:
        try:
            self._place = self.shard.sample_ids.index(sample_id, self._place) + 1
        except ValueError:
            raise CacheMismatch(
                f"shard {self.shard.shard_id}: sample {sample_id!r} is not planned, or not after {self._ids[-1:]}; "
                "append the planned samples in planned order, each once"
            ) from None

    def _keep_cost_rows(self, targets: TeacherTargets) -> None:
        if self._writer.manifest.codec == "fp8" and self._writer.manifest.teacher_head is not None:
            per_sample = -(-COST_ROWS // len(self.shard.sample_ids))
            rows = targets.hidden_states
            chosen = torch.linspace(0, len(rows) - 1, min(per_sample, len(rows))).long()
            self._cost_rows.append(rows[chosen])

    def _codec_cost(self) -> QuantizationCost | None:
        if not self._cost_rows:
            return None
        head = self._writer.head
        assert head is not None
        return quantization_cost(torch.cat(self._cost_rows), head=head)

    def _refused(self, error: OSError) -> CacheError:
        uri = self._writer.store.uri
        return CacheError(
            f"shard {self.shard.shard_id}: cannot write {self._bytes} bytes to {uri}/{self._folder}, nor its record to "
            f"{COMMITS}: {error}; free space or mend the store, then run the build again"
        )


def _as_unicode(text: str) -> str:
    """Escape the lone surrogates that stand for undecodable bytes in file names."""
    return text.encode(errors="backslashreplace").decode()
