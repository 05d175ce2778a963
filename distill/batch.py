"""Micro-batches: joined samples -> padded student inputs and packed teacher rows. Pure functions."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from distill.joined_sample import JoinedSample
from distill.logit_targets import LogitNeeds, LogitTargets, pack_logit_targets
from distill.passes import (
    CachedRows,
    RecalibratedPass,
    ShuffledPass,
    recalibrated_pass,
    regularization_pass,
    shuffled_pass,
    with_stand_ins,
)
from recalibrator.joint_sequence import (
    joint_turns,
    plan_joint_sequence,
    question_positions,
)


@dataclass(frozen=True, kw_only=True)
class StudentBatch:
    """Right-padded inputs; rows are indices into the flattened ``[batch * student_tokens]`` grid."""

    input_ids: Int[Tensor, "batch student_tokens"]
    attention_mask: Int[Tensor, "batch student_tokens"]
    model_inputs: dict[str, Tensor]
    question_rows: Int[Tensor, " question_rows"]
    predicting_rows: Int[Tensor, " student_answer_tokens"]
    labels: Int[Tensor, " student_answer_tokens"]
    weights: Float[Tensor, " student_answer_tokens"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one process."""

    sample_ids: tuple[str, ...]
    """Without fillers."""
    num_tokens: int
    """Student tokens, without padding and fillers."""
    student: StudentBatch
    sample_of_question_row: Int[Tensor, " question_rows"]
    main: RecalibratedPass | None = None
    sample_of_answer_token: Int[Tensor, " answer_tokens"] | None = None
    regularization: RecalibratedPass | None = None
    shuffled: ShuffledPass | None = None
    logit_targets: LogitTargets | None = None


def collate(
    samples: Sequence[JoinedSample],
    *,
    with_answers: bool,
    with_recalibrator: bool,
    with_regularization: bool,
    include_boundary_row: bool,
    student_answer_fraction: float = 0.0,
    logit_needs: LogitNeeds | None = None,
    regularization_only: Sequence[JoinedSample] = (),
) -> Batch:
    """Build one micro-batch.

    Args:
        samples: Joined samples, fillers last.
        with_answers: Feed the student its answers too; otherwise it stops at its last question row.
        with_recalibrator: Pack the teacher's rows for the Recalibrator's main pass.
        with_regularization: Pack the teacher's question rows of the samples that have them.
        include_boundary_row: Supervise the row that predicts the first answer token of a turn (A7).
        student_answer_fraction: Share of each answer whose rows come from the student in the main pass.
        logit_needs: What to pack of the teacher's predictions for the student's own rows.
        regularization_only: Fillers of which the regularization pass alone takes the rows.
    """
    questions = [len(question_positions(sample.encoded.spans)) for sample in samples]
    batch = Batch(
        sample_ids=tuple(sample.encoded.sample_id for sample in samples if sample.weight),
        num_tokens=sum(student_tokens(s, with_answers=with_answers) for s in samples if s.weight),
        student=_student_batch(samples, with_answers=with_answers),
        sample_of_question_row=torch.arange(len(samples)).repeat_interleave(torch.tensor(questions)),
        logit_targets=None if logit_needs is None else _logit_targets(samples, logit_needs),
    )
    if not with_recalibrator:
        return batch
    turns = [joint_turns(s.encoded.spans, answer_spans=s.teacher.spans) for s in samples]
    cached = CachedRows.of([*samples, *regularization_only])
    main = recalibrated_pass(
        cached.take(range(len(samples))),
        plan=plan_joint_sequence(turns),
        question_rows=None,
        include_boundary_row=include_boundary_row,
    )
    lengths = torch.tensor([sum(turn.num_answer_rows for turn in sample_turns) for sample_turns in turns])
    shuffled = shuffled_pass(turns, main.plan)
    if student_answer_fraction > 0:
        width = batch.student.input_ids.shape[1]
        main, shuffled = with_stand_ins(samples, main, shuffled, fraction=student_answer_fraction, width=width)
    return dataclasses.replace(
        batch,
        main=main,
        sample_of_answer_token=torch.arange(len(samples)).repeat_interleave(lengths),
        regularization=regularization_pass(cached, include_boundary_row) if with_regularization else None,
        shuffled=shuffled,
    )


def student_tokens(sample: JoinedSample, *, with_answers: bool) -> int:
    """Return how many tokens of a sample the student reads; without its answers it stops before the last one."""
    return len(sample.encoded.token_ids) if with_answers else sample.encoded.spans[-1].start


def _student_batch(samples: Sequence[JoinedSample], *, with_answers: bool) -> StudentBatch:
    lengths = [student_tokens(sample, with_answers=with_answers) for sample in samples]
    width = max(lengths)
    ids = [torch.from_numpy(s.encoded.token_ids[:n]).long() for s, n in zip(samples, lengths, strict=True)]
    input_ids = torch.stack([_pad_with_last(row, width) for row in ids])
    predicting, labels, weights, questions = [], [], [], []
    for index, sample in enumerate(samples):
        questions.append(question_positions(sample.encoded.spans) + index * width)
        for span in sample.encoded.spans if with_answers else ():
            predicting.append(torch.arange(span.start - 1, span.stop - 1) + index * width)
            labels.append(ids[index][span.start : span.stop])
            weights.append(torch.full((span.stop - span.start,), sample.weight))
    return StudentBatch(
        input_ids=input_ids,
        attention_mask=(torch.arange(width) < torch.tensor(lengths)[:, None]).long(),
        model_inputs=_model_inputs(samples, lengths),
        question_rows=torch.cat(questions),
        predicting_rows=torch.cat(predicting or [torch.arange(0)]),
        labels=torch.cat(labels or [torch.arange(0)]),
        weights=torch.cat(weights or [torch.zeros(0)]),
    )


def _pad_with_last(ids: Int[Tensor, " tokens"], width: int) -> Int[Tensor, " width"]:
    # the last token ends a turn or a header: never an image token, whatever the tokenizer's pad token is
    return torch.cat([ids, ids[-1:].expand(width - len(ids))])


def _model_inputs(samples: Sequence[JoinedSample], lengths: Sequence[int]) -> dict[str, Tensor]:
    names = sorted({name for sample in samples for name in sample.encoded.model_inputs})
    inputs: dict[str, Tensor] = {}
    for name in names:
        if name.endswith("token_type_ids"):
            rows = [_token_types(s, name)[:length] for s, length in zip(samples, lengths, strict=True)]
            inputs[name] = pad_sequence(rows, batch_first=True)
        else:
            having = [s.encoded.model_inputs for s in samples if name in s.encoded.model_inputs]
            inputs[name] = _join_images([model_inputs[name] for model_inputs in having])
    return inputs


def _join_images(parts: Sequence[Tensor]) -> Tensor:
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat([*parts])
    # tiles per image, which processors pad to the most within one call
    return pad_sequence([image for part in parts for image in part], batch_first=True)


def _token_types(sample: JoinedSample, name: str) -> Int[Tensor, " tokens"]:
    types = sample.encoded.model_inputs.get(name)
    return torch.zeros(len(sample.encoded.token_ids), dtype=torch.long) if types is None else types[0]


def _logit_targets(samples: Sequence[JoinedSample], needs: LogitNeeds) -> LogitTargets:
    return pack_logit_targets(
        encoded=[sample.encoded for sample in samples],
        targets=[sample.teacher for sample in samples],
        weights=[sample.weight for sample in samples],
        needs=needs,
    )
