"""Join cache rows with the student's own tokenisation, in an order that only the seed and the step decide."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from distill.batch import Batch, JoinedSample, answer_lengths, collate
from distill.config import STAGES, Stage, StudentConfig
from distill.live import TargetSource
from distill.stage_spec import StageSpec
from teacher_cache.chat import encode_conversation
from teacher_cache.errors import CacheMismatch, ConfigError, DataError, SampleError
from teacher_cache.samples import SampleSet
from teacher_cache.schema import EncodedConversation, Sample, TeacherTargets

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """Which samples form which global batch: a pure function of the seed, the stage and the step.

    Every epoch has its own permutation. Its last ``num_samples % global_batch_size`` samples are dropped; with
    another permutation in the next epoch, they are other samples then.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    stage: Stage

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch_size:
            raise ConfigError(
                f"stage {self.stage} has {self.num_samples} samples, fewer than its global_batch_size of "
                f"{self.global_batch_size}: lower it or bring more data"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one epoch."""
        return self.num_samples // self.global_batch_size

    def epoch(self, epoch: int) -> Int[np.ndarray, " num_samples"]:
        """Return the permutation of one epoch."""
        return np.random.default_rng([self.seed, STAGES.index(self.stage), epoch]).permutation(self.num_samples)

    def step(self, step: int) -> Int[np.ndarray, " global_batch_size"]:
        """Return the sample indices of one global batch, in order."""
        epoch, start = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[start * self.global_batch_size :][: self.global_batch_size]


def rank_share(
    indices: Int[np.ndarray, " global_batch_size"], *, rank: int, world_size: int, micro_batch_size: int
) -> list[Int[np.ndarray, " micro_batch_size"]]:
    """Return one process's micro-batches: every process gets as many, and together they are the global batch."""
    return list(indices.reshape(-1, world_size, micro_batch_size)[:, rank])


class StudentEncoder:
    """The student's tokenisation of samples, kept in memory up to a size, and the count of bad ones."""

    def __init__(self, processor: Any, *, config: StudentConfig, memory_mib: int) -> None:
        self._processor = processor
        self._config = config
        self._memory_bytes = memory_mib * 2**20
        self._encoded: dict[str, EncodedConversation] = {}
        self._bad: dict[str, SampleError] = {}

    def encode(self, sample: Sample) -> EncodedConversation | None:
        """Return a sample as the student sees it, or None for a bad sample that the config allows to leave out.

        Raises:
            DataError: More samples are bad than ``max_skipped_samples``.
        """
        if sample.sample_id in self._bad:
            return None
        if sample.sample_id not in self._encoded:
            return self._encode_new(sample)
        return self._encoded[sample.sample_id]

    @property
    def num_skipped(self) -> int:
        """Bad samples met so far."""
        return len(self._bad)

    def _encode_new(self, sample: Sample) -> EncodedConversation | None:
        try:
            encoded = encode_conversation(self._processor, sample, max_length=self._config.max_length)
        except SampleError as error:
            self._bad[sample.sample_id] = error
            if len(self._bad) > self._config.max_skipped_samples:
                raise DataError(
                    f"student {self._config.name}: {len(self._bad)} bad samples where max_skipped_samples allows "
                    f"{self._config.max_skipped_samples}; the last is {sample.sample_id}: {error}"
                ) from error
            return None
        encoded = replace(encoded, images=())
        size = sum(tensor.nbytes for tensor in encoded.model_inputs.values()) + encoded.token_ids.nbytes
        if size <= self._memory_bytes:
            self._memory_bytes -= size
            self._encoded[sample.sample_id] = encoded
        return encoded


@dataclass(frozen=True, kw_only=True)
class JoinedData:
    """The cached samples of one stage, joined on demand."""

    cache: TargetSource
    samples: Mapping[str, Sample]
    sample_ids: tuple[str, ...]
    encoder: StudentEncoder
    spec: StageSpec

    def load(self, indices: Sequence[int]) -> list[JoinedSample]:
        """Join samples by index, bad ones left out.

        Raises:
            CacheMismatch: The student sees another number of answers than the teacher, or other tokens in kd.
        """
        ids = [self.sample_ids[index] for index in indices]
        encoded = [encoding for id_ in ids if (encoding := self.encoder.encode(self.samples[id_])) is not None]
        if not self.spec.needs_teacher:
            return [JoinedSample(encoded=encoding, targets=None) for encoding in encoded]
        targets = self.cache.read([encoding.sample_id for encoding in encoded], tiers=self.spec.tiers)
        for encoding, target in zip(encoded, targets, strict=True):
            check_turns(encoding, target, same_tokens=self.spec.same_tokens)
        return [JoinedSample(encoded=e, targets=t) for e, t in zip(encoded, targets, strict=True)]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Join and collate one micro-batch, with fillers for what every process must call."""
        joined = self.load(indices)
        return self.collate([*joined, *(filler for needed, filler in self.fillers if not any(map(needed, joined)))])

    def collate(self, joined: Sequence[JoinedSample]) -> Batch:
        """Build one micro-batch as the stage takes it."""
        return collate(
            joined,
            with_answers=self.spec.reads_answers,
            with_recalibrator=self.spec.with_recalibrator,
            with_regularization=self.spec.regularization_weight > 0,
            include_boundary_row=self.spec.include_boundary_row,
            student_answer_fraction=self.spec.student_answer_fraction,
            logit_needs=self.spec.logit_needs,
        )

    @cached_property
    def has_images(self) -> bool:
        """Whether any sample brings an image."""
        return any(self.samples[id_].images for id_ in self.sample_ids)

    @cached_property
    def fillers(self) -> list[tuple[Callable[[JoinedSample], bool], JoinedSample]]:
        """Properties that each micro-batch needs (content, an image, tier Q), each with a weightless sample for it."""
        needs: list[Callable[[JoinedSample], bool]] = [lambda _: True]
        if self.has_images:
            needs.append(lambda sample: bool(sample.encoded.model_inputs))
        if self.spec.regularization_weight > 0:
            needs.append(
                lambda sample: sample.targets is not None and sample.targets.question_hidden_states is not None
            )
        return [(need, self._first(need)) for need in needs]

    def _first(self, need: Callable[[JoinedSample], bool]) -> JoinedSample:
        for index in range(len(self.sample_ids)):
            for sample in self.load([index]):
                if need(sample):
                    return replace(sample, weight=0.0)
        raise ConfigError(
            "no cached sample has the teacher's question rows (tier Q) that regularization_weight > 0 needs: "
            "rebuild the cache with targets.question_fraction > 0, or set regularization_weight to 0"
        )


def join_cache(
    cache: TargetSource, data: SampleSet, *, encoder: StudentEncoder, spec: StageSpec, max_samples: int | None
) -> JoinedData:
    """Join a cache with the data file it was built from, or with a part of it.

    Raises:
        CacheMismatch: A cached sample has other content in the data, or a sample is not cached.
    """
    samples = {sample.sample_id: sample for sample in data.samples}
    cached = [sample_id for sample_id in cache.sample_ids if sample_id in samples]
    for sample_id in cached:
        if cache.sample_digest(sample_id) != samples[sample_id].digest:
            raise CacheMismatch(
                f"sample {sample_id} has digest {samples[sample_id].digest} in the data, "
                f"{cache.sample_digest(sample_id)} in the cache: its text or images changed; build a new cache"
            )
    known = {*cache.sample_ids, *(skipped.sample_id for skipped in cache.skipped)}
    uncached = [sample_id for sample_id in samples if sample_id not in known]
    if uncached:
        raise CacheMismatch(
            f"{len(uncached)} samples are not in the cache, first {uncached[0]}: build the cache for them"
        )
    sample_ids = tuple(cached[:max_samples])
    if len(sample_ids) < len(cache):
        logger.info("training on %d of the %d cached samples", len(sample_ids), len(cache))
    return JoinedData(cache=cache, samples=samples, sample_ids=sample_ids, encoder=encoder, spec=spec)


def check_turns(encoded: EncodedConversation, targets: TeacherTargets, *, same_tokens: bool) -> None:
    """Raise CacheMismatch unless both sides have as many answers, of the same lengths, and the same tokens where asked.

    That the texts are equal is known from the samples' digests; the lengths say that both tokenizations cover them.
    """
    if len(encoded.spans) != len(targets.spans):
        raise CacheMismatch(
            f"sample {encoded.sample_id} has {len(encoded.spans)} answers for the student, {len(targets.spans)} in the "
            "cache: one of the chat templates drops or adds turns"
        )
    if targets.answer_byte_ends is not None:
        lengths = [
            [int(end) for end in byte_ends[np.cumsum(answer_lengths(spans)) - 1]]
            for spans, byte_ends in (
                (encoded.spans, encoded.answer_byte_ends),
                (targets.spans, targets.answer_byte_ends.numpy()),
            )
        ]
        if lengths[0] != lengths[1]:
            raise CacheMismatch(
                f"the answers of sample {encoded.sample_id} have {lengths[0]} bytes for the student, {lengths[1]} in "
                "the cache: their texts differ; build a new cache"
            )
    if not same_tokens:
        return
    own = [encoded.token_ids[start:stop].tolist() for start, stop in encoded.spans]
    teacher = [targets.token_ids[start:stop].tolist() for start, stop in targets.spans]
    if own != teacher:
        raise CacheMismatch(
            f"sample {encoded.sample_id}: method kd needs the teacher's tokenizer and template, but the answers have "
            f"{answer_lengths(encoded.spans)} student and {answer_lengths(targets.spans)} teacher tokens; use uld or "
            "genrecal"
        )


def global_batches(
    data: JoinedData, *, order: SampleOrder, micro_batch_size: int, rank: int, world_size: int, start: int, stop: int
) -> Iterator[list[Batch]]:
    """Yield one process's micro-batches per optimizer step."""
    for step in range(start, stop):
        share = rank_share(order.step(step), rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        yield [data.batch(indices.tolist()) for indices in share]
