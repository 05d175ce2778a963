"""The main job on one device: a cache through Ray and vLLM, then a student through align, distill and finetune."""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from build_bench.throughput import GPU
from cache_bench.figures import Figure
from random_inputs import create_models, write_data

from distill.config import STAGES
from launch.demo.models import ModelSpec

WARM_UP = 4
"""Steps of each stage that no speed counts."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the job."""

    teacher: ModelSpec
    student: ModelSpec
    samples: int
    words: tuple[int, int]
    """Of a question and of an answer, on average."""
    samples_per_shard: int
    build: Mapping[str, Any]
    stage: Mapping[str, Any]
    dtype: str


_TINY = ModelSpec(family="qwen2-vl", tokenizer="byte-bpe", vocab_size=384)
QUICK = Settings(
    teacher=_TINY,
    student=replace(_TINY, family="internvl"),
    samples=8,
    words=(12, 6),
    samples_per_shard=4,
    build={"engine": "transformers"},
    stage={"max_steps": WARM_UP + 1, "global_batch_size": 4, "micro_batch_size": 4},
    dtype="float32",
)
# the student's text model has 0.4 thousand million parameters
FULL = Settings(
    teacher=GPU.teacher,
    student=replace(
        _TINY,
        family="internvl",
        vocab_size=32_768,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        vision_hidden=256,
        tile_size=64,
        initializer_range=0.02,
    ),
    samples=512,
    words=GPU.words,
    samples_per_shard=GPU.samples_per_shard,
    build={"max_batched_tokens": GPU.max_batched_tokens, "spot_check_every": 100},
    stage={"max_steps": 16, "global_batch_size": 32, "micro_batch_size": 16},
    dtype=GPU.dtype,
)


def measure(*, device: str, quick: bool, folder: Path) -> Iterator[Figure]:
    """Yield whether the job ends well, the speed of the build and that of each stage."""
    settings = QUICK if quick else FULL
    config = make_job(folder, settings)
    log = folder / "job.log"
    with log.open("w") as output:
        command = [Path(sys.executable).with_name("genrecal"), "run", config]
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        for path in (log, *sorted((folder / "run/logs").glob("*.log"))):
            print(f"{path.name}:", *path.read_text().splitlines()[-40:], sep="\n", file=sys.stderr)
        yield Figure(section="job check", name="exit code", value=done.returncode, unit="", bar=0, at_most=True)
        return
    yield from _build_figures(folder / "run", settings)
    for stage in STAGES:
        yield _stage_figure(stage, read_lines(folder / "run/training/student" / stage / "metrics.jsonl"))


def make_job(folder: Path, settings: Settings) -> Path:
    """Write data, random models and the run file; return its path."""
    folder.mkdir(parents=True)
    create_models(folder, {"teacher": settings.teacher, "student": settings.student})
    data = write_data(folder, num_samples=settings.samples, words=settings.words)
    document = {
        "output_dir": str(folder / "run"),
        "cache": {
            "uri": str(folder / "cache"),
            "teacher": {"model": str(folder / "teacher"), "dtype": settings.dtype},
            "data": {"path": str(data), "max_length": 2048},
            "samples_per_shard": settings.samples_per_shard,
            "build": dict(settings.build),
        },
        "students": [
            {"name": "student", "model": str(folder / "student"), "dtype": settings.dtype, "max_length": 2048}
        ],
        "train": {stage: dict(settings.stage) for stage in STAGES},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _build_figures(run: Path, settings: Settings) -> Iterator[Figure]:
    (summary,) = (line["summary"] for line in read_lines(run / "logs/cache-build.metrics.jsonl") if "summary" in line)
    yield Figure(
        section="job check",
        name="samples in the cache",
        value=summary["samples"] / settings.samples,
        unit="of all",
        bar=1,
        note=f"{summary['engine']} {summary['engine_version']}; spot check {json.dumps(summary['spot_check'])}",
    )
    yield Figure(
        section="job",
        name="build of the cache, start of the engine included",
        value=summary["tokens_per_s"],
        unit="tokens/s",
        note=f"{summary['tokens']} tokens in {summary['seconds']:.0f} s",
    )


def _stage_figure(stage: str, steps: list[dict[str, Any]]) -> Figure:
    steps = steps[WARM_UP:]
    always = {name for name in steps[0] if all(name in step for step in steps)}
    middle = {name: statistics.median(step[name] for step in steps) for name in always if "/" in name}
    note = f"{1e3 * middle['time/step_s']:.0f} ms, waiting {middle['data/wait_fraction']:.1%}"
    if "throughput/mfu" in middle:
        note += f"; {middle['throughput/mfu']:.0%} of the peak FLOP/s, {middle['memory/peak_allocated_gib']:.1f} GiB"
    return Figure(
        section="job",
        name=f"{stage}: a step",
        value=middle["throughput/tokens_per_s"],
        unit="student tokens/s",
        note=note,
    )
