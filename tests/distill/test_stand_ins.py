"""Student rows in the place of the teacher's answer rows: which ones, what they may know, and what that changes."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.batch import Batch
from distill.config import AlignConfig, RecalibratorOptions, TrainConfig
from distill.gaps import BOUNDARY_GAP_METRIC, REST_GAP_METRIC, gap_metrics
from distill.stage_sums import batch_counts
from distill.stages import StageModel
from distill.stand_ins import StandIns, choose_stand_ins, other_stand_ins
from recalibrator.joint_sequence import JointSequence
from teacher_cache.config import CacheConfig
from teacher_cache.schema import Span
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.test_stages import set_up


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("stand-ins")
    data = write_data(folder / "data", num_samples=5, text_only=(3,), multi_turn=(2,))
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=data)


def options(fraction: float, **align: Any) -> TrainConfig:
    return TrainConfig(
        recalibrator=RecalibratorOptions(student_answer_fraction=fraction), align=AlignConfig.model_validate(align)
    )


def choose(student: list[list[int]], teacher: list[list[int]], *, fraction: float = 1.0) -> StandIns:
    """Choose for answers that end at these bytes, three question tokens before each on the student's side."""
    spans, start = [], 0
    for ends in student:
        spans.append(Span(start + 3, start + 3 + len(ends)))
        start += 3 + len(ends)
    encoded: Any = SimpleNamespace(spans=tuple(spans), answer_byte_ends=np.concatenate(student))
    targets: Any = SimpleNamespace(
        spans=tuple(Span(0, len(ends)) for ends in teacher),
        answer_byte_ends=torch.from_numpy(np.concatenate(teacher)),
    )
    return choose_stand_ins(encoded, targets, fraction=fraction)


def test_the_last_token_that_ends_no_later_stands_in() -> None:
    # student tokens 3, 4, 5 and 6 end at bytes 2, 6, 8 and, for the end of the turn, 8
    chosen = choose([[2, 6, 8, 8]], [[1, 2, 5, 8, 8]])
    assert chosen.positions.tolist() == [2, 3, 3, 5, 6]
    assert chosen.exact.tolist() == [False, True, False, True, True]
    assert chosen.replaced.all()


CHARACTERS = [
    # byte ends of student and teacher, the end of a turn last and without text -> which tokens stand in, exact
    # the teacher spells the last character with two tokens, the student with one: it must not be read before
    ([3, 3], [3, 3, 3], [2, 3, 4], [False, True, True]),
    # the student spells it with two: only the second has read it
    ([3, 3, 3], [3, 3], [4, 5], [True, True]),
    # both spell it with several, nobody knows at which of its bytes they meet
    ([2, 5, 5, 7, 7], [2, 5, 5, 5, 7, 7], [3, 3, 3, 5, 6, 7], [True, False, False, True, True, True]),
    # amid a text: the token before the character stands in for the teacher's first part of it
    ([1, 4, 6, 6], [1, 4, 4, 6, 6], [3, 3, 4, 5, 6], [True, False, True, True, True]),
    # one side closes its turns, the other does not
    ([2, 4], [2, 4, 4], [3, 4, 4], [True, True, False]),
]


@pytest.mark.parametrize(("student", "teacher", "positions", "exact"), CHARACTERS)
def test_no_stand_in_has_read_more_than_the_row_that_it_replaces(
    student: list[int], teacher: list[int], positions: list[int], exact: list[bool]
) -> None:
    chosen = choose([student], [teacher])
    assert chosen.positions.tolist() == positions
    assert chosen.exact.tolist() == exact


def test_a_fraction_takes_the_end_of_every_answer() -> None:
    chosen = choose([[1, 2, 3, 4], [5]], [[1, 2, 3, 4], [5]], fraction=0.3)
    assert chosen.replaced.tolist() == [False, False, True, True, True]
    assert chosen.positions.tolist() == [3, 4, 5, 6, 10]


def test_other_stand_ins_are_those_of_the_next_sample() -> None:
    assert other_stand_ins([2, 0, 3]).tolist() == [2, 3, 0, 1, 0]
    assert other_stand_ins([0, 0]).tolist() == []


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_stand_ins_have_read_the_same_text(cache: CacheConfig, tiny_llava: Path, fraction: float) -> None:
    _, data = set_up(cache, tiny_llava, stage="align", train=options(fraction))
    assert data.spec.tiers == ("A", "Q", "L")
    for sample in data.load(range(5)):
        chosen = choose_stand_ins(sample.encoded, sample.targets, fraction=fraction)
        ends = dict(zip(answer_positions(sample.encoded.spans), sample.encoded.answer_byte_ends.tolist(), strict=True))
        boundary = {start - 1 for start, _ in sample.encoded.spans}
        for position, end, exact in zip(
            chosen.positions.tolist(), sample.targets.answer_byte_ends.tolist(), chosen.exact.tolist(), strict=True
        ):
            assert position in boundary or ends[position] <= end
            assert not exact or ends[position] == end
        assert chosen.exact.any()


def answer_positions(spans: tuple[Span, ...]) -> list[int]:
    return [position for start, stop in spans for position in range(start, stop)]


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_every_slot_gets_the_row_that_belongs_there(cache: CacheConfig, tiny_llava: Path, fraction: float) -> None:
    model, data = set_up(cache, tiny_llava, stage="distill", train=options(fraction))
    samples = data.load(range(5))
    paper = dataclasses.replace(data.spec, student_answer_fraction=0.0)
    batch, plain = data.collate(samples), dataclasses.replace(data, spec=paper).collate(samples)
    assert batch.main is not None
    assert plain.main is not None
    chosen = [choose_stand_ins(s.encoded, s.targets, fraction=fraction) for s in samples]
    replaced = torch.cat([one.replaced for one in chosen])
    plan = batch.main.plan
    assert torch.equal(plan.answer_slots, plain.main.plan.answer_slots[~replaced])
    assert torch.equal(batch.main.answer_rows, plain.main.answer_rows[~replaced])
    slots = torch.cat([plan.question_slots, plan.answer_slots]).sort().values
    assert torch.equal(slots, torch.arange(len(slots)))
    width = batch.student.input_ids.shape[1]
    positions = torch.cat([one.positions + index * width for index, one in enumerate(chosen)])
    assert batch.main.stand_ins is not None
    assert torch.equal(batch.main.stand_ins, positions[replaced])
    lost = plain.main.weights.sum() - batch.main.weights.sum()
    assert float(lost) == sum(unfair(sample, one) for sample, one in zip(samples, chosen, strict=True))
    assert model(batch=batch, counts=batch_counts(batch)).loss.isfinite()


def unfair(sample: Any, chosen: StandIns) -> int:
    """Count answer tokens after a stand-in that ends elsewhere, the last token of a turn predicting none."""
    last = set((np.cumsum([stop - start for start, stop in sample.targets.spans]) - 1).tolist())
    bad = (chosen.replaced & ~chosen.exact).tolist()
    return sum(is_bad and index not in last for index, is_bad in enumerate(bad))


class Copier(nn.Module):
    """The best Recalibrator that looks at no row but the one it stands on: it hands the teacher's rows on as they are.

    On a student's row it gives the mean of the rows it could have wanted: without that row's content, none is better
    in the squared distance.
    """

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.mean = mean[None]

    def forward(self, questions: Tensor, answers: Tensor, plan: JointSequence, **options: Any) -> Tensor:
        del options
        grid = self.mean.repeat(len(questions) + len(answers), 1)
        return grid.index_copy(0, plan.answer_slots, answers)[plan.predicting_slots]


def copied(model: StageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return KL sums of a copying Recalibrator: at boundary rows, and at all others."""
    assert batch.main is not None
    head = model.teacher_head
    assert head is not None
    model.recalibrator = Copier(batch.main.teacher_rows.mean(0))  # type: ignore[assignment]
    passed = batch.main
    student_rows = torch.zeros(len(passed.plan.question_slots), 4)
    with torch.no_grad():
        kl = model._recalibrated_losses(passed, student_rows).kl_loss * passed.weights
    boundary = passed.plan.boundary_mask
    return (kl * boundary).sum(), (kl * ~boundary).sum()


def test_copying_is_perfect_in_the_paper_and_worthless_with_stand_ins(cache: CacheConfig, tiny_llava: Path) -> None:
    kl = {}
    for fraction in (0.0, 0.5, 1.0):
        model, data = set_up(cache, tiny_llava, stage="align", train=options(fraction))
        boundary, rest = copied(model, data.collate(data.load(range(5))))
        assert boundary > 0.1
        kl[fraction] = float(rest)
    assert kl[0.0] == pytest.approx(0.0, abs=1e-4)
    assert kl[0.5] > 1
    assert kl[1.0] > 1.5 * kl[0.5]


def test_the_gap_of_a_trained_recalibrator_stays_open(cache: CacheConfig, tiny_llava: Path) -> None:
    gaps = {}
    for fraction in (0.0, 1.0):
        train = options(fraction, regularization_weight=0.0)
        model, data = set_up(cache, tiny_llava, stage="align", train=train)
        batch = data.collate(data.load(range(5)))
        counts = batch_counts(batch)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for _ in range(40):
            optimizer.zero_grad()
            model(batch=batch, counts=counts).loss.backward()
            optimizer.step()
        with torch.no_grad():
            sums = model.eval()(batch=batch, task="question_shuffle")
        gaps[fraction] = gap_metrics({name: float(total) for name, total in sums._asdict().items()}, counts)
    assert gaps[0.0][REST_GAP_METRIC] < 0.4
    assert gaps[1.0][REST_GAP_METRIC] > 2.0
    assert set(gaps[1.0]) >= {BOUNDARY_GAP_METRIC}


def test_distillation_reaches_the_students_answer_rows(cache: CacheConfig, tiny_llava: Path) -> None:
    reached = {}
    for fraction in (0.0, 1.0):
        model, data = set_up(cache, tiny_llava, stage="distill", train=options(fraction))
        batch = data.collate(data.load(range(5)))
        rows = model._student_rows(batch)
        rows.retain_grad()
        main, _ = model._totals(batch, rows, rows.index_select(0, student_rows_of(batch)))
        main.backward()
        gradient = rows.grad.index_select(0, batch.student.predicting_rows).abs().sum(-1)
        boundary = torch.isin(batch.student.predicting_rows, batch.student.question_rows)
        assert (gradient[boundary] > 0).all()
        reached[fraction] = float((gradient[~boundary] > 0).float().mean())
    assert reached[0.0] == 0.0
    assert reached[1.0] > 0.8


def student_rows_of(batch: Batch) -> Tensor:
    assert batch.main is not None
    rows = [batch.student.question_rows, *([] if batch.main.stand_ins is None else [batch.main.stand_ins])]
    return torch.cat(rows)
