"""Losses of all stages against those kept in git: whoever changes mathematics or the order of samples sees it here.

A tolerance of 1e-4, relative to each value: other processors, thread counts and builds of torch sum in another order,
which moves float32 losses by some 1e-6 at most within five steps (two threads instead of one: 5e-7; ZeRO-3 instead of
plain torch: 5e-7). Gaps are differences of larger values and may be off by 2e-5 nats. What the tests below change on
purpose, by as little as 1 % of one weight, moves losses by more than that. After a change that is meant:
``python -m tests.fixtures.make_golden_losses``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.config import CacheConfig
from tests.distill.golden_runs import RUNS, Losses, losses_of, prepare

ROOT = Path(__file__).parents[2]
GOLDEN: dict[str, Losses] = json.loads((ROOT / "tests" / "fixtures" / "golden_losses.json").read_text())
TOLERANCE = 1e-4
TOLERANCE_NATS = 2e-5
OPTIONS = RUNS["torch genrecal"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[CacheConfig, Path]:
    return prepare(tmp_path_factory.mktemp("golden"))


def differences(losses: Losses, golden: Losses) -> list[str]:
    """Name what is not as it was."""
    assert losses.keys() <= golden.keys()
    found = []
    for stage, records in losses.items():
        for step, (now, before) in enumerate(zip(records, golden[stage], strict=True), start=1):
            found += [
                f"{stage} step {step} {name}: {before.get(name)}, now {now.get(name)}"
                for name in now.keys() | before.keys()
                if now.get(name) != pytest.approx(before.get(name), rel=TOLERANCE, abs=TOLERANCE_NATS)
            ]
    return found


@pytest.mark.parametrize("run", [name for name, options in RUNS.items() if options["backend"] == "torch"])
def test_plain_torch_gives_the_losses_in_git(run: str, prepared: tuple[CacheConfig, Path], tmp_path: Path) -> None:
    assert differences(losses_of(prepared, tmp_path, **RUNS[run]), GOLDEN[run]) == []


def test_zero3_gives_the_losses_in_git(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore::FutureWarning", "-m", "tests.distill.golden_runs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for run, losses in json.loads((tmp_path / "losses.json").read_text()).items():
        assert differences(losses, GOLDEN[run]) == []


def test_zero3_in_one_process_has_the_losses_of_plain_torch() -> None:
    assert differences(GOLDEN["zero3 genrecal"], GOLDEN["torch genrecal"]) == []


PERTURBATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "one per cent more weight of a term": ("align", {"stage": {"kl_weight": 1.01}}),
    "another mean of the gradients": ("align", {"stage": {"adam_betas": (0.89, 0.999)}}),
    "another learning rate at the end": ("align", {"stage": {"final_learning_rate": 2e-5}}),
    "no boundary rows": ("align", {"recalibrator": {"include_boundary_row": False}}),
    "positions of the models": ("align", {"recalibrator": {"positions": "own"}}),
}


@pytest.mark.parametrize("change", PERTURBATIONS)
def test_a_change_of_the_mathematics_shows(change: str, prepared: tuple[CacheConfig, Path], tmp_path: Path) -> None:
    stage, changes = PERTURBATIONS[change]
    losses = losses_of(prepared, tmp_path, **OPTIONS, stages=(stage,), **changes)
    assert differences(losses, GOLDEN["torch genrecal"])


def test_another_order_of_the_samples_shows(
    prepared: tuple[CacheConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.order import SampleOrder

    step = SampleOrder.step
    monkeypatch.setattr(SampleOrder, "step", lambda order, number: step(order, number ^ 1))
    losses = losses_of(prepared, tmp_path, **OPTIONS, stages=("align",))
    found = differences(losses, GOLDEN["torch genrecal"])
    assert any(line.startswith("align step 1 train/loss") for line in found)
