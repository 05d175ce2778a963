"""Where the rows of both sides go in the joint sequence: pure index arithmetic, no weights.

One sample is a sequence of turns. Each turn is its question rows (from the student, or from the teacher in the
regularisation pass) followed by the teacher's answer rows, so the joint sequence of a sample with two turns is
``[question 0, answer 0, question 1, answer 1]`` with positions 0, 1, 2, ... (no gap where tokens were left out).

The samples of a batch follow each other in one packed row, without padding; attention stays within each of them.

The row before answer token j predicts it: for j = 0 that is the *boundary row*, the last question row of the turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Int32
from torch import Tensor


class Turn(NamedTuple):
    """Row counts of one question and the answer after it, and where both begin in their own models' tokens."""

    num_question_rows: int
    num_answer_rows: int
    question_start: int = 0
    """Position of the first question row in the token ids of the side that gives it."""
    answer_start: int = 0
    """Position of the first answer row in the teacher's token ids."""

    @property
    def num_rows(self) -> int:
        """Rows of the joint sequence."""
        return self.num_question_rows + self.num_answer_rows


@dataclass(frozen=True, kw_only=True)
class JointSequence:
    """Layout of a batch. A slot is an index into the packed row of all samples' joint sequences."""

    lengths: tuple[int, ...]
    """Rows of each sample."""
    offsets: Int32[Tensor, " offsets"]
    """Where each sample begins, and the end: one value more than samples."""
    positions: Int[Tensor, " joint_tokens"]
    """Position ids: 0, 1, 2, ... in each sample."""
    own_positions: Int[Tensor, " joint_tokens"]
    """Position ids that the rows had in the sequences of the models that made them."""
    question_slots: Int[Tensor, " question_rows"]
    """Where each packed question row goes."""
    answer_slots: Int[Tensor, " answer_rows"]
    """Where each packed answer row goes."""
    predicting_slots: Int[Tensor, " answer_tokens"]
    """The slot before each answer token: samples, turns and tokens in order."""
    boundary_mask: Bool[Tensor, " answer_tokens"]
    """True where the predicting row is the last question row of its turn."""

    def samples_of(self, slots: Int[Tensor, " slots"]) -> Int[Tensor, " slots"]:
        """Return the sample that each slot belongs to, counted from 0 in the batch."""
        return torch.searchsorted(self.offsets, slots.int(), right=True) - 1


@dataclass(frozen=True, kw_only=True)
class TierAIndex:
    """Indices into tier-A rows (per turn: the boundary row, then one row per answer token)."""

    predicting: Int[Tensor, " answer_tokens"]
    """All but the last row of each turn: the rows whose logits are the KL targets."""
    answer: Int[Tensor, " answer_tokens"]
    """All but the first row of each turn: the Recalibrator's answer rows."""


@dataclass(frozen=True, kw_only=True)
class ShuffledQuestions:
    """A batch in which every sample has the questions of the next one."""

    turns: tuple[tuple[Turn, ...], ...]
    question_rows: Int[Tensor, " question_rows"]
    """Index into the packed question rows of the original batch."""


def plan_joint_sequence(turns: Sequence[Sequence[Turn]]) -> JointSequence:
    """Lay out a batch: one inner sequence of turns per sample."""
    if not turns:
        raise ValueError("cannot plan a joint sequence for an empty batch: expected at least one sample")
    for sample, sample_turns in enumerate(turns):
        _check_turns(sample, sample_turns)
    question, answer, own, boundary = [], [], [], []
    slot = 0
    for turn in (turn for sample_turns in turns for turn in sample_turns):
        start = slot + turn.num_question_rows
        question.append((slot, start))
        slot = start + turn.num_answer_rows
        answer.append((start, slot))
        own.append((turn.question_start, turn.question_start + turn.num_question_rows))
        own.append((turn.answer_start, turn.answer_start + turn.num_answer_rows))
        boundary.append(torch.arange(turn.num_answer_rows) == 0)
    lengths = tuple(sum(turn.num_rows for turn in sample_turns) for sample_turns in turns)
    answer_slots = _concat_ranges(answer)
    return JointSequence(
        lengths=lengths,
        offsets=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        positions=_concat_ranges([(0, length) for length in lengths]),
        own_positions=_concat_ranges(own),
        question_slots=_concat_ranges(question),
        answer_slots=answer_slots,
        predicting_slots=answer_slots - 1,
        boundary_mask=torch.cat(boundary),
    )


def joint_turns(
    question_spans: Sequence[tuple[int, int]], *, answer_spans: Sequence[tuple[int, int]]
) -> tuple[Turn, ...]:
    """Pair one side's questions with the teacher's answers.

    Args:
        question_spans: Answer spans in the token ids of the side that gives the question rows.
        answer_spans: Answer spans in the teacher's token ids.
    """
    if len(question_spans) != len(answer_spans):
        raise ValueError(
            f"turn counts differ: {len(question_spans)} on the question side, {len(answer_spans)} in the teacher's "
            "answers. Every assistant turn must survive both tokenizers: check both chat templates and length limits"
        )
    gaps = question_gaps(question_spans)
    return tuple(
        Turn(stop - start, answer_stop - answer_start, question_start=start, answer_start=answer_start)
        for (start, stop), (answer_start, answer_stop) in zip(gaps, answer_spans, strict=True)
    )


def question_gaps(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the half-open ranges of question rows before each answer span; rows after the last answer are dropped."""
    stops = [0, *(stop for _, stop in spans)]
    gaps = tuple((stop, start) for stop, (start, _) in zip(stops, spans, strict=False))
    for (start, stop), span in zip(gaps, spans, strict=True):
        if stop <= start or span[1] <= span[0]:
            raise ValueError(
                f"bad answer spans {[tuple(span) for span in spans]}: expected non-empty spans in order, "
                f"each with at least one question token before it, found {tuple(span)} after position {start}"
            )
    return gaps


def question_positions(spans: Sequence[tuple[int, int]]) -> Int[Tensor, " question_rows"]:
    """Return the token positions whose rows are question rows of the joint sequence."""
    return _concat_ranges(question_gaps(spans))


def teacher_question_index(spans: Sequence[tuple[int, int]]) -> Int[Tensor, " question_rows"]:
    """Return where the teacher's question rows lie in ``cat([tier A rows, tier Q rows])`` of one sample.

    Each question ends in its boundary row, which tier A holds; the rows before it are in tier Q.
    """
    num_tier_a = sum(stop - start + 1 for start, stop in spans)
    parts, tier_a, tier_q = [], 0, num_tier_a
    for (start, stop), span in zip(question_gaps(spans), spans, strict=True):
        next_tier_q = tier_q + stop - start - 1
        parts += [(tier_q, next_tier_q), (tier_a, tier_a + 1)]
        tier_a += span[1] - span[0] + 1
        tier_q = next_tier_q
    return _concat_ranges(parts)


def split_tier_a(answer_lengths: Sequence[int]) -> TierAIndex:
    """Split tier-A rows into KL targets and Recalibrator inputs.

    Args:
        answer_lengths: Answer tokens of each turn, of one sample or of a batch whose tier-A rows are concatenated.
    """
    starts = [0]
    for length in answer_lengths:
        starts.append(starts[-1] + length + 1)
    return TierAIndex(
        predicting=_concat_ranges([(start, end - 1) for start, end in pairwise(starts)]),
        answer=_concat_ranges([(start + 1, end) for start, end in pairwise(starts)]),
    )


def shuffle_questions(turns: Sequence[Sequence[Turn]]) -> ShuffledQuestions:
    """Give every sample the questions of the next one, its own turns repeating as often as needed.

    For the question-shuffle gap: how much worse the answers get when the student's question rows are the wrong ones.
    """
    if len(turns) < 2:
        raise ValueError(f"cannot shuffle questions between samples: expected at least 2 samples, found {len(turns)}")
    rows, offset = [], 0
    for sample_turns in turns:
        stops = [offset := offset + turn.num_question_rows for turn in sample_turns]
        rows.append([(stop - turn.num_question_rows, stop) for turn, stop in zip(sample_turns, stops, strict=True)])
    shuffled, taken = [], []
    for sample, sample_turns in enumerate(turns):
        donor = (sample + 1) % len(turns)
        chosen = [index % len(turns[donor]) for index in range(len(sample_turns))]
        taken += [rows[donor][index] for index in chosen]
        shuffled.append(
            tuple(
                turn._replace(
                    num_question_rows=turns[donor][index].num_question_rows,
                    question_start=turns[donor][index].question_start,
                )
                for turn, index in zip(sample_turns, chosen, strict=True)
            )
        )
    return ShuffledQuestions(turns=tuple(shuffled), question_rows=_concat_ranges(taken))


def _check_turns(sample: int, turns: Sequence[Turn]) -> None:
    if not turns or any(count < 1 for turn in turns for count in turn[:2]):
        raise ValueError(
            f"bad turns of sample {sample} in the batch: expected at least one turn, each with at least one question "
            f"row and one answer row, found {[tuple(turn[:2]) for turn in turns]}"
        )


def _concat_ranges(ranges: Sequence[tuple[int, int]]) -> Int[Tensor, " rows"]:
    return torch.cat([torch.arange(start, stop) for start, stop in ranges] or [torch.arange(0)])
