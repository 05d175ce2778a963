"""The question-shuffle gap: what is logged, and when it warns of what."""

import logging
from pathlib import Path

import pytest

from distill.config import DistillConfig
from distill.gaps import BOUNDARY_GAP_METRIC, GAP_METRIC, REST_GAP_METRIC, GapWarning, gap_metrics
from distill.stage_sums import Counts
from distill.trainer import train_student
from teacher_cache.config import CacheConfig
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import GAPS, STAGE, read_metrics, student_config, train_config

COUNTS = Counts(
    answer_tokens=10.0, boundary_tokens=2.0, regularization_tokens=0.0, student_tokens=0.0, baseline_terms=0.0
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("metrics")
    data = write_data(folder / "data", num_samples=6)
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=data)


def test_the_gap_is_told_apart_by_rows() -> None:
    sums = {"own": 5.0, "own_boundary": 1.0, "other": 20.0, "other_boundary": 4.0}
    assert gap_metrics(sums, COUNTS) == {GAP_METRIC: 1.5, BOUNDARY_GAP_METRIC: 1.5, REST_GAP_METRIC: 1.5}
    no_boundary = COUNTS._replace(answer_tokens=8.0, boundary_tokens=0.0)
    assert gap_metrics(sums | {"own_boundary": 0.0, "other_boundary": 0.0}, no_boundary) == {
        GAP_METRIC: 15 / 8,
        REST_GAP_METRIC: 15 / 8,
    }


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_gap_near_zero_warns_once_and_late_enough(caplog: pytest.LogCaptureFixture) -> None:
    warning = GapWarning(label="tiny align", max_steps=10)
    small = {GAP_METRIC: 0.01, BOUNDARY_GAP_METRIC: 0.02}
    warning.check(small, step=4)
    warning.check({GAP_METRIC: 2.0}, step=5)
    assert warnings_of(caplog) == []
    warning.check(small, step=6)
    warning.check(small, step=7)
    (message,) = warnings_of(caplog)
    assert message.startswith(
        "tiny align step 6: the question-shuffle gap is 0.0100 nats per token (0.0200 at boundary"
    )
    assert "teach the student nothing" in message
    assert "student_answer_fraction" in message


def test_long_answers_dilute_a_gap_that_boundary_rows_have(caplog: pytest.LogCaptureFixture) -> None:
    GapWarning(label="s", max_steps=1).check({GAP_METRIC: 0.03, BOUNDARY_GAP_METRIC: 6.9}, step=1)
    (message,) = warnings_of(caplog)
    assert "Only the first token of each answer distils" in message
    assert "teach the student nothing" not in message


def test_both_stages_log_their_gaps_and_warn(
    cache: CacheConfig, tiny_llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # learning rates of almost 0: the Recalibrator stays deaf
    stage = STAGE | {"learning_rate": 1e-12, "final_learning_rate": 0.0}
    train = train_config(align=stage, distill=stage, shuffle_gap_interval_steps=1)
    train_student(cache=cache, student=student_config(tiny_llava), train=train, output_dir=tmp_path)
    for name in ("align", "distill"):
        assert all(set(record) >= GAPS for record in read_metrics(tmp_path, name))
    assert not any(GAPS & set(record) for record in read_metrics(tmp_path, "finetune"))
    about_gaps = [message for message in warnings_of(caplog) if "question-shuffle gap is" in message]
    assert [message.split(" step")[0] for message in about_gaps] == ["tiny align", "tiny distill"]


def test_what_cannot_be_seen_in_the_metrics_is_said(
    cache: CacheConfig, tiny_llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = STAGE | {"micro_batch_size": 1, "max_steps": 1}
    distill = DistillConfig.model_validate(stage | {"sft_weight": 0.0})
    train = train_config(stages=("align", "distill"), align=stage, distill=distill.model_dump())
    train_student(cache=cache, student=student_config(tiny_llava), train=train, output_dir=tmp_path)
    messages = warnings_of(caplog)
    assert sum("sft_weight is 0" in message for message in messages) == 1
    assert sum("gap is not measured" in message for message in messages) == 2
