"""Passes of the Recalibrator over a micro-batch: the cache's rows in one tensor, and what of them goes where."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.joined_sample import JoinedSample
from distill.stand_ins import choose_stand_ins, move_answers, other_stand_ins, supervised_tokens
from recalibrator.joint_sequence import (
    JointSequence,
    TierAIndex,
    Turn,
    joint_turns,
    plan_joint_sequence,
    shuffle_questions,
    split_tier_a,
    teacher_question_index,
)
from teacher_cache.schema import Span


@dataclass(frozen=True, kw_only=True)
class RecalibratedPass:
    """One pass of the Recalibrator: its inputs beside the student's question rows, and its targets."""

    plan: JointSequence
    question_rows: Float[Tensor, "question_rows teacher_hidden"] | None
    """The teacher's own question rows; None where the student's are used."""
    tier_a: Float[Tensor, "cached_rows teacher_hidden"]
    """What the cache holds of the micro-batch's answers: one tensor for all passes, indexed where they run."""
    answer_index: Int[Tensor, " answer_rows"]
    teacher_index: Int[Tensor, " answer_tokens"]
    labels: Int[Tensor, " answer_tokens"]
    weights: Float[Tensor, " answer_tokens"]
    stand_ins: Int[Tensor, " stand_ins"] | None = None
    """Rows of the student's answers that take the place of the teacher's; None where none does."""

    @property
    def answer_rows(self) -> Float[Tensor, "answer_rows teacher_hidden"]:
        """The teacher's answer rows that enter the Recalibrator."""
        return self.tier_a[self.answer_index]

    @property
    def teacher_rows(self) -> Float[Tensor, "answer_tokens teacher_hidden"]:
        """The teacher's rows that predict the labels."""
        return self.tier_a[self.teacher_index]


@dataclass(frozen=True, kw_only=True)
class ShuffledPass:
    """The main pass with every sample's rows of the student replaced by the next one's."""

    plan: JointSequence
    student_index: Int[Tensor, " student_rows"]
    """Into question rows, then stand-ins."""


@dataclass(frozen=True, kw_only=True)
class CachedRows:
    """Samples, and where each one's rows are in the one tensor that holds tier A."""

    samples: Sequence[JoinedSample]
    tier_a: Float[Tensor, "cached_rows teacher_hidden"]
    places: Sequence[TierAIndex]

    @classmethod
    def of(cls, samples: Sequence[JoinedSample]) -> "CachedRows":
        """Put the rows of samples one behind the other."""
        rows = [sample.teacher.hidden_states for sample in samples]
        places, start = [], 0
        for sample, own in zip(samples, rows, strict=True):
            index = split_tier_a(answer_lengths(sample.teacher.spans))
            places.append(TierAIndex(predicting=index.predicting + start, answer=index.answer + start))
            start += len(own)
        return cls(samples=samples, tier_a=torch.cat(rows), places=places)

    def take(self, indices: Sequence[int]) -> "CachedRows":
        """Return some of the samples, whose rows stay where they are."""
        return dataclasses.replace(
            self, samples=[self.samples[i] for i in indices], places=[self.places[i] for i in indices]
        )


def recalibrated_pass(
    cached: CachedRows, *, plan: JointSequence, question_rows: Tensor | None, include_boundary_row: bool
) -> RecalibratedPass:
    """Return a pass over samples; ``question_rows`` are the teacher's own, None where the student's go in."""
    targets = [sample.teacher for sample in cached.samples]
    labels = [target.token_ids[start:stop] for target in targets for start, stop in target.spans]
    weights = [torch.full((sum(answer_lengths(s.teacher.spans)),), s.weight) for s in cached.samples]
    return RecalibratedPass(
        plan=plan,
        question_rows=question_rows,
        tier_a=cached.tier_a,
        answer_index=torch.cat([place.answer for place in cached.places]),
        teacher_index=torch.cat([place.predicting for place in cached.places]),
        labels=torch.cat(labels).long(),
        weights=_supervised(torch.cat(weights), plan.boundary_mask, include_boundary_row=include_boundary_row),
    )


def _supervised(
    weights: Float[Tensor, " answer_tokens"], boundary: Bool[Tensor, " answer_tokens"], *, include_boundary_row: bool
) -> Float[Tensor, " answer_tokens"]:
    return weights if include_boundary_row else weights.masked_fill(boundary, 0.0)


def regularization_pass(cached: CachedRows, include_boundary_row: bool) -> RecalibratedPass:
    """Return the pass with the teacher's question rows, over the samples that have them."""
    having, rows, turns = [], [], []
    for place, sample in enumerate(cached.samples):
        targets = sample.teacher
        if targets.question_hidden_states is None:
            continue
        having.append(place)
        both = torch.cat([targets.hidden_states, targets.question_hidden_states])
        rows.append(both[teacher_question_index(targets.spans)])
        turns.append(joint_turns(targets.spans, answer_spans=targets.spans))
    return recalibrated_pass(
        cached.take(having),
        plan=plan_joint_sequence(turns),
        question_rows=torch.cat(rows),
        include_boundary_row=include_boundary_row,
    )


def shuffled_pass(turns: Sequence[Sequence[Turn]], plan: JointSequence) -> ShuffledPass:
    """Return the pass ``plan`` with the questions of the next sample."""
    if len(turns) == 1:
        # nothing to swap with, but every process must make the same calls
        return ShuffledPass(plan=plan, student_index=torch.arange(len(plan.question_slots)))
    shuffled = shuffle_questions(turns)
    return ShuffledPass(plan=plan_joint_sequence(shuffled.turns), student_index=shuffled.question_rows)


def with_stand_ins(
    samples: Sequence[JoinedSample], main: RecalibratedPass, shuffled: ShuffledPass, *, fraction: float, width: int
) -> tuple[RecalibratedPass, ShuffledPass]:
    """Put rows of the student's answers, indices into its grid of ``width`` columns, in the place of the teacher's."""
    chosen = [choose_stand_ins(s.encoded, s.teacher, fraction=fraction) for s in samples]
    replaced = torch.cat([one.replaced for one in chosen])
    exact = torch.cat([one.exact for one in chosen])
    rows = torch.cat([one.positions + index * width for index, one in enumerate(chosen)])
    supervised = supervised_tokens(main.plan, replaced=replaced, exact=exact)
    others = other_stand_ins([int(one.replaced.sum()) for one in chosen])
    return (
        dataclasses.replace(
            main,
            plan=move_answers(main.plan, replaced),
            answer_index=main.answer_index[~replaced],
            weights=main.weights * supervised,
            stand_ins=rows[replaced],
        ),
        ShuffledPass(
            plan=move_answers(shuffled.plan, replaced),
            student_index=torch.cat([shuffled.student_index, len(main.plan.question_slots) + others]),
        ),
    )


def answer_lengths(spans: Sequence[Span]) -> list[int]:
    """Return the number of answer tokens of each turn."""
    return [stop - start for start, stop in spans]
