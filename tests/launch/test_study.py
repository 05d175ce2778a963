"""The study: its file, grid, figures and statistics; the small study killed once on the way, with a run that fails."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launch.study.command import read_failures
from launch.study.config import Claim, StudyConfig, load_study
from launch.study.figures import cosine_matrix, spread
from launch.study.grid import cell_digest, cell_folder, plan_cells
from launch.study.pool import Pool, Task
from launch.study.records import STUDENT, load_teacher, metrics
from launch.study.results import RESULT, SCHEMA, Row, read_rows, read_table, write_table
from launch.study.runs import ShuffledTargets, read_tiers
from launch.study.scores import (
    BYTE_CLASSES,
    END_OF_TURN,
    byte_classes,
    calibration_error,
    mean_divergence,
    until_end,
)
from launch.study.statistics import Estimate, answer, estimate, paired_difference, verdict
from teacher_cache import open_cache
from teacher_cache.chat import load_processor, tokenizer_of
from teacher_cache.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = EXAMPLES / "study-small.yaml"
STUDY = [sys.executable, "-m", "launch.cli", "study"]


def row(
    arm: str,
    accuracy: float,
    *,
    bits_per_byte: float = 1.0,
    calibration_error: float = 0.1,
    seed: int = 0,
    student: str = "a",
    teacher: str | None = "t",
) -> Row:
    return Row(
        arm=arm,
        accuracy=accuracy,
        bits_per_byte=bits_per_byte,
        calibration_error=calibration_error,
        seed=seed,
        student=student,
        teacher=teacher,
        student_flops=0.0 if arm == "untouched" else 1.0,
    )


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return yaml.safe_load(SMALL.read_text())


@pytest.mark.parametrize("path", [SMALL, EXAMPLES / "study.yaml"], ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    assert plan_cells(load_study(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"armz": []}, "armz"),
        ({"grid": [{"arms": ["sftt"], "pairs": [{"student": "internvl", "teacher": "strong"}], "seeds": [0]}]}, "sftt"),
        ({"grid": [{"arms": ["sft"], "pairs": [{"student": "intern", "teacher": "strong"}], "seeds": [0]}]}, "intern"),
        ({"arms": [{"name": "sft", "method": "sft", "train": {"distil": {}}}]}, "distil"),
        ({"arms": [{"name": "a", "method": "sft", "cache": "half"}]}, "half"),
        ({"claims": [{"text": "x", "better": "genrecal@align", "worse": "sft"}]}, "genrecal@align"),
    ],
)
def test_faults_in_a_study_file_are_named(
    small: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(small | change))
    with pytest.raises(ConfigError, match=message):
        load_study(path)


def test_a_run_without_a_teacher_is_made_once_and_scaled_ones_come_last() -> None:
    cells = plan_cells(load_study(EXAMPLES / "study.yaml"))
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert {cell.teacher for cell in cells if cell.arm.name in ("untouched", "sft")} == {None}
    assert [cell.seed for cell in cells if cell.arm.name == "untouched"] == [0, 0, 0]
    scaled = [cell.arm.equal_flops is not None for cell in cells]
    assert scaled == sorted(scaled)
    assert {cell.arm.name for cell in cells[:25]} == {"untouched", "sft", "genrecal", "genrecal_stand_ins", "uld"}


def test_what_decides_a_run_changes_its_folder(small: dict[str, Any]) -> None:
    config = StudyConfig.model_validate(small)
    cell = next(cell for cell in plan_cells(config) if cell.arm.name == "genrecal")
    faster = StudyConfig.model_validate(small | {"train": small["train"] | {"distill": {"learning_rate": 1.0}}})
    other = next(cell for cell in plan_cells(faster) if cell.arm.name == "genrecal")
    assert cell_digest(config, cell) != cell_digest(faster, other)
    assert cell_folder(config, cell) != cell_folder(faster, other)
    same = StudyConfig.model_validate(small | {"workers": 1})
    assert cell_digest(config, cell) == cell_digest(same, cell)


def test_arms_read_the_tiers_that_their_losses_need(small: dict[str, Any]) -> None:
    config = load_study(EXAMPLES / "study.yaml")
    tiers = {arm.name: read_tiers(arm, train=config.train_config(arm, seed=0)) for arm in config.arms}
    assert tiers["untouched"] == tiers["sft"] == set()
    assert tiers["genrecal"] == {"A", "Q"}
    assert tiers["genrecal_no_regularization"] == {"A"}
    assert tiers["genrecal_stand_ins"] == {"A", "Q", "L"}


def test_differences_are_paired_by_student_teacher_and_seed() -> None:
    ours = [row("x", 0.5, seed=0), row("x", 0.7, seed=1), row("x", 0.9, seed=0, student="b")]
    theirs = [row("sft", 0.4, seed=0, teacher=None), row("sft", 0.4, seed=1, teacher=None)]
    found, pairs = paired_difference(ours, theirs)
    assert pairs == 1
    assert found is not None
    assert found.mean == pytest.approx(0.2)
    # t(0.975, 1) = 12.706, s = 0.2 / sqrt 2
    assert found.margin == pytest.approx(12.706 * 0.1, rel=1e-3)
    untouched, _ = paired_difference(ours[:2], [row("untouched", 0.3, seed=0, teacher=None)])
    assert untouched is not None
    assert untouched.num_seeds == 2
    assert untouched.mean == pytest.approx(0.3)


def test_a_seed_counts_once_however_many_pairs_it_has() -> None:
    ours = [row("x", 0.5, seed=s, student=name) for s in (0, 1) for name in ("a", "b")]
    theirs = [row("y", 0.5 - 0.1 * (s + 1) * (2 if name == "b" else 1), seed=s, student=name)
              for s in (0, 1) for name in ("a", "b")]  # fmt: skip
    found, pairs = paired_difference(ours, theirs)
    assert (pairs, found and found.num_seeds) == (2, 2)
    assert found is not None
    assert found.mean == pytest.approx((0.15 + 0.3) / 2)


@pytest.mark.parametrize(
    ("mean", "margin", "within", "expected"),
    [
        (0.05, 0.02, None, "reproduced"),
        (0.01, 0.02, None, "not reproduced"),
        (-0.05, 0.02, None, "opposite"),
        (0.05, math.nan, None, "no results"),
        (0.001, 0.01, 0.02, "reproduced"),
        (0.001, 0.03, 0.02, "not reproduced"),
        (0.1, 0.03, 0.02, "opposite"),
    ],
)
def test_a_verdict_goes_by_the_interval(mean: float, margin: float, within: float | None, expected: str) -> None:
    claim = Claim(text="x", better="a", worse="b", equal_within=within)
    assert verdict(claim, Estimate(mean=mean, margin=margin, num_seeds=3)) == expected


def test_an_answer_tells_other_measures_too() -> None:
    ours = [row("x", 0.5, seed=s, bits_per_byte=0.1, calibration_error=0.2 - 0.01 * s) for s in (0, 1)]
    theirs = [row("y", 0.5, seed=s, bits_per_byte=0.2 + 0.02 * s, calibration_error=0.3) for s in (0, 1)]
    found = answer(Claim(text="x", better="x", worse="y"), [*ours, *theirs])
    assert found.verdict == "not reproduced", "as accurate"
    assert found.bits_difference is not None
    assert found.bits_difference.mean == pytest.approx(-0.11)
    assert found.calibration_difference is not None
    assert found.calibration_difference.mean == pytest.approx(-0.105)
    assert answer(Claim(text="x", better="x", worse="z"), ours).bits_difference is None


def test_a_claim_may_compare_teachers() -> None:
    rows = [row("x", 0.5 + 0.1 * s, seed=s, teacher="weak") for s in range(3)]
    rows += [row("x", 0.62 + 0.1 * s + 0.001 * s, seed=s, teacher="strong") for s in range(3)]
    claim = Claim(text="x", better="x", worse="x", better_teacher="strong", worse_teacher="weak")
    assert answer(claim, rows).verdict == "reproduced"
    assert answer(Claim(text="x", better="x", worse="y"), rows).verdict == "no results"


@given(st.lists(st.floats(0, 1), max_size=20).map(sorted))
def test_names_are_written_apart_and_beside_the_panel(heights: list[float]) -> None:
    places = spread(heights, gap=0.05)
    assert len(places) == len(heights)
    assert all(-1e-9 <= place <= 1 for place in places)
    assert all(later - place >= 0.05 - 1e-9 for place, later in pairwise(places))
    assert spread([0.1, 0.5, 0.9], gap=0.05) == [0.1, 0.5, 0.9]


def test_intervals_need_two_seeds() -> None:
    assert math.isnan(estimate([0.5]).margin)
    assert estimate([0.4, 0.6]).mean == pytest.approx(0.5)


def test_calibration_error_is_the_gap_between_sureness_and_score() -> None:
    assert calibration_error(np.array([0.95, 0.95]), np.array([1.0, 0.0])) == pytest.approx(0.45)
    assert calibration_error(np.array([0.05, 0.95]), np.array([0.05, 0.95])) == pytest.approx(0.0)
    assert calibration_error(np.array([1.0]), np.array([0.0])) == pytest.approx(1.0)


def test_confidence_counts_tokens_up_to_the_end_of_the_turn() -> None:
    tokens = torch.tensor([[5, 1, 0, 0], [5, 6, 7, 1], [5, 6, 7, 8]])
    expected = [[True, True, False, False], [True] * 4, [True] * 4]
    assert until_end(tokens, end=1).tolist() == expected


def test_every_token_has_the_class_of_its_first_byte(tiny_qwen2_vl: Path, tiny_llava: Path) -> None:
    for path in (tiny_qwen2_vl, tiny_llava):
        tokenizer = tokenizer_of(load_processor(str(path)))
        classes = byte_classes(tokenizer, vocab_size=len(tokenizer) + 3)
        ids = tokenizer("Which digit is four? 7", add_special_tokens=False, return_offsets_mapping=True)
        starts = [chr(classes[token]) for token in ids["input_ids"]]
        assert starts == ["Which digit is four? 7"[start] for start, _ in ids["offset_mapping"]]
        assert classes[tokenizer.eos_token_id] == END_OF_TURN


def test_divergence_is_zero_for_equal_and_ln2_for_disjoint_distributions() -> None:
    one, other = np.zeros((2, BYTE_CLASSES), dtype=np.float32)
    one[3] = other[4] = 1.0
    key, lone = ("s", 0, 0), ("s", 0, 5)
    assert mean_divergence({key: one, lone: one}, {key: one}) == pytest.approx(0.0, abs=1e-9)
    assert mean_divergence({key: one}, {key: other}) == pytest.approx(math.log(2), rel=1e-6)
    assert math.isnan(mean_divergence({lone: one}, {key: one}))


def test_cosines_show_a_diagonal_where_both_sets_mean_the_same() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 8)) + 100
    cosines = cosine_matrix(values, 3 * values - 50)
    assert np.diag(cosines) == pytest.approx(1.0)
    assert abs(cosines[~np.eye(20, dtype=bool)].mean()) < 0.2


def test_results_survive_the_table(tmp_path: Path) -> None:
    rows = [row("x", 0.5), replace(row("teacher", 0.9), student=None, seed=None)]
    write_table(rows, tmp_path / "results.parquet")
    assert read_table(tmp_path / "results.parquet") == rows
    assert set(SCHEMA.names) == set(Row.__dataclass_fields__)


def die() -> None:
    os._exit(7)


def fail() -> None:
    raise ValueError("no")


def touch(path: Path) -> None:
    path.touch()


def test_the_command_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, launch.study.command, launch.study.report;"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_task_that_dies_takes_nothing_along(tmp_path: Path) -> None:
    here = "tests.launch.test_study"
    tasks = [
        Task(name="dies", target=f"{here}:die", arguments=()),
        Task(name="fails", target=f"{here}:fail", arguments=()),
        Task(name="works", target=f"{here}:touch", arguments=(tmp_path / "made",)),
    ]
    with Pool(workers=1, threads=1, log_dir=tmp_path) as pool:
        errors = {one.task.name: one.error for one in pool.run(tasks)}
    assert errors == {"dies": "the process ended with exit code 7", "fails": "ValueError: no", "works": None}
    assert (tmp_path / "made").exists()


@pytest.fixture(scope="module")
def study(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small study with an arm that cannot work, killed with SIGKILL among its runs, then run to its end."""
    folder = tmp_path_factory.mktemp("study")
    values = small | {"output_dir": str(folder / "run"), "report_dir": str(folder / "report")}
    internvl = {"student": "internvl", "teacher": "strong"}
    values["grid"] = [{"arms": ["kd_forward"], "pairs": [internvl], "seeds": [0]}, *small["grid"]]
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    with (folder / "first.txt").open("w") as log:
        killed = subprocess.Popen([*STUDY, str(path)], start_new_session=True, stderr=log)
    deadline = time.monotonic() + 600
    while not any((folder / "run").glob(f"runs/*/*/*/{RESULT}")) and time.monotonic() < deadline:
        assert killed.poll() is None, (folder / "first.txt").read_text()[-3000:]
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = {file: file.stat().st_mtime_ns for file in (folder / "run").glob(f"runs/*/*/*/{RESULT}")}
    for file in before:  # as if the kill had come between a run's rows and the removal of its weights
        export = file.parent / "training" / STUDENT / "distill" / "export"
        export.mkdir(parents=True, exist_ok=True)
        (export / "model.safetensors").touch()
    done = subprocess.run([*STUDY, str(path)], capture_output=True, text=True, check=False)
    (folder / "stderr.txt").write_text(done.stderr)
    assert done.returncode == 3, done.stderr[-3000:]
    assert before
    assert before == {file: file.stat().st_mtime_ns for file in before}
    told = subprocess.run([*STUDY, str(path), "--report"], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_every_run_but_the_one_that_cannot_work_has_its_row(study: Path) -> None:
    config = load_study(study / "study.yaml")
    found = {(one["arm"], one["student"], one["teacher"], one["seed"]) for one in table(study)}
    expected = {
        (name, cell.student, cell.teacher, cell.seed)
        for cell in plan_cells(config)
        for name in cell.arm.result_names
        if not (cell.arm.method == "kd" and cell.student == "internvl")
    }
    assert found == expected | {("teacher", None, "strong", None)}
    (failure,) = read_failures(config)
    assert failure.name == "kd_forward internvl from strong seed 0"
    assert "method kd needs the teacher's tokenizer" in failure.error
    assert failure.name in (study / "stderr.txt").read_text()


@pytest.mark.slow
def test_rows_hold_their_figures(study: Path) -> None:
    rows = {(one["arm"], one["seed"]): one for one in table(study) if one["student"] != "qwen2-vl"}
    genrecal, sft, untouched = (rows[arm, 0] for arm in ("genrecal", "sft", "untouched"))
    assert untouched["student_flops"] == untouched["total_flops"] == untouched["seconds"] == 0
    assert 0 < sft["student_flops"] == sft["total_flops"] < genrecal["student_flops"] < genrecal["total_flops"]
    assert sft["cache_bytes"] == 0 < rows["genrecal_no_regularization", 0]["cache_bytes"] < genrecal["cache_bytes"]
    assert genrecal["align_question_gap"] is not None
    assert rows["genrecal@distill", 0]["student_flops"] < genrecal["student_flops"]
    for one in rows.values():
        assert 0 <= one["calibration_error"] <= 1
        if one["arm"] != "teacher":
            assert json.loads(one["versions"])["torch"] == torch.__version__
            assert 0 <= one["teacher_divergence"] <= math.log(2)
            assert len(one["config_digest"]) == 64


@pytest.mark.slow
def test_steps_are_scaled_to_the_flops_of_another_arm(study: Path) -> None:
    rows = {(one["arm"], one["seed"]): one for one in table(study) if one["student"] == "internvl"}
    ratio = rows["genrecal", 0]["total_flops"] / rows["sft", 0]["student_flops"]
    scaled = study / "run" / rows["sft_equal_total_flops", 0]["folder"]
    assert len(list(metrics(scaled, "distill"))) == round(2 * ratio)


@pytest.mark.slow
def test_shuffled_targets_are_those_of_other_samples(study: Path) -> None:
    cache = open_cache(str(study / "run" / "caches" / "strong-full"))
    shuffled = ShuffledTargets(cache, seed=0)
    own = cache.read(cache.sample_ids, tiers=("A",))
    others = shuffled.read(cache.sample_ids, tiers=("A",))
    assert all(a.sample_id != b.sample_id and len(a.spans) == len(b.spans) for a, b in zip(own, others, strict=True))
    assert sorted(one.sample_id for one in others) == sorted(cache.sample_ids)
    assert shuffled.targets_fingerprint != cache.targets_fingerprint


@pytest.mark.slow
def test_the_page_holds_claims_and_tables_and_keeps_its_other_text(study: Path) -> None:
    page = study / "report.md"
    first = page.read_text()
    assert "| GenRecal beats SFT | 76.4 against 69.2 | genrecal > sft |" in first
    assert "### internvl from strong" in first
    assert "Failed: kd_forward internvl from strong seed 0" in first
    for link in ("accuracy", "accuracy-by-flops", "accuracy-by-cache", "shuffle-gap", "features", "cosines"):
        assert f"report/{link}.svg" in first
        assert (study / "report" / f"{link}.svg").stat().st_size > 1000
    page.write_text(first.replace("# Study", "# Study\n\nKept."))
    again = subprocess.run([*STUDY, str(study / "study.yaml"), "--report"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert page.read_text() == first.replace("# Study", "# Study\n\nKept.")


@pytest.mark.slow
def test_weights_are_thrown_away_and_the_teachers_side_is_kept(study: Path) -> None:
    runs = study / "run" / "runs"
    assert not list(runs.rglob("model.safetensors"))
    assert list(runs.rglob(f"{STUDENT}/align/features_last.safetensors"))
    scores, own = load_teacher(study / "run" / "teachers" / "strong.scores.npz")
    assert scores.accuracy > 0.5 or len(own.answers) == 10
    assert all(len(read_rows(path)) >= 1 for path in runs.rglob(RESULT))


@pytest.mark.slow
def test_a_folder_made_with_other_data_is_refused(study: Path) -> None:
    values = yaml.safe_load((study / "study.yaml").read_text())
    path = study / "other.yaml"
    path.write_text(yaml.safe_dump(values | {"data": {"num_train": 25, "num_test": 10}}))
    done = subprocess.run([*STUDY, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "was made with other `data`" in done.stderr


def table(study: Path) -> list[dict[str, Any]]:
    return pq.read_table(study / "report" / "results.parquet").to_pylist()
