"""Join cache rows with the student's own tokenisation, sample by sample or a process's share of a step at once."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from distill.batch import Batch, collate, student_tokens
from distill.encoder import SampleReader, StudentEncoder
from distill.joined_sample import JoinedSample
from distill.live import TargetSource
from distill.order import split
from distill.passes import answer_lengths
from distill.stage_spec import StageSpec
from teacher_cache.errors import CacheMismatch, ConfigError
from teacher_cache.sample_file import SampleEntry, SampleTable
from teacher_cache.samples import SampleSet
from teacher_cache.schema import EncodedConversation, Sample, SkippedSample, TeacherTargets

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Samples as both sides see them, and those that the student cannot use."""

    samples: list[JoinedSample]
    skipped: tuple[SkippedSample, ...]


@dataclass(frozen=True, kw_only=True)
class RankBatch:
    """One process's part of a global batch, as micro-batches."""

    micro_batches: tuple[Batch, ...]
    skipped: tuple[SkippedSample, ...]
    """Bad samples that were left out."""


@dataclass(frozen=True, kw_only=True)
class Fillers:
    """Weightless samples for what every micro-batch of every process must call."""

    content: JoinedSample
    """With an image where any sample has one."""
    questions: JoinedSample | None
    """With the teacher's question rows; None where the stage has no regularization pass."""


@dataclass(frozen=True, kw_only=True)
class JoinedData:
    """The cached samples of one stage, joined on demand."""

    cache: TargetSource
    samples: Sequence[Sample | SampleEntry]
    reader: SampleReader | None
    """Reads the samples that are entries."""
    lengths: Int[np.ndarray, " samples"]
    """Teacher tokens of each sample, known without tokenising."""
    encoder: StudentEncoder
    spec: StageSpec
    fillers: Fillers | None = None

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Ids of the samples, in data order."""
        return tuple(sample.sample_id for sample in self.samples)

    def join(self, samples: Sequence[Sample | SampleEntry]) -> Joined:
        """Join samples, bad ones set apart.

        Raises:
            CacheMismatch: The student sees another number of answers than the teacher, or other tokens in kd.
        """
        known = self._with_content(samples)
        outcomes = [self.encoder.encode(known.get(sample.sample_id, sample)) for sample in samples]
        encoded = [outcome for outcome in outcomes if isinstance(outcome, EncodedConversation)]
        skipped = tuple(outcome for outcome in outcomes if isinstance(outcome, SkippedSample))
        if not self.spec.needs_teacher:
            return Joined(samples=[JoinedSample(encoded=one, targets=None) for one in encoded], skipped=skipped)
        targets = self.cache.read([one.sample_id for one in encoded], tiers=self.spec.tiers)
        for encoding, target in zip(encoded, targets, strict=True):
            check_turns(encoding, target, same_tokens=self.spec.same_tokens)
        pairs = zip(encoded, targets, strict=True)
        return Joined(samples=[JoinedSample(encoded=one, targets=target) for one, target in pairs], skipped=skipped)

    def load(self, indices: Sequence[int]) -> list[JoinedSample]:
        """Join samples by index, bad ones left out."""
        return self.join([self.samples[index] for index in indices]).samples

    def rank_batch(
        self, samples: Sequence[Sample | SampleEntry], *, micro_batch_size: int, micro_batch_tokens: int | None
    ) -> RankBatch:
        """Join samples and cut them into micro-batches, longest first; one that is too long alone is alone."""
        joined = self.join(samples)
        longest_first = sorted(joined.samples, key=self._student_tokens, reverse=True)

        def fits(start: int, stop: int) -> bool:
            if micro_batch_tokens is None:
                return True
            rows = [*longest_first[start:stop], *self._missing(longest_first[start:stop])]
            tokens = [self._student_tokens(row) for row in rows]
            return (sum(tokens) if self.spec.packing else len(rows) * max(tokens)) <= micro_batch_tokens

        ranges = split(len(longest_first), most_samples=micro_batch_size, fits=fits)
        micro_batches = tuple(self._filled([longest_first[index] for index in part]) for part in ranges)
        return RankBatch(micro_batches=micro_batches, skipped=joined.skipped)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Join and collate one micro-batch, with fillers for what every process must call."""
        return self._filled(self.load(indices))

    def filler_batch(self) -> Batch:
        """Return a micro-batch that weighs nothing."""
        return self._filled([])

    def collate(self, joined: Sequence[JoinedSample], *, questions: Sequence[JoinedSample] = ()) -> Batch:
        """Build one micro-batch as the stage takes it; ``questions`` take part in the regularization pass alone."""
        return collate(
            joined,
            with_answers=self.spec.reads_answers,
            with_recalibrator=self.spec.with_recalibrator,
            with_regularization=self.spec.regularization_weight > 0,
            include_boundary_row=self.spec.include_boundary_row,
            student_answer_fraction=self.spec.student_answer_fraction,
            logit_needs=self.spec.logit_needs,
            regularization_only=questions,
        )

    def _with_content(self, samples: Sequence[Sample | SampleEntry]) -> dict[str, Sample]:
        wanted = [one for one in samples if isinstance(one, SampleEntry) and one.sample_id not in self.encoder]
        if not wanted:
            return {}
        assert self.reader is not None
        return {sample.sample_id: sample for sample in self.reader.read(wanted)}

    def _student_tokens(self, sample: JoinedSample) -> int:
        return student_tokens(sample, with_answers=self.spec.reads_answers)

    def _missing(self, joined: Sequence[JoinedSample]) -> list[JoinedSample]:
        """Return the filler that a micro-batch needs beside its samples, if any."""
        assert self.fillers is not None
        with_images = bool(self.fillers.content.encoded.model_inputs)
        complete = any(sample.encoded.model_inputs for sample in joined) if with_images else bool(joined)
        return [] if complete else [self.fillers.content]

    def _filled(self, joined: Sequence[JoinedSample]) -> Batch:
        assert self.fillers is not None
        questions = self.fillers.questions
        lacks_questions = questions is not None and not any(map(has_question_rows, joined))
        return self.collate(
            [*joined, *self._missing(joined)], questions=[questions] if questions and lacks_questions else []
        )


def has_question_rows(sample: JoinedSample) -> bool:
    """Return whether the teacher's question rows (tier Q) of a sample are at hand."""
    return sample.targets is not None and sample.targets.question_hidden_states is not None


def join_cache(
    cache: TargetSource,
    data: SampleSet | SampleTable,
    *,
    encoder: StudentEncoder,
    spec: StageSpec,
    max_samples: int | None,
    reader: SampleReader | None = None,
) -> JoinedData:
    """Join a cache with the data file it was built from, or with a part of it.

    Args:
        cache: Where the teacher's targets come from.
        data: The samples, or the entries that ``reader`` reads.
        encoder: The student's tokenisation.
        spec: The stage.
        max_samples: Use only the first so many cached samples.
        reader: Reads the data file, where its samples are not in memory.

    Raises:
        CacheMismatch: A cached sample has other content in the data, or a sample is not cached.
        ConfigError: No sample can be used, or none has the question rows that the stage needs.
    """
    samples: dict[str, Sample | SampleEntry] = {sample.sample_id: sample for sample in data.samples}
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
    chosen = cached[:max_samples]
    if len(chosen) < len(cache):
        logger.info("training on %d of the %d cached samples", len(chosen), len(cache))
    joined = JoinedData(
        cache=cache,
        samples=tuple(samples[sample_id] for sample_id in chosen),
        reader=reader,
        lengths=np.array([cache.num_tokens(sample_id) for sample_id in chosen], dtype=np.int64),
        encoder=encoder,
        spec=spec,
    )
    return replace(joined, fillers=_find_fillers(joined))


def _find_fillers(data: JoinedData) -> Fillers:
    shortest_first = [data.samples[index] for index in np.argsort(data.lengths, kind="stable")]
    with_images = [sample for sample in shortest_first if sample.has_images]
    content = _first(data, with_images) or _first(data, shortest_first)
    if content is None:
        raise ConfigError(
            f"the student can use none of the {len(data.samples)} samples: raise its max_length or look at the data"
        )
    if data.spec.regularization_weight == 0:
        return Fillers(content=content, questions=None)
    questions = _first(data, shortest_first, need=has_question_rows)
    if questions is None:
        raise ConfigError(
            "no cached sample has the teacher's question rows (tier Q) that regularization_weight > 0 needs: "
            "rebuild the cache with targets.question_fraction > 0, or set regularization_weight to 0"
        )
    return Fillers(content=content, questions=questions)


def _first(
    data: JoinedData,
    samples: Sequence[Sample | SampleEntry],
    *,
    need: Callable[[JoinedSample], bool] = lambda _: True,
) -> JoinedSample | None:
    """Return the first usable sample that has what is needed, weightless."""
    joined = (one for sample in samples for one in data.join([sample]).samples)
    return next((replace(one, weight=0.0) for one in joined if need(one)), None)


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
