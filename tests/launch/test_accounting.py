"""What a run took, beside what was planned, and how long the rest of it will take."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch import accounting
from launch.accounting import account
from launch.cache_plan import make_plan
from launch.pipeline import Step, _left
from launch.run_config import RunConfig, validated
from launch.software import Gpu
from tests.teacher_cache.store import build, make_samples


@pytest.fixture
def config(tmp_path: Path, digit_samples: Path, tiny_qwen2_vl: Path) -> RunConfig:
    values: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "cache": {
            "uri": str(tmp_path / "cache"),
            "teacher": {"model": str(tiny_qwen2_vl)},
            "data": {"path": str(digit_samples)},
            "build": {"num_replicas": 3, "tensor_parallel_size": 2},
        },
        "students": [{"name": "small", "model": "m"}],
        "train": {"num_processes": 4},
    }
    build(str(tmp_path / "cache"), make_samples(3))
    rows = [("cache", 1800.0), ("train small", 900.0), ("evaluate small", 3600.0), ("report", 36.0)]
    (tmp_path / "timings.json").write_text(json.dumps([{"step": step, "seconds": seconds} for step, seconds in rows]))
    return validated(values, source="test")


def test_gpu_hours_and_bytes_stand_beside_the_planned_ones(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "gpus", lambda: [Gpu(name="H100", memory_mib=81559, driver="580")])
    account([config])
    record = json.loads((tmp_path / "accounting.json").read_text())
    assert [(step["devices"], step["gpu_hours"]) for step in record["steps"]] == [
        (6, 3.0),
        (4, 1.0),
        (1, 1.0),
        (1, 0.01),
    ]
    plan = make_plan(config)
    stored = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert record["cache"] == {
        "planned_gpu_hours": plan.speed.gpu_hours(plan.statistics.counts.tokens),
        "gpu_hours": 3.0,
        "planned_bytes": plan.storage.size.total_bytes,
        "bytes": stored,
    }


def test_what_cannot_be_planned_is_not_known(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "gpus", list)
    cache = config.cache.model_copy(update={"data": config.cache.data.model_copy(update={"path": "gone.parquet"})})
    account([config.model_copy(update={"cache": cache})])
    record = json.loads((tmp_path / "accounting.json").read_text())
    assert record["cache"]["planned_bytes"] is None
    assert {step["gpu_hours"] for step in record["steps"]} == {0.0}


def test_the_time_left_follows_the_steps_before() -> None:
    steps = [Step(name=name, action=bool) for name in ("train c", "train d", "report")]
    assert _left(steps, {"cache": 10.0}) == ""
    took = {"cache": 10.0, "train a": 60.0, "train b": 120.0}
    assert _left(steps, took) == " (at least 0:03:00 left at the pace of the steps before)"
    assert _left(steps[:2], took) == " (about 0:03:00 left at the pace of the steps before)"
