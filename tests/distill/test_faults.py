"""R21: losses and gradients that are not finite or spike change nothing but a count, and are told."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.config import FaultConfig
from distill.faults import FaultState, find_fault, spike_limit
from distill.trainer import train_student
from teacher_cache.config import CacheConfig
from teacher_cache.errors import GenrecalError
from tests.distill.injected_faults import (
    bad_inputs,
    bad_targets,
    injected,
    passed_over,
    scaled_gradient,
    scaled_loss,
)
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import STAGE, continue_align, numbers, read_metrics, student_config, train_config

FAULTS = {
    2: bad_targets(math.nan),
    4: bad_targets(math.inf),
    5: bad_inputs,
    7: scaled_loss(math.inf),
    8: scaled_loss(math.nan),
    10: scaled_gradient(math.inf),
    11: scaled_gradient(math.nan),
    14: scaled_loss(100.0),
    16: scaled_gradient(-100.0),
}
KINDS = {2: "loss not finite", 10: "gradient norm not finite", 14: "loss spike", 16: "gradient norm spike"}
LONG = STAGE | {"max_steps": 18}
SENSITIVE = {"spike_min_steps": 4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("faults")
    data = write_data(folder / "data", num_samples=13, text_only=(3, 9), multi_turn=(2, 7))
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=data, without_question_rows=("s001", "s005"))


def read_faults(output_dir: Path) -> list[dict[str, Any]]:
    path = output_dir / "training" / "tiny" / "align" / "faults.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def recalibrator(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "training" / "tiny" / "align" / "recalibrator.safetensors")


def test_a_spike_is_far_above_the_median_and_the_spread() -> None:
    config = FaultConfig(spike_factor=20, spike_min_steps=4)
    assert spike_limit((1.0,) * 3, config=config) == math.inf
    assert spike_limit((1.0,) * 4, config=config) == pytest.approx(1 + 20 * 0.25)
    assert spike_limit((1.0, 2.0, 3.0, 4.0, 5.0), config=config) == pytest.approx(3 + 20 * 1.4826)
    # one wild value in the history raises the limit hardly at all
    assert spike_limit((1.0,) * 9 + (1e9,), config=config) == pytest.approx(6)
    assert spike_limit((1.0,) * 9, config=config.model_copy(update={"spike_factor": 0})) == math.inf


@pytest.mark.parametrize(
    ("loss", "norm", "kind"),
    [
        (1.0, 1.0, ""),
        (math.nan, 1.0, "loss not finite"),
        (1.0, math.inf, "gradient norm not finite"),
        (100.0, 1.0, "loss spike"),
        (1.0, 100.0, "gradient norm spike"),
    ],
)
def test_verdicts(loss: float, norm: float, kind: str) -> None:
    config = FaultConfig(spike_min_steps=4)
    state = FaultState(losses=(1.0, 1.1, 0.9, 1.0), grad_norms=(1.0, 1.1, 0.9, 1.0))
    assert find_fault(state, loss=loss, grad_norm=norm, config=config)[0] == kind


def test_what_was_skipped_is_no_measure_for_the_next() -> None:
    state = FaultState().made(1.0, 2.0, window=2).skipped()
    assert state == FaultState(losses=(1.0,), grad_norms=(2.0,), skipped_updates=1, consecutive_skips=1)
    state = state.made(3.0, 4.0, window=2).made(5.0, 6.0, window=2)
    assert state == FaultState(losses=(3.0, 5.0), grad_norms=(4.0, 6.0), skipped_updates=1)


def test_a_skipped_update_is_as_if_its_batch_had_never_been(
    cache: CacheConfig, tiny_llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"align": LONG, "faults": SENSITIVE, "save_interval_steps": 3}
    with injected(FAULTS):
        continue_align(cache, tiny_llava, tmp_path / "faulty", **settings)
    with passed_over(set(FAULTS)):
        continue_align(cache, tiny_llava, tmp_path / "passed", **settings)
    faults = read_faults(tmp_path / "faulty")
    assert [fault["global_step"] for fault in faults] == list(FAULTS)
    assert {step: fault["kind"] for step, fault in zip(FAULTS, faults, strict=True) if step in KINDS} == KINDS
    records = read_metrics(tmp_path / "faulty", "align")
    made = [record for record in records if record["global_step"] not in FAULTS]
    passed = [r for r in read_metrics(tmp_path / "passed", "align") if r["global_step"] not in FAULTS]
    assert numbers(made) == numbers(passed)
    left, right = recalibrator(tmp_path / "faulty"), recalibrator(tmp_path / "passed")
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert [record["optim/skipped_updates"] for record in records[:5]] == [0, 1, 1, 2, 3]
    assert caplog.text.count("no update is made") == len(FAULTS)
    assert "tiny align step 2: no update is made: loss not finite" in caplog.text
    assert faults[0]["shares"][0]["rank"] == 0
    assert len(faults[0]["shares"][0]["sample_ids"]) == 3
    assert "teacher_rows not finite" in faults[0]["shares"][0]["reasons"][0]
    print(f"R21: torch: {len(FAULTS)} of {len(FAULTS)} faults skipped, 0 traces left, 0 good updates skipped")


def test_skips_survive_a_resume_without_duplicates(cache: CacheConfig, tiny_llava: Path, tmp_path: Path) -> None:
    settings = {"align": LONG, "faults": SENSITIVE, "save_interval_steps": 3}
    with injected(FAULTS):
        continue_align(cache, tiny_llava, tmp_path / "whole", **settings)
        with pytest.raises(RuntimeError, match="pulled"), injected(FAULTS | {13: _pull_the_plug}):
            continue_align(cache, tiny_llava, tmp_path / "halted", **settings)
        continue_align(cache, tiny_llava, tmp_path / "halted", **settings)
    assert read_faults(tmp_path / "halted") == read_faults(tmp_path / "whole")
    assert numbers(read_metrics(tmp_path / "halted", "align")) == numbers(read_metrics(tmp_path / "whole", "align"))


def _pull_the_plug(*_: Any, **__: Any) -> Any:
    raise RuntimeError("pulled")


def test_too_many_skips_in_a_row_stop_the_run_and_lose_nothing(
    cache: CacheConfig, tiny_llava: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"align": LONG, "save_interval_steps": 100}
    bad = dict.fromkeys(range(6, 12), bad_targets(math.nan))
    with injected(bad), pytest.raises(GenrecalError, match=r"3 updates in a row .* step 8: loss not finite") as raised:
        continue_align(cache, tiny_llava, tmp_path / "run", **settings, faults={"max_consecutive_skips": 2})
    assert raised.value.exit_code == 1
    tags = [path.name for path in (tmp_path / "run/training/tiny/align/checkpoints").iterdir()]
    assert tags == ["step-00000005"]
    # with the limit raised the run goes on from there
    with injected(bad):
        continue_align(cache, tiny_llava, tmp_path / "run", **settings, faults={"max_consecutive_skips": 6})
        continue_align(cache, tiny_llava, tmp_path / "whole", **settings, faults={"max_consecutive_skips": 6})
    assert numbers(read_metrics(tmp_path / "run", "align")) == numbers(read_metrics(tmp_path / "whole", "align"))
    assert [fault["global_step"] for fault in read_faults(tmp_path / "run")] == list(bad)


def test_an_explosion_stops_the_run(cache: CacheConfig, tiny_llava: Path, tmp_path: Path) -> None:
    stage = STAGE | {"max_steps": 20, "learning_rate": 1e30, "gradient_clipping": 0}
    with pytest.raises(GenrecalError, match="6 updates in a row"):
        continue_align(cache, tiny_llava, tmp_path, align=stage)


@pytest.mark.parametrize("method", ["sft", "kd", "uld"])
def test_the_losses_of_other_methods_refuse_their_rows_too(
    method: str, cache: CacheConfig, tiny_qwen2_vl: Path, tmp_path: Path
) -> None:
    with injected({2: bad_inputs}):
        train_student(
            cache=cache,
            student=student_config(tiny_qwen2_vl, method=method),
            train=train_config(),
            output_dir=tmp_path,
            stages=["distill"],
        )
    assert [record["optim/skipped_updates"] for record in read_metrics(tmp_path, "distill")] == [0, 1, 1]
