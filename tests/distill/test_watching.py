"""Every metric that is written is described, and TensorBoard, CSV and others get what metrics.jsonl has."""

import csv
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import TrainConfig
from distill.engine import TorchEngine
from distill.monitors import Place, open_monitors
from distill.processes import Processes
from distill.step_log import console_line, open_step_log
from distill.throughput import StepClock, StepWork, known_peak_tflops, throughput_metrics
from distill.trainer import train_student
from distill.zero_config import deepspeed_config, monitor_sections
from teacher_cache.config import CacheConfig
from teacher_cache.errors import ConfigError
from tests.distill.held_out import write_held_out
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import STAGE, read_metrics, student_config, train_config

DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"
ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))
ON_A_GPU = {"memory/peak_allocated_gib", "memory/peak_reserved_gib", "throughput/mfu"}
STAGES = ("align", "distill", "finetune")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("watching")
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=write_data(folder / "data", num_samples=6))


@pytest.fixture(scope="module")
def watched(cache: CacheConfig, tiny_qwen2_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages of genrecal, and distill of kd and uld, with every way of watching."""
    folder = tmp_path_factory.mktemp("watched")
    held_out = write_held_out(folder / "held-out", student=tiny_qwen2_vl)
    validation = {"data": str(held_out), "interval_steps": 2, "generate": True, "max_new_tokens": 4}
    overrides = {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True, "job_name": "mine"}}
    train = train_config(validation=validation, zero={"overrides": overrides})
    for method, stages in {"genrecal": STAGES, "kd": ("distill",), "uld": ("distill",)}.items():
        train_student(
            cache=cache,
            student=student_config(tiny_qwen2_vl, method=method),
            train=train,
            output_dir=folder / method,
            stages=stages,
        )
    return folder


def records(watched: Path) -> list[dict[str, Any]]:
    runs = [("genrecal", stage) for stage in STAGES] + [("kd", "distill"), ("uld", "distill")]
    return [record for method, stage in runs for record in read_metrics(watched / method, stage)]


def described() -> dict[str, str]:
    rows = re.findall(r"^\| `([\w/]+)` \| ([^|]+) \|", DOCUMENT.read_text(), re.MULTILINE)
    return {name: unit.strip() for name, unit in rows}


def test_every_metric_is_described_and_every_description_is_of_a_metric(watched: Path) -> None:
    written = {name for record in records(watched) for name in record}
    assert written | ON_A_GPU == described().keys()
    assert not written & ON_A_GPU


def test_parts_of_a_step_do_not_exceed_it(watched: Path) -> None:
    for record in records(watched):
        if record["global_step"] > 0:
            parts = [record[f"time/{part}_s"] for part in ("forward", "backward", "optimizer")]
            assert all(part > 0 for part in parts)
            waited = record["data/wait_fraction"] * record["time/step_s"]
            assert sum(parts) + waited <= record["time/step_s"] * (1 + 1e-6)
            assert record["throughput/samples_per_s"] * record["time/step_s"] == pytest.approx(6)
            assert 0 <= record["data/padding_fraction"] < 1
            assert record["memory/peak_rss_gib"] > 0.01


def test_tensorboard_and_csv_have_the_values_of_metrics_jsonl(watched: Path) -> None:
    for stage in STAGES:
        logged = read_metrics(watched / "genrecal", stage)
        scalars = tensorboard_scalars(watched / "genrecal" / "tensorboard" / "tiny" / stage)
        assert scalars.keys() == {name for record in logged for name in record if "/" in name}
        for name, points in scalars.items():
            expected = [(record["global_step"], record[name]) for record in logged if name in record]
            assert [step for step, _ in points] == [step for step, _ in expected]
            assert [value for _, value in points] == pytest.approx([value for _, value in expected], rel=1e-6)
        folder = watched / "genrecal" / "csv" / "mine" / "tiny" / stage
        (_, *rows) = csv.reader((folder / "train_loss.csv").read_text().splitlines())
        assert [(int(step), float(value)) for step, value in rows] == [
            (record["global_step"], record["train/loss"]) for record in logged if "train/loss" in record
        ]


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def write_steps(directory: Path, *, start: int, steps: range, value: float) -> None:
    with open_step_log(
        directory,
        place=Place(output_dir=directory, student="tiny", stage="align"),
        label="tiny align",
        start=start,
        max_steps=10,
        interval_steps=100,
        sections={"tensorboard": {"enabled": True}},
        processes=ALONE,
    ) as log:
        for step in steps:
            log.write({"global_step": step, "train/loss": value})


def test_a_resumed_run_shows_each_step_once_with_the_later_value(tmp_path: Path) -> None:
    write_steps(tmp_path, start=0, steps=range(1, 7), value=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 7, "tra')
    write_steps(tmp_path, start=4, steps=range(5, 9), value=2.0)
    expected = [(step, 1.0 if step < 5 else 2.0) for step in range(1, 9)]
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["global_step"], record["train/loss"]) for record in logged] == expected
    assert tensorboard_scalars(tmp_path / "tensorboard/tiny/align")["train/loss"] == expected
    assert all(record["max_steps"] == 10 for record in logged)
    assert logged[-1]["time/remaining_s"] >= 0


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    place = Place(output_dir=tmp_path, student="tiny", stage="align")
    second = Processes(rank=1, world_size=2, device=torch.device("cpu"))
    with open_step_log(
        tmp_path,
        place=place,
        label="tiny align",
        start=0,
        max_steps=1,
        interval_steps=1,
        sections={"csv_monitor": {"enabled": True}},
        processes=second,
    ) as log:
        log.write({"global_step": 1, "train/loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_wandb_gets_a_named_run_and_no_key_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    environment: dict[str, str] = {}

    def init(**options: Any) -> None:
        import os

        environment.update(os.environ)
        calls.append(("init", options))

    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    fake.log = lambda data, **options: calls.append(("log", data | options))  # type: ignore[attr-defined]
    fake.finish = lambda: calls.append(("finish", {}))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    place = Place(output_dir=tmp_path, student="tiny", stage="distill")
    sections = {"wandb": {"enabled": True, "project": "p", "team": "t", "group": "g"}, "csv_monitor": {"enabled": True}}
    with open_monitors(sections, place=place, start=0, processes=ALONE) as monitors:
        monitors.write({"global_step": 3, "train/loss": 0.5}, step=3)
    assert calls == [
        ("init", {"project": "p", "group": "g", "entity": "t"}),
        ("log", {"train/loss": 0.5, "step": 3, "commit": None}),
        ("finish", {}),
    ]
    assert environment["WANDB_NAME"] == "tiny distill"
    assert all("secret-key" not in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_a_monitor_whose_package_is_missing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    place = Place(output_dir=tmp_path, student="tiny", stage="distill")
    with (
        pytest.raises(ConfigError, match="pip install wandb"),
        open_monitors({"wandb": {"enabled": True}}, place=place, start=0, processes=ALONE),
    ):
        pass


def test_keys_in_the_configuration_are_refused_and_the_engine_never_sees_monitors() -> None:
    def settings(**sections: Any) -> TrainConfig:
        return TrainConfig.model_validate({"zero": {"overrides": sections}})

    with pytest.raises(ConfigError, match=r"comet holds an api_key.*COMET_API_KEY"):
        monitor_sections(settings(comet={"enabled": True, "api_key": "x"}))
    off = {"enabled": False}
    train = settings(tensorboard={"enabled": True, "job_name": "j"}, wandb=off)
    assert monitor_sections(train) == {"tensorboard": {"enabled": True, "job_name": "j"}}
    config = deepspeed_config("align", train=train, dtype="bfloat16", num_trained=10)
    assert not {"tensorboard", "wandb", "csv_monitor", "comet"} & config.keys()


def test_throughput_is_summed_and_the_slowest_counts() -> None:
    class Two(Processes):
        def gather(self, values: Any) -> list[list[float]]:
            other = [2.0 * value for value in values]
            return [list(values), other]

    processes = Two(rank=0, world_size=2, device=torch.device("cpu"))
    work = StepWork(samples=3, tokens=90, grid=100, waited_s=0.5, flops=4e12)
    seconds = {"forward": 0.25, "step": 1.0}
    metrics = throughput_metrics(work, seconds=seconds, processes=processes, peak_tflops=30.0)
    assert metrics["throughput/samples_per_s"] == 9 / 2
    assert metrics["throughput/tokens_per_s"] == 270 / 2
    assert metrics["throughput/tokens_per_s_per_process"] == 270 / 4
    assert metrics["throughput/tflops_per_s"] == 12 / 2 / 2
    assert metrics["throughput/mfu"] == 3 / 30
    assert metrics["data/wait_fraction"] == 0.5
    assert metrics["data/padding_fraction"] == pytest.approx(0.1)
    assert (metrics["time/forward_s"], metrics["time/step_s"]) == (0.5, 2.0)


def test_model_flops_are_close_to_what_torch_counts(
    cache: CacheConfig, tiny_qwen2_vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch counts attention scores, and logits that the losses make again; it leaves out norms."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    counted: list[int] = []

    class Counting(TorchEngine):
        def forward(self, **inputs: Any) -> Any:
            if inputs.get("task", "losses") != "losses":
                return super().forward(**inputs)
            with counter:
                return super().forward(**inputs)

        def backward(self, loss: torch.Tensor) -> None:
            forward = counter.get_total_flops()
            with counter:
                super().backward(loss)
            counted.append(forward + counter.get_total_flops())

    monkeypatch.setattr("distill.zero.TorchEngine", Counting)
    stage = STAGE | {"micro_batch_size": 6, "max_steps": 1}
    train = train_config(align=stage, distill=stage, finetune=stage)
    train_student(cache=cache, student=student_config(tiny_qwen2_vl), train=train, output_dir=tmp_path)
    (records,) = zip(*(read_metrics(tmp_path, name) for name in STAGES), strict=True)
    told = [record["throughput/tflops_per_s"] * record["time/step_s"] * 1e12 for record in records]
    assert all(0.7 < own / flops < 1.02 for own, flops in zip(told, counted, strict=True)), (told, counted)


def test_peaks_are_known_by_name() -> None:
    assert known_peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert known_peak_tflops("NVIDIA H100 PCIe") == 756
    assert known_peak_tflops("NVIDIA GeForce GT 710") is None


def test_a_clock_adds_up_its_parts() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.part("forward"):
            sum(range(1000))
    seconds = clock.read()
    assert 0 < seconds["forward"] <= seconds["step"]


def test_the_console_line_has_what_a_glance_needs() -> None:
    record = {"global_step": 12, "max_steps": 100, "train/loss": 1.5, "train/ce_loss": 1.25, "optim/lr": 1e-4}
    record |= {"optim/grad_norm": 0.5, "time/step_s": 0.25, "throughput/tokens_per_s": 12345.0}
    record |= {"throughput/mfu": 0.423, "data/wait_fraction": 0.02, "time/remaining_s": 3725.0}
    assert console_line("tiny align", record=record) == (
        "tiny align step 00012/00100 (12.0%) | loss 1.5000 | ce_loss 1.2500 | norm 0.500 | lr 1.00e-04 | dt 250ms | "
        "tok/s 12,345 | mfu 42.3 | wait 2% | eta 1:02:05"
    )
