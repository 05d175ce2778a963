"""Means and paired differences over seeds, with their intervals, and what they say about a claim."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Literal

from launch.study.config import Claim
from launch.study.results import Row

CONFIDENCE = 0.95
Verdict = Literal["reproduced", "not reproduced", "opposite", "no results"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds and half its 95 % interval, nan with one seed."""

    mean: float
    margin: float
    num_seeds: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the results say about a claim; differences are None without results."""

    claim: Claim
    difference: Estimate | None
    """In accuracy, which the verdict is about."""
    bits_difference: Estimate | None
    """In bits per byte: where it is negative, the answers are told better."""
    calibration_difference: Estimate | None
    """In the expected calibration error."""
    num_pairs: int
    verdict: Verdict


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and its t interval over seeds.

    Formula: ``mean +- t(0.975, n - 1) s / sqrt(n)``.
    Why: a few seeds, each a mean over many samples, are close to normal; the interval is about repeating the training
    on the same data and the same held-out questions.
    """
    return Estimate(mean=fmean(values), margin=_margin(values), num_seeds=len(values))


def _margin(values: Sequence[float]) -> float:
    from scipy.stats import t

    if len(values) < 2:
        return math.nan
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def accuracy(row: Row) -> float:
    """Return the accuracy of a run."""
    return row.accuracy


def paired_difference(
    rows: Sequence[Row], others: Sequence[Row], *, measure: Callable[[Row], float] = accuracy
) -> tuple[Estimate | None, int]:
    """Return the difference in a measure over seeds, and over how many pairs of student and teacher.

    Runs are paired by student, seed and, where both have one, teacher; a run without seed or teacher goes with all.
    The pairs that every seed has are averaged within it, so that a seed counts once.
    """
    differences: dict[int, dict[tuple[str | None, str | None], float]] = {}
    for row in rows:
        partners = [other for other in others if _belong_together(row, other)]
        for other in partners:
            pair = (row.student, row.teacher or other.teacher)
            seed = row.seed if _is_seeded(row) else other.seed
            differences.setdefault(seed or 0, {})[pair] = measure(row) - measure(other)
    if not differences:
        return None, 0
    common = set.intersection(*(set(by_pair) for by_pair in differences.values()))
    kept = list(differences.values())
    if not common:
        # a study that is not finished: the seeds that have the most pairs
        most = max(len(by_pair) for by_pair in kept)
        kept = [by_pair for by_pair in kept if len(by_pair) == most]
        common = set(kept[0])
    per_seed = [fmean(by_pair[pair] for pair in common) for by_pair in kept if common <= set(by_pair)]
    return estimate(per_seed), len(common)


def _belong_together(row: Row, other: Row) -> bool:
    same_seed = row.seed == other.seed or not (_is_seeded(row) and _is_seeded(other))
    same_teacher = row.teacher == other.teacher or row.teacher is None or other.teacher is None
    return row.student == other.student and same_seed and same_teacher


def _is_seeded(row: Row) -> bool:
    return row.student_flops > 0


def answer(claim: Claim, rows: Sequence[Row]) -> Answer:
    """Return what the results say about a claim."""
    better = _of_arm(rows, claim.better, teacher=claim.better_teacher)
    worse = _of_arm(rows, claim.worse, teacher=claim.worse_teacher)
    if claim.better_teacher is not None or claim.worse_teacher is not None:
        better, worse = ([_without_teacher(row) for row in side] for side in (better, worse))
    difference, num_pairs = paired_difference(better, worse)
    return Answer(
        claim=claim,
        difference=difference,
        bits_difference=paired_difference(better, worse, measure=lambda row: row.bits_per_byte)[0],
        calibration_difference=paired_difference(better, worse, measure=lambda row: row.calibration_error)[0],
        num_pairs=num_pairs,
        verdict=verdict(claim, difference),
    )


def verdict(claim: Claim, difference: Estimate | None) -> Verdict:
    """Return whether the interval of a difference bears a claim out, leaves it open or speaks against it."""
    if difference is None or math.isnan(difference.margin):
        return "no results"
    low, high = difference.mean - difference.margin, difference.mean + difference.margin
    if claim.equal_within is not None:
        if -claim.equal_within <= low and high <= claim.equal_within:
            return "reproduced"
        return "opposite" if low > claim.equal_within or high < -claim.equal_within else "not reproduced"
    if low > 0:
        return "reproduced"
    return "opposite" if high < 0 else "not reproduced"


def _of_arm(rows: Sequence[Row], arm: str, *, teacher: str | None) -> list[Row]:
    return [row for row in rows if row.arm == arm and (teacher is None or row.teacher == teacher)]


def _without_teacher(row: Row) -> Row:
    return replace(row, teacher=None)


def mean_of(rows: Iterable[Row], value: Callable[[Row], float | None]) -> float | None:
    """Return the mean of a figure over the rows that have it."""
    values = [found for row in rows if (found := value(row)) is not None]
    return fmean(values) if values else None
