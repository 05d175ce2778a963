"""Student rows that stand in for the teacher's answer rows, so that the Recalibrator cannot copy its targets.

The teacher's row at answer token j already is the state from which it predicts token j + 1, which makes copying a
perfect Recalibrator. Where the student's own row at the same place of the text is put instead, the prediction has to
come from the student. ``docs/paper.md`` argues for it.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from recalibrator.joint_sequence import JointSequence
from teacher_cache.schema import EncodedConversation, Span, TeacherTargets


@dataclass(frozen=True, kw_only=True)
class StandIns:
    """For each of the teacher's answer rows, turns one after the other."""

    replaced: Bool[Tensor, " answer_rows"]
    positions: Int[Tensor, " answer_rows"]
    """Student token whose row stands in: the last that ends no later in the text, so that it has seen nothing of what
    is to be predicted; the boundary row where no answer token does."""
    exact: Bool[Tensor, " answer_rows"]
    """Both tokens end at the same byte and complete its character, so that both rows have read the same text."""


def choose_stand_ins(encoded: EncodedConversation, targets: TeacherTargets, *, fraction: float) -> StandIns:
    """Choose the stand-ins of one sample: the last ``fraction`` of each answer's rows, rounded up."""
    assert targets.answer_byte_ends is not None
    replaced, positions, exact = [], [], []
    own_turns = _split(encoded.answer_byte_ends, encoded.spans)
    teacher_turns = _split(targets.answer_byte_ends.numpy(), targets.spans)
    for span, own_ends, teacher_ends in zip(encoded.spans, own_turns, teacher_turns, strict=True):
        own, teacher = _ends(own_ends), _ends(teacher_ends)
        # amid a character a token has read a part of it, nobody knows which: more than what ends before it
        read = own.keys - np.where(own.whole, 0, 1)
        limit = teacher.keys - np.where(teacher.whole, 0, 2)
        before = np.searchsorted(read, limit, side="right")
        kept = len(teacher_ends) - math.ceil(fraction * len(teacher_ends))
        replaced.append(np.arange(len(teacher_ends)) >= kept)
        positions.append(span.start - 1 + before)
        exact.append(teacher.whole & (before > 0) & (read[before - 1] == limit))
    return StandIns(
        replaced=torch.from_numpy(np.concatenate(replaced)),
        positions=torch.from_numpy(np.concatenate(positions)),
        exact=torch.from_numpy(np.concatenate(exact)),
    )


def move_answers(plan: JointSequence, replaced: Bool[Tensor, " answer_rows"]) -> JointSequence:
    """Return the layout in which the replaced answer rows come from the student, after its question rows."""
    return dataclasses.replace(
        plan,
        question_slots=torch.cat([plan.question_slots, plan.answer_slots[replaced]]),
        answer_slots=plan.answer_slots[~replaced],
    )


def supervised_tokens(
    plan: JointSequence, *, replaced: Bool[Tensor, " answer_rows"], exact: Bool[Tensor, " answer_rows"]
) -> Bool[Tensor, " answer_tokens"]:
    """Return which answer tokens have a fair prediction: the row before them is the teacher's or an exact stand-in."""
    return plan.boundary_mask | (exact | ~replaced).roll(1)


def other_stand_ins(counts: Sequence[int]) -> Int[Tensor, " stand_ins"]:
    """Give every sample the stand-ins of the next one that has any, its own turn repeating as often as needed."""
    starts = np.cumsum([0, *counts])
    having = [sample for sample, count in enumerate(counts) if count]
    parts = [np.zeros(0, dtype=np.int64)]
    for place, sample in enumerate(having):
        donor = having[(place + 1) % len(having)]
        parts.append(starts[donor] + np.arange(counts[sample]) % counts[donor])
    return torch.from_numpy(np.concatenate(parts))


def _split(ends: Int[np.ndarray, " tokens"], spans: Sequence[Span]) -> list[Int[np.ndarray, " turn_tokens"]]:
    return np.split(ends, np.cumsum([stop - start for start, stop in spans])[:-1])


class _Ends(NamedTuple):
    keys: Int[np.ndarray, " tokens"]
    """In the order of the text, equal for tokens of both sides that end at the same byte."""
    whole: Bool[np.ndarray, " tokens"]
    """Whether a token completes the character that it ends in, the last of several that spell it."""


def _ends(ends: Int[np.ndarray, " tokens"]) -> _Ends:
    keys = 2 * ends.astype(np.int64)
    if len(keys) > 1 and keys[-1] == keys[-2]:
        # the end of the turn has no text, and comes after it
        keys[-1] += 1
    return _Ends(keys, np.append(keys[1:] != keys[:-1], True))
