"""Packed students: samples in one row give what each gives alone, values and gradients, and do not see each other."""

import dataclasses

import numpy as np
import pytest
import torch

from distill.batch import StudentBatch, collate
from distill.joined_sample import JoinedSample
from distill.packing import can_pack
from distill.student import last_hidden_state, load_student, packs
from teacher_cache.schema import EncodedConversation
from tests.families.conftest import Directories
from tests.families.models import FAMILIES, HEADS
from tests.families.samples import encode, samples_of

PACKED = [*FAMILIES, "granite", "cohere"]


def batch_of(conversations: list[EncodedConversation]) -> StudentBatch:
    return collate(
        [JoinedSample(encoded=conversation, targets=None) for conversation in conversations],
        with_answers=True,
        with_recalibrator=False,
        with_regularization=False,
        include_boundary_row=True,
    ).student


def run(student: torch.nn.Module, batch: StudentBatch, *, packed: bool) -> torch.Tensor:
    rows = last_hidden_state(
        student,
        batch.input_ids,
        attention_mask=batch.attention_mask,
        model_inputs=batch.model_inputs,
        packed=packed,
    )
    return rows[batch.attention_mask.bool()]


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_equal_padded_ones(name: str, text_only: bool, directories: Directories) -> None:
    path = directories(name)
    assert packs(path)
    student = load_student(path, dtype="float32").eval()
    samples = [one for one in samples_of((FAMILIES | HEADS)[name]) if not (text_only and one.images)]
    batch = batch_of(encode(path, samples))
    body = student.get_decoder().layers[0].mlp.down_proj.weight
    weights, rows, gradients = None, [], []
    for packed in (False, True):
        student.zero_grad()
        row = run(student, batch, packed=packed)
        weights = torch.randn(row.shape, generator=torch.Generator().manual_seed(0)) if weights is None else weights
        (row * weights).sum().backward()
        rows.append(row.detach())
        gradients.append(body.grad.clone())
    for padded, packed in (rows, gradients):
        assert float((packed - padded).norm() / padded.norm()) < 1e-5
    apart = (rows[1] - rows[0]).norm(dim=-1) / rows[0].norm(dim=-1)
    assert float(apart.max()) < 1e-5


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_sample_does_not_see_its_neighbours(name: str, directories: Directories) -> None:
    path = directories(name)
    student = load_student(path, dtype="float32").eval()
    first, second = encode(path, samples_of((FAMILIES | HEADS)[name])[-2:])
    ids = first.token_ids.copy()
    ids[0] = ids[0] + 1 if ids[0] == ids[1] else ids[1]
    other = dataclasses.replace(first, token_ids=ids)
    with torch.inference_mode():
        rows = [run(student, batch_of([one, second]), packed=True) for one in (first, other)]
    length = len(first.token_ids)
    assert not np.array_equal(first.token_ids, other.token_ids)
    assert not torch.equal(rows[0][:length], rows[1][:length])
    assert torch.equal(rows[0][length:], rows[1][length:])


def test_a_family_that_is_not_named_is_padded(directories: Directories) -> None:
    config = load_student(directories("gemma2"), dtype="float32").config
    assert not can_pack(config)
