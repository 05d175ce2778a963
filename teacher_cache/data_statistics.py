"""How much a data file is in the teacher's tokens: counted where it is small, estimated from a part of it otherwise.

A part of the rows is tokenised by the function that the build uses. The estimate is a regression of the counts on what
every row tells without its images: whatever the regression misses, it has no bias.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from teacher_cache.build_plan import keeps_question_rows
from teacher_cache.cache_size import ShardShape, sample_rows
from teacher_cache.chat import Processor
from teacher_cache.config import CacheConfig
from teacher_cache.errors import DataError
from teacher_cache.progress import progress
from teacher_cache.row_sample import FACTS, count_rows, evenly_spread, read_chosen, read_facts
from teacher_cache.samples import image_folder, parse_rows
from teacher_cache.schema import EncodedConversation, Sample, SkippedSample
from teacher_cache.shard_worker import encode_or_skip

_LEAST_ROWS = 10 * len(FACTS)
"""Fewer sampled rows than this are not enough to tell the facts' weights apart."""


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Counts of one sample or sums over samples; estimates need not be whole."""

    tokens: float
    """Image tokens included."""
    answer_tokens: float
    """With end-of-turn tokens: the rows of tier L."""
    image_tokens: float
    turns: float

    @property
    def question_rows(self) -> float:
        """Rows outside of tier A."""
        return self.tokens - self.answer_tokens - self.turns


@dataclass(frozen=True, kw_only=True)
class MeasuredSample:
    """One sample that is planned for a shard."""

    sample_id: str
    counts: TokenCounts
    keeps_question_rows: bool


@dataclass(frozen=True, kw_only=True)
class DataStatistics:
    """What a plan knows about its data."""

    rows: int
    """Rows that are used, bad ones included."""
    sampled_rows: int
    """Rows that were tokenised; 0 where the statistics were given."""
    planned: float
    """Samples that shards are planned for: rows without those that are found bad on reading."""
    samples: float
    """Samples that will be stored."""
    counts: TokenCounts
    """Over all stored samples."""
    question_rows: float
    """Rows of tier Q that will be stored, over all samples."""
    tokens_error: float
    """Standard error of the tokens that comes from sampling, relative; 0 when all rows were tokenised."""
    id_bytes: int
    """Mean length of a sample's id."""
    skipped: tuple[SkippedSample, ...] = ()
    """The bad ones among the sampled rows."""
    measured: tuple[MeasuredSample | SkippedSample, ...] | None = None
    """Every planned sample in order, when all rows were tokenised."""


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What became of one sampled row."""

    is_planned: bool
    result: MeasuredSample | SkippedSample


def measure_data(config: CacheConfig, *, processor: Processor, most_rows: int) -> DataStatistics:
    """Return the statistics of a run's data, exact when it has no more than ``most_rows`` rows.

    Raises:
        DataError: The file is missing or of another kind, or no sampled row is a usable sample.
        ConfigError: The chat template or the processor serves no sample.
    """
    path, fraction = Path(config.data.path), config.targets.question_fraction
    rows = count_rows(path)
    if config.data.max_samples is not None:
        rows = min(rows, config.data.max_samples)
    numbers = evenly_spread(rows, at_most=most_rows)
    outcomes: list[_Outcome] = []
    with progress(total=len(numbers), unit="row", description="tokenising") as bar:
        for _, parsed in parse_rows(read_chosen(path, numbers), image_root=image_folder(config.data)):
            outcomes.append(_outcome(parsed, config, processor=processor))
            bar.update()
    stored = [outcome.result for outcome in outcomes if isinstance(outcome.result, MeasuredSample)]
    if not stored:
        raise DataError(f"none of the {len(numbers)} rows read from {path} is a usable sample: {_reasons(outcomes)}")
    is_whole = len(numbers) == rows
    facts = np.ones((rows, 1)) if is_whole else read_facts(path, rows=rows)
    totals = estimate_totals(_table(outcomes), facts=facts, numbers=numbers)
    planned, samples, *sums = totals.values
    counts = TokenCounts(tokens=sums[0], answer_tokens=sums[1], image_tokens=sums[2], turns=sums[3])
    kept = sum(sample.counts.question_rows for sample in stored if sample.keeps_question_rows)
    return DataStatistics(
        rows=rows,
        sampled_rows=len(numbers),
        planned=planned,
        samples=samples,
        counts=counts,
        question_rows=kept if is_whole else fraction * counts.question_rows,
        tokens_error=totals.errors[2] / counts.tokens,
        id_bytes=round(sum(len(sample.sample_id.encode()) for sample in stored) / len(stored)),
        skipped=tuple(outcome.result for outcome in outcomes if isinstance(outcome.result, SkippedSample)),
        measured=tuple(outcome.result for outcome in outcomes if outcome.is_planned) if is_whole else None,
    )


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over a population, and their standard errors."""

    values: tuple[float, ...]
    errors: tuple[float, ...]


def estimate_totals(
    sampled: Float[np.ndarray, "sampled columns"], *, facts: Float[np.ndarray, "rows facts"], numbers: Sequence[int]
) -> Totals:
    """Estimate the sums of some columns over all rows by regression on what is known of every row.

    Args:
        sampled: Values of the sampled rows.
        facts: Known of every row; the first column is 1.
        numbers: Which rows were sampled.
    """
    rows = len(facts)
    if len(numbers) == rows:
        return Totals(values=tuple(sampled.sum(axis=0)), errors=(0.0,) * sampled.shape[1])
    if len(numbers) < _LEAST_ROWS:
        facts = facts[:, :1]
    known = facts[list(numbers)]
    weights, _, rank, _ = np.linalg.lstsq(known, sampled, rcond=None)
    spread = ((sampled - known @ weights) ** 2).sum(axis=0) / max(len(numbers) - int(rank), 1)
    errors = rows * np.sqrt(spread * (1 - len(numbers) / rows) / len(numbers))
    return Totals(values=tuple((facts.sum(axis=0) @ weights).clip(min=0)), errors=tuple(errors))


def shard_shapes(statistics: DataStatistics, *, samples_per_shard: int) -> tuple[ShardShape, ...]:
    """Return the shards that a build will make: each as it will be, or typical ones where the data is estimated."""
    if statistics.measured is not None:
        groups = range(0, len(statistics.measured), samples_per_shard)
        return tuple(_measured_shape(statistics.measured[start : start + samples_per_shard]) for start in groups)
    full, rest = divmod(max(round(statistics.planned), 1), samples_per_shard)
    sizes = [(samples_per_shard, full), (rest, 1)]
    return tuple(
        _typical_shape(statistics, planned=planned, shards=count) for planned, count in sizes if planned * count
    )


def _measured_shape(group: Sequence[MeasuredSample | SkippedSample]) -> ShardShape:
    stored = [sample for sample in group if isinstance(sample, MeasuredSample)]
    counts = [
        (c.tokens, c.turns, c.answer_tokens, c.question_rows if sample.keeps_question_rows else -1)
        for sample in stored
        for c in [sample.counts]
    ]
    return ShardShape(
        sample_ids=tuple(sample.sample_id for sample in stored),
        rows=sample_rows(np.array(counts)),
        skipped=tuple(sample for sample in group if isinstance(sample, SkippedSample)),
    )


def _typical_shape(statistics: DataStatistics, *, planned: int, shards: int) -> ShardShape:
    stored = min(round(planned * statistics.samples / statistics.planned), planned)
    counts = statistics.counts
    columns = (counts.tokens, counts.turns, counts.answer_tokens, statistics.question_rows)
    per_sample = [_spread(total * stored / statistics.samples, over=stored) for total in columns]
    sample_id = "0" * statistics.id_bytes
    skipped = SkippedSample(sample_id=sample_id, reason="too-long", message="0" * 70)
    return ShardShape(
        sample_ids=(sample_id,) * stored,
        rows=sample_rows(np.stack(per_sample, axis=1)),
        skipped=(skipped,) * (planned - stored),
        shards=shards,
    )


def _spread(total: float, *, over: int) -> Float[np.ndarray, " over"]:
    """Return whole numbers, as equal as can be, with this sum."""
    return np.diff(np.round(np.linspace(0, round(total), over + 1)))


def _outcome(parsed: Sample | SkippedSample, config: CacheConfig, *, processor: Processor) -> _Outcome:
    if isinstance(parsed, SkippedSample):
        return _Outcome(is_planned=False, result=parsed)
    encoded = encode_or_skip(processor, parsed, max_length=config.data.max_length)
    if isinstance(encoded, SkippedSample):
        return _Outcome(is_planned=True, result=encoded)
    measured = MeasuredSample(
        sample_id=parsed.sample_id,
        counts=count_tokens(encoded),
        keeps_question_rows=keeps_question_rows(parsed, fraction=config.targets.question_fraction),
    )
    return _Outcome(is_planned=True, result=measured)


def count_tokens(encoded: EncodedConversation) -> TokenCounts:
    """Return the counts of one sample."""
    num_images = len(encoded.images)
    return TokenCounts(
        tokens=len(encoded.token_ids),
        answer_tokens=sum(span.stop - span.start for span in encoded.spans),
        # each image had one placeholder before expansion
        image_tokens=len(encoded.token_ids) - len(encoded.prompt_token_ids) + num_images,
        turns=len(encoded.spans),
    )


def _table(outcomes: Sequence[_Outcome]) -> Float[np.ndarray, "sampled 6"]:
    table = np.zeros((len(outcomes), 6))
    for row, outcome in zip(table, outcomes, strict=True):
        row[0] = outcome.is_planned
        if isinstance(outcome.result, MeasuredSample):
            row[1:] = (1.0, *astuple(outcome.result.counts))
    return table


def _reasons(outcomes: Sequence[_Outcome]) -> str:
    skipped = [outcome.result for outcome in outcomes if isinstance(outcome.result, SkippedSample)]
    return "; ".join(f"{bad.sample_id}: {bad.message}" for bad in skipped[:3])
