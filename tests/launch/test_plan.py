"""`genrecal cache plan` against caches that are really built, and its arithmetic against figures worked out by hand."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors import safe_open

from distill.config import TrainConfig
from launch.cli import main
from launch.demo.digits import generate_digit_vqa
from launch.demo.make_models import TRAINED_TEACHER
from launch.plan_config import PlanConfig
from launch.plan_cost import break_even, stage_readings, teacher_speed
from launch.run_config import RunConfig, load_run_config
from launch.run_students import RunStudent
from teacher_cache import open_cache
from teacher_cache.data_statistics import estimate_totals
from teacher_cache.inspect import cache_status
from teacher_cache.row_sample import count_rows, evenly_spread, read_chosen
from teacher_cache.samples import read_rows
from tests.launch.test_cache_find import fill

FAMILIES = ("tiny_qwen2_vl", "tiny_internvl", "tiny_llava", "tiny_qwen2")
DOCUMENT = Path(__file__).parents[2] / "docs" / "planning.md"


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (90, 120, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def conversation(number: int, *, with_images: bool) -> dict[str, Any]:
    """One to three turns, and none to two images of different sizes."""
    images = [png(16 + 8 * (number % 3), 24), png(32, 16)][: number % 3] if with_images else []
    messages = []
    for turn in range(1 + number % 3):
        marks = "<image>" * len(images) if turn == 0 else ""
        messages += [
            {"role": "user", "content": f"{marks}Which digit is the largest? Row {number}, turn {turn}."},
            {"role": "assistant", "content": "The sum is twelve. " * (1 + (number * 7 + turn) % 5)},
        ]
    return {"id": f"row-{number}", "messages": messages, "images": images}


def write_rows(path: Path, rows: list[dict[str, Any]], *, row_group_size: int = 1000) -> Path:
    schema = pa.schema(
        {
            "id": pa.string(),
            "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
            "images": pa.list_(pa.binary()),
        }
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=row_group_size)
    return path


def write_run(folder: Path, *, teacher: Path | str, data: Path | str, **sections: Any) -> Path:
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "cache": {
            "uri": str(folder / "cache"),
            "teacher": {"model": str(teacher), "dtype": "float32"},
            "data": {"path": str(data), "max_length": 512},
            "targets": {"topk": 8, "question_fraction": 0.5},
            "samples_per_shard": 5,
            "build": {"engine": "transformers"},
        },
        "students": [{"name": "small", "model": "student"}],
        **sections,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def plan(capsys: pytest.CaptureFixture[str], run_file: Path, *overrides: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["cache", "plan", str(run_file), "--json", *overrides]) == 0
    return json.loads(capsys.readouterr().out)


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def folder_files(path: Path) -> int:
    return sum(file.is_file() for file in path.rglob("*"))


def stored_tokens(uri: Path) -> dict[str, int]:
    cache = open_cache(str(uri))
    targets = cache.read(cache.sample_ids)
    answers = sum(span.stop - span.start for target in targets for span in target.spans)
    return {"tokens": sum(len(target.token_ids) for target in targets), "answer_tokens": answers}


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("codec", ["exact", "fp8"])
@pytest.mark.parametrize("model", FAMILIES)
def test_small_data_is_planned_as_it_is_built(
    model: str,
    codec: str,
    compression: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    rows = [conversation(number, with_images=model != "tiny_qwen2") for number in range(12)]
    data = write_rows(tmp_path / "data.parquet", rows)
    run_file = write_run(tmp_path, teacher=request.getfixturevalue(model), data=data)
    overrides = ["--cache.targets.codec", codec, "--cache.build.compression", compression]
    planned = plan(capsys, run_file, *overrides)
    fill(load_run_config(run_file, overrides).cache)

    uri = tmp_path / "cache"
    status = cache_status(str(uri))
    assert {name: planned[name] for name in ("tokens", "answer_tokens")} == stored_tokens(uri)
    assert planned["question_tokens"] == planned["tokens"] - planned["answer_tokens"]
    assert (planned["image_tokens"] > 0) == (model != "tiny_qwen2")
    assert (planned["samples"], planned["skipped"]) == (12, 0)
    assert planned["shards"] == status.committed_shards == 3
    assert planned["files"] == folder_files(uri)
    (head,) = uri.glob("teacher_head-*.safetensors")
    assert planned["teacher_head_bytes"] == pytest.approx(head.stat().st_size, abs=16)
    if compression == "none":
        assert planned["bytes_by_tier"] == status.tier_bytes
        assert planned["total_bytes"] == pytest.approx(folder_bytes(uri), rel=0.002)
    else:
        for tier in ("A", "Q"):
            assert planned["bytes_by_tier"][tier] == pytest.approx(status.tier_bytes[tier], rel=0.35)
        assert planned["total_bytes"] == pytest.approx(folder_bytes(uri), rel=0.15)


def test_other_codecs_are_told_as_if_they_were_chosen(
    tmp_path: Path, tiny_qwen2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "data.parquet", [conversation(number, with_images=False) for number in range(4)])
    run_file = write_run(tmp_path, teacher=tiny_qwen2, data=data)
    alternatives = plan(capsys, run_file)["alternatives"]
    assert len(alternatives) == 3
    for other in alternatives:
        overrides = ["--cache.targets.codec", other["codec"], "--cache.build.compression", other["compression"]]
        chosen = plan(capsys, run_file, *overrides)
        assert chosen["bytes_by_tier"] == other["bytes_by_tier"]
        assert chosen["total_bytes"] == pytest.approx(other["total_bytes"], rel=1e-3)


def test_bad_samples_are_told_before_the_build_meets_them(
    tmp_path: Path, tiny_qwen2_vl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [conversation(number, with_images=True) for number in range(9)]
    rows[4]["messages"][1]["content"] = " "  # no answer
    rows[5]["messages"][0]["content"] *= 60  # too long; row 5 has two images and one question now repeats their marks
    rows[6]["messages"][0]["content"] = "Which digit? " * 300
    rows[7]["images"] = [b"no image"]
    run_file = write_run(tmp_path, teacher=tiny_qwen2_vl, data=write_rows(tmp_path / "data.parquet", rows))
    planned = plan(capsys, run_file)
    assert {bad["sample_id"]: bad["reason"] for bad in planned["skipped_in_sample"]} == {
        "row-4": "empty-answer",
        "row-5": "bad-row",
        "row-6": "too-long",
        "row-7": "corrupt-image",
    }
    assert (planned["samples"], planned["skipped"]) == (5, 4)
    assert main(["cache", "plan", str(run_file)]) == 0
    assert "`cache.data.max_skipped_samples` allows 0" in capsys.readouterr().out
    fill(load_run_config(run_file, ["--cache.data.max-skipped-samples", "4"]).cache)
    status = cache_status(str(tmp_path / "cache"))
    assert planned["tokens"] == stored_tokens(tmp_path / "cache")["tokens"]
    assert planned["bytes_by_tier"] == status.tier_bytes
    assert planned["total_bytes"] == pytest.approx(folder_bytes(tmp_path / "cache"), rel=0.02)


def test_a_part_of_the_demos_data_tells_the_whole_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate_digit_vqa(tmp_path, num_train=320, num_test=1, seed=1, max_turns=2)
    run_file = write_run(tmp_path, teacher=TRAINED_TEACHER, data=tmp_path / "train.parquet")
    overrides = ["--cache.samples-per-shard", "64", "--cache.targets.question-fraction", "1.0"]
    planned = plan(capsys, run_file, *overrides, "--plan.sample-rows", "80")
    assert planned["sampled_rows"] == 80
    assert 0 < planned["tokens_relative_error"] < 0.01
    fill(load_run_config(run_file, overrides).cache)
    uri = tmp_path / "cache"
    status = cache_status(str(uri))
    found = stored_tokens(uri)
    print(planned["tokens"] / found["tokens"], planned["total_bytes"] / folder_bytes(uri))
    assert planned["tokens"] == pytest.approx(found["tokens"], rel=0.01)
    assert planned["answer_tokens"] == pytest.approx(found["answer_tokens"], rel=0.02)
    assert (planned["shards"], planned["files"]) == (status.committed_shards, folder_files(uri))
    for tier, size in status.tier_bytes.items():
        assert planned["bytes_by_tier"][tier] == pytest.approx(size, rel=0.02)
    assert planned["total_bytes"] == pytest.approx(folder_bytes(uri), rel=0.02)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_sorted_data_and_bad_rows_are_estimated_without_bias(
    suffix: str, tmp_path: Path, tiny_qwen2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [conversation(number, with_images=False) for number in range(300)]
    rows.sort(key=lambda row: len(str(row)))
    for number in range(7, 300, 10):
        rows[number]["messages"][-1]["content"] = ""
    data = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        write_rows(data, rows, row_group_size=70)
    else:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_file = write_run(tmp_path, teacher=tiny_qwen2, data=data)
    whole = plan(capsys, run_file)
    part = plan(capsys, run_file, "--plan.sample-rows", "100")
    assert (whole["sampled_rows"], part["sampled_rows"]) == (300, 100)
    assert whole["skipped"] == 30
    assert part["skipped"] == pytest.approx(30, abs=8)
    error = part["tokens"] / whole["tokens"] - 1
    assert abs(error) < 3 * part["tokens_relative_error"]
    assert part["tokens_relative_error"] < 0.05


def test_max_samples_limits_what_is_planned(
    tmp_path: Path, tiny_qwen2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "data.parquet", [conversation(number, with_images=False) for number in range(30)])
    run_file = write_run(tmp_path, teacher=tiny_qwen2, data=data)
    assert plan(capsys, run_file, "--cache.data.max-samples", "7")["samples"] == 7
    assert plan(capsys, run_file, "--cache.data.max-samples", "20", "--plan.sample-rows", "10")["samples"] == 20


@pytest.mark.parametrize("row_group_size", [1, 7, 100])
def test_chosen_rows_are_the_ones_that_were_asked_for(row_group_size: int, tmp_path: Path) -> None:
    rows = [conversation(number, with_images=True) for number in range(100)]
    path = write_rows(tmp_path / "data.parquet", rows, row_group_size=row_group_size)
    numbers = evenly_spread(count_rows(path), at_most=9)
    assert len(set(numbers)) == 9
    assert max(np.diff([-1, *numbers, 100])) <= 12
    every = [row for _, row in read_rows(path)]
    assert list(read_chosen(path, numbers)) == [(number, every[number]) for number in numbers]


def test_totals_of_what_the_facts_decide_are_exact() -> None:
    rng = np.random.default_rng(0)
    facts = np.concatenate([np.ones((1000, 1)), rng.integers(0, 50, (1000, 4))], axis=1)
    values = facts @ rng.normal(size=(5, 2)) + 100
    numbers = evenly_spread(1000, at_most=60)
    totals = estimate_totals(values[numbers], facts=facts, numbers=numbers)
    assert totals.values == pytest.approx(values.sum(axis=0), rel=1e-9)
    assert totals.errors == pytest.approx((0, 0), abs=1e-6)


def test_standard_errors_are_those_of_repeated_samples() -> None:
    rng = np.random.default_rng(1)
    facts = np.concatenate([np.ones((2000, 1)), rng.integers(0, 50, (2000, 4))], axis=1)
    values = facts[:, 1:2] + rng.normal(100, 20, (2000, 1))
    misses, errors = [], []
    for _ in range(300):
        numbers = sorted(rng.choice(2000, 200, replace=False).tolist())
        totals = estimate_totals(values[numbers], facts=facts, numbers=numbers)
        misses.append(totals.values[0] - values.sum())
        errors.append(totals.errors[0])
    assert np.std(misses) == pytest.approx(np.mean(errors), rel=0.15)
    assert abs(np.mean(misses)) < 0.25 * np.mean(errors)


@pytest.mark.parametrize("model", FAMILIES)
def test_parameters_are_those_of_the_weights(
    model: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    directory: Path = request.getfixturevalue(model)
    with safe_open(directory / "model.safetensors", framework="np") as tensors:
        stored = sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118
    run_file = write_run(tmp_path, teacher=directory, data="nowhere.parquet", plan=STATED)
    planned = plan(capsys, run_file)
    assert planned["parameters"] == stored
    assert planned["flops_per_token"] == 2 * stored
    assert planned["hidden_size"] == 64


STATED = {"samples": 1000, "question_tokens": 90.0, "answer_tokens": 10.0}
SIZES = {"hidden_size": 64, "vocab_size": 100, "parameters": 10**9}


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({}, "`plan.hidden_size`, `plan.vocab_size`, `plan.parameters`"),
        ({"hidden_size": 64, "vocab_size": 100}, "set `plan.parameters`"),
        ({"hidden_size": 64, "vocab_size": 100, "tokens_per_s_per_replica": 5.0}, "no data file at nowhere.parquet"),
        (SIZES, "`plan.samples`, `plan.question_tokens`, `plan.answer_tokens`"),
        (SIZES | {"samples": 5, "answer_tokens": 2.0}, "without `plan.question_tokens`"),
        (SIZES | STATED | {"image_tokens": 91.0}, "`plan.question_tokens` is 90"),
        (SIZES | STATED | {"turns": 91.0}, "`plan.question_tokens` is 90"),
        (SIZES | {"sampel_rows": 5}, "plan.sampel_rows"),
    ],
)
def test_what_is_missing_is_named(
    section: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = write_run(tmp_path, teacher="nobody/teacher", data="nowhere.parquet", plan=section)
    assert main(["cache", "plan", str(run_file)]) == 2
    assert named in capsys.readouterr().err


def test_data_needs_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_qwen2: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_bytes((tiny_qwen2 / "config.json").read_bytes())
    data = write_rows(tmp_path / "data.parquet", [conversation(0, with_images=False)])
    run_file = write_run(tmp_path, teacher=tmp_path / "teacher", data=data)
    assert main(["cache", "plan", str(run_file)]) == 2
    error = capsys.readouterr().err
    assert "chat template" in error
    assert "`plan.samples`" in error


WATCHED = """
import socket, sys
def refuse(*arguments, **options):
    raise AssertionError("the network is asked")
socket.socket.connect = refuse
from launch.cli import main
codes = [main(["cache", "plan", sys.argv[1], *more]) for more in ([], ["--cache.teacher.model", "nobody/teacher"])]
found = {"ray", "vllm", "deepspeed"} & set(sys.modules)
assert not found, found
assert codes == [0, 2], codes
"""


def test_nothing_is_written_fetched_started_or_loaded(tmp_path: Path, tiny_qwen2_vl: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for file in tiny_qwen2_vl.iterdir():
        if file.suffix != ".safetensors":
            (teacher / file.name).write_bytes(file.read_bytes())
    data = write_rows(tmp_path / "data.parquet", [conversation(number, with_images=True) for number in range(5)])
    run_file = write_run(tmp_path, teacher=teacher, data=data)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB")}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(run_file)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "planning fetches nothing" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.fixture
def worked_example(tmp_path: Path) -> Path:
    """The run file in docs/planning.md."""
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "qwen2-vl-72b.yaml"
    path.write_text(text)
    return path


def test_the_worked_example_has_the_sizes_of_the_method(
    worked_example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Per sample of 1,600 question and 200 answer tokens: A 3.29 or 1.65 MB, A + Q 29.5 or 14.8 MB; 27 GB a batch."""
    planned = plan(capsys, worked_example)
    by_codec = {(other["codec"], other["compression"]): other["bytes_by_tier"] for other in planned["alternatives"]}
    by_codec["exact", "none"] = planned["bytes_by_tier"]
    for codec, tier_a, both in (("exact", 3.29e6, 29.5e6), ("fp8", 1.65e6, 14.8e6)):
        sizes = by_codec[codec, "none"]
        assert sizes["A"] / 1e6 == pytest.approx(tier_a, rel=0.005)
        assert (sizes["A"] + sizes["Q"]) / 1e6 == pytest.approx(both, rel=0.005)
    assert 8192 * planned["bytes_by_tier"]["A"] / 1e6 == pytest.approx(27e9, rel=0.005)
    assert planned["teacher_head_bytes"] == pytest.approx(2.49e9, rel=0.001)
    assert planned["tokens"] == 1_800_000_000
    # 260 TFLOP per pass of the teacher, as the paper has it, at 40 % of 989 TFLOP/s
    assert planned["flops_per_token"] * 1800 == pytest.approx(260e12, rel=0.02)
    assert planned["gpu_hours"] == pytest.approx(1e6 * 260e12 / (0.4 * 989e12) / 3600, rel=0.02)
    assert planned["wall_hours"] == pytest.approx(planned["gpu_hours"] / 32)
    assert planned["break_even_students"] == pytest.approx(0.51, abs=0.01)
    assert planned["break_even_epochs"] == pytest.approx(1.03, abs=0.01)


@pytest.mark.parametrize("speed", [[], ["--plan.tokens-per-s-per-replica", "10000"]], ids=["estimated", "measured"])
def test_the_stages_of_a_pipeline_count_as_gpus(
    speed: list[str], worked_example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = plan(capsys, worked_example, "--cache.build.pipeline-parallel-size", "2", *speed)
    assert stages["gpus"] == 64
    assert stages == plan(capsys, worked_example, "--cache.build.tensor-parallel-size", "16", *speed)


def test_the_document_shows_what_the_command_prints(worked_example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "plan", str(worked_example)]) == 0
    (shown,) = re.findall(r"^```text\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert capsys.readouterr().out == shown


def test_every_key_of_the_section_is_explained() -> None:
    text = DOCUMENT.read_text()
    for name, field in PlanConfig.model_fields.items():
        assert f"`{name}`" in text or f"`plan.{name}`" in text, name
        assert field.description


def stated_run(**plan_section: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": "run",
            "cache": {"uri": "c", "teacher": {"model": "t"}, "data": {"path": "d"}},
            "students": [{"name": "small", "model": "student"}],
            "train": {
                "align": {"global_batch_size": 10, "max_steps": 30},
                "distill": {"global_batch_size": 20},
                "finetune": {"global_batch_size": 5},
            },
            "plan": plan_section,
        }
    )


TIER_BYTES: dict[Any, int] = {"A": 1_000_000, "Q": 9_000_000, "L": 500_000}


def costs(config: RunConfig, *, students: tuple[RunStudent, ...] | None = None) -> Any:
    """Of a cache with 100 samples of 50 tokens and a replica of 4 GPUs that does 1,000 tokens/s."""
    students = students or config.students
    speed = teacher_speed(config.plan, parameters=None, gpus_per_replica=4, num_replicas=2)
    readings = stage_readings(
        students,
        config.train,
        samples=100,
        tier_bytes=TIER_BYTES,
        tokens=5000,
        step_time_s=config.plan.step_time_s,
    )
    pays = break_even(
        config.plan,
        speed=speed,
        tokens=5000,
        samples=100,
        total_bytes=10**12,
        readings=readings,
    )
    return speed, readings, pays


def test_costs_by_hand() -> None:
    config = stated_run(tokens_per_s_per_replica=1000.0, read_gb_per_s_per_process=0.01, step_time_s=2.0)
    speed, readings, pays = costs(config)
    assert speed.gpu_hours(5000) == pytest.approx(5 * 4 / 3600)
    assert speed.wall_hours(5000) == pytest.approx(2.5 / 3600)
    align, distill = readings
    assert (align.tiers, distill.tiers) == (("A", "Q"), ("A",))
    assert (align.samples, distill.samples) == (300, 100)
    assert (align.bytes_per_sample, distill.bytes_per_sample) == (100_000, 10_000)
    assert (align.bytes_per_step, align.bytes_per_s) == (1_000_000, 500_000)
    assert align.bytes_per_s_per_1000_tokens_per_s == 2_000_000
    assert pays.live_gpu_hours_per_student == pytest.approx(400 * 50 / 1000 * 4 / 3600)
    assert pays.read_gpu_hours_per_student == pytest.approx((300 * 100_000 + 100 * 10_000) / 1e7 / 3600)
    assert pays.students == pytest.approx(20 / (80 - 3.1))
    assert pays.epochs == pytest.approx(4 * pays.students)


def test_storage_counts_where_it_has_a_price() -> None:
    free = costs(stated_run(tokens_per_s_per_replica=1000.0))[2]
    dear = costs(stated_run(tokens_per_s_per_replica=1000.0, storage_gpu_hours_per_tb=3.0))[2]
    assert dear.cache_gpu_hours == pytest.approx(free.cache_gpu_hours + 3)
    assert dear.students > free.students


def test_a_cache_that_is_slower_than_its_teacher_never_pays() -> None:
    _, _, pays = costs(stated_run(tokens_per_s_per_replica=1e9))
    assert pays.students is None
    assert pays.epochs is None


def students_of(*methods: str) -> tuple[RunStudent, ...]:
    return tuple(RunStudent.model_validate({"name": m, "model": "s", "method": m}) for m in methods)


def test_only_students_that_need_the_teacher_count() -> None:
    config = stated_run(tokens_per_s_per_replica=1000.0)
    both = costs(config, students=students_of("genrecal", "sft"))[2]
    assert both == costs(config, students=students_of("genrecal"))[2]
    assert costs(config, students=students_of("sft"))[2].students is None
    _, readings, pays = costs(config, students=students_of("genrecal", "kd"))
    assert [(reading.method, reading.stage, reading.tiers) for reading in readings] == [
        ("genrecal", "align", ("A", "Q")),
        ("genrecal", "distill", ("A",)),
        ("kd", "distill", ("A", "L")),
    ]
    assert pays.live_gpu_hours_per_student == pytest.approx((400 + 100) / 2 * 50 / 1000 * 4 / 3600)


def test_students_cost_what_their_own_settings_say() -> None:
    values = stated_run(tokens_per_s_per_replica=1000.0, samples=100, question_tokens=40, answer_tokens=10)
    record = values.model_dump(mode="json") | {
        "students": [
            {"name": "one", "model": "s"},
            {"name": "two", "model": "s", "train": {"align": {"max_steps": 60, "regularization_weight": 0.0}}},
        ],
        "matrix": {"distill.max_steps": [1, 7]},
    }
    config = RunConfig.model_validate(record)
    _, readings, pays = costs(config)
    one, two = ("one-max_steps-1", "one-max_steps-7"), ("two-max_steps-1", "two-max_steps-7")
    assert [(reading.students, reading.stage, reading.tiers, reading.samples) for reading in readings] == [
        (one, "align", ("A", "Q"), 300),
        ((one[0], two[0]), "distill", ("A",), 20),
        ((one[1], two[1]), "distill", ("A",), 140),
        (two, "align", ("A",), 600),
    ]
    assert [(cost.name, cost.samples) for cost in pays.by_student] == [
        (one[0], 320),
        (one[1], 440),
        (two[0], 620),
        (two[1], 740),
    ]
    hours = [cost.live_gpu_hours for cost in pays.by_student]
    assert hours[0] == pytest.approx(320 * 50 / 1000 * 4 / 3600)
    assert pays.live_gpu_hours_per_student == pytest.approx(sum(hours) / 4)
    assert pays.by_student[3].read_gpu_hours == pytest.approx(740 * 10_000 / 1e9 / 3600)


def test_dropped_question_rows_are_not_read() -> None:
    config = stated_run(tokens_per_s_per_replica=1000.0)
    train = TrainConfig.model_validate(config.train.model_dump() | {"align": {"regularization_weight": 0.0}})
    readings = stage_readings(config.students, train, samples=100, tier_bytes=TIER_BYTES, tokens=5000, step_time_s=None)
    assert readings[0].tiers == ("A",)
    assert readings[0].bytes_per_s is None


def test_the_flop_estimate_and_its_override() -> None:
    parameters = 10**9
    assumed = PlanConfig(gpu_peak_tflop_per_s=100.0, utilisation=0.5)
    speed = teacher_speed(assumed, parameters=parameters, gpus_per_replica=2, num_replicas=3)
    assert speed.tokens_per_s_per_replica == pytest.approx(2 * 50e12 / 2e9)
    assert not speed.is_measured
    measured = PlanConfig(tokens_per_s_per_replica=7.0)
    speed = teacher_speed(measured, parameters=parameters, gpus_per_replica=2, num_replicas=3)
    assert (speed.tokens_per_s_per_replica, speed.is_measured) == (7.0, True)


def test_the_table_is_aligned_and_states_what_it_assumes(
    tmp_path: Path, tiny_qwen2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "data.parquet", [conversation(number, with_images=False) for number in range(4)])
    assert main(["cache", "plan", str(write_run(tmp_path, teacher=tiny_qwen2, data=data))]) == 0
    out = capsys.readouterr().out
    assert "40 % of 989 TFLOP/s per GPU" in out
    assert "4 rows tokenised, all there are" in out
    table = [line for line in out.splitlines() if re.match(r"stored|exact|fp8", line)]
    assert len(table) == 5
    assert len({line.index("  tier A") if "tier A" in line else line.index("  ", 8) for line in table[:2]}) == 1
