"""Where the rows of both sides go in the joint sequence: pure index arithmetic, no weights.

One sample is a sequence of turns. Each turn is its question rows (from the student, or from the teacher in the
regularisation pass) followed by the teacher's answer rows, so the joint sequence of a sample with two turns is
``[question 0, answer 0, question 1, answer 1]`` with positions 0, 1, 2, ... (no gap where tokens were left out).

Samples are padded on the right. Under causal attention a row never sees what follows it, so padding needs no mask
and nothing leaks between samples.

The row before answer token j predicts it: for j = 0 that is the *boundary row*, the last question row of the turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Turn(NamedTuple):
    """Row counts of one question and the answer after it."""

    num_question_rows: int
    num_answer_rows: int


@dataclass(frozen=True, kw_only=True)
class JointSequence:
    """Layout of a batch. A slot is an index into the flattened ``[batch * joint_tokens]`` grid."""

    positions: Int[Tensor, "batch joint_tokens"]
    """Position ids: 0, 1, 2, ... in each sample, over padding too."""
    question_slots: Int[Tensor, " question_rows"]
    """Where each packed question row goes."""
    answer_slots: Int[Tensor, " answer_rows"]
    """Where each packed answer row goes."""
    predicting_slots: Int[Tensor, " answer_tokens"]
    """The slot before each answer token: samples, turns and tokens in order."""
    boundary_mask: Bool[Tensor, " answer_tokens"]
    """True where the predicting row is the last question row of its turn."""

    def to(self, device: torch.device | str) -> "JointSequence":
        """Return the same layout on another device."""
        return JointSequence(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


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
    lengths = [sum(map(sum, sample_turns)) for sample_turns in turns]
    joint_tokens = max(lengths)
    question, answer, predicting, boundary = [], [], [], []
    for sample, sample_turns in enumerate(turns):
        slot = sample * joint_tokens
        for num_question_rows, num_answer_rows in sample_turns:
            start = slot + num_question_rows
            question.append(torch.arange(slot, start))
            answer.append(torch.arange(start, start + num_answer_rows))
            predicting.append(answer[-1] - 1)
            boundary.append(torch.arange(num_answer_rows) == 0)
            slot = start + num_answer_rows
    return JointSequence(
        positions=torch.arange(joint_tokens).expand(len(turns), joint_tokens),
        question_slots=torch.cat(question),
        answer_slots=torch.cat(answer),
        predicting_slots=torch.cat(predicting),
        boundary_mask=torch.cat(boundary),
    )


def joint_turns(question_spans: Sequence[tuple[int, int]], *, answer_lengths: Sequence[int]) -> tuple[Turn, ...]:
    """Pair one side's questions with the teacher's answers.

    Args:
        question_spans: Answer spans in the token ids of the side that gives the question rows.
        answer_lengths: Number of answer tokens of each turn in the teacher's tokens.
    """
    if len(question_spans) != len(answer_lengths):
        raise ValueError(
            f"turn counts differ: {len(question_spans)} on the question side, {len(answer_lengths)} in the teacher's "
            "answers. Every assistant turn must survive both tokenizers: check both chat templates and length limits"
        )
    gaps = question_gaps(question_spans)
    return tuple(Turn(stop - start, length) for (start, stop), length in zip(gaps, answer_lengths, strict=True))


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
    ranges, offset = [], 0
    for sample_turns in turns:
        stops = [offset := offset + turn.num_question_rows for turn in sample_turns]
        ranges.append([(stop - turn.num_question_rows, stop) for turn, stop in zip(sample_turns, stops, strict=True)])
    shuffled, parts = [], []
    for sample, sample_turns in enumerate(turns):
        donor = ranges[(sample + 1) % len(turns)]
        taken = [donor[index % len(donor)] for index in range(len(sample_turns))]
        parts += taken
        shuffled.append(
            tuple(
                Turn(stop - start, turn.num_answer_rows)
                for turn, (start, stop) in zip(sample_turns, taken, strict=True)
            )
        )
    return ShuffledQuestions(turns=tuple(shuffled), question_rows=_concat_ranges(parts))


def _check_turns(sample: int, turns: Sequence[Turn]) -> None:
    if not turns or any(count < 1 for turn in turns for count in turn):
        raise ValueError(
            f"bad turns of sample {sample} in the batch: expected at least one turn, each with at least one question "
            f"row and one answer row, found {[tuple(turn) for turn in turns]}"
        )


def _concat_ranges(ranges: Sequence[tuple[int, int]]) -> Int[Tensor, " rows"]:
    return torch.cat([torch.arange(start, stop) for start, stop in ranges] or [torch.arange(0)])
