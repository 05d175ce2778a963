"""`genrecal demo`: the whole job on this machine's CPU, with real handwritten digits.

Everything that a user brings (data, a trained teacher, untouched students) is made here; from then on
the demo is two ordinary run files given to the ordinary pipeline: one that builds the cache and distils a
first student, and one that distils a second student of another family from the same cache.
"""

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from launch.arguments import ArgumentParser
from launch.demo.digits import generate_digit_vqa
from launch.demo.make_models import (
    STUDENTS,
    TEACHER,
    TEACHER_STEPS,
    copy_trained_teacher,
    is_trained_teacher,
    train_model,
)
from launch.logs import setup_logging
from launch.pipeline import run_pipeline, timed
from launch.processes import FATE_SHARED, end_with_parent
from launch.run_config import RunConfig, validated, write_run_config
from teacher_cache.errors import ConfigError

logger = logging.getLogger(__name__)

SEED = 1
GLOBAL_BATCH_SIZE = 32
VISION_STEPS = 400


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much the demo does."""

    num_train: int
    """Conversations in the cache."""
    num_test: int
    """Held-out questions, on other handwritten digits."""
    student_steps: int
    """Supervised steps that make the untouched students."""
    stage_steps: dict[str, int]
    """Optimizer steps of align, distill and finetune."""
    samples_per_shard: int


FULL = DemoSize(
    num_train=3072,
    num_test=420,
    student_steps=400,
    stage_steps={"align": 150, "distill": 200, "finetune": 100},
    samples_per_shard=256,
)
QUICK = DemoSize(
    num_train=192,
    num_test=70,
    student_steps=15,
    stage_steps={"align": 6, "distill": 6, "finetune": 4},
    samples_per_shard=32,
)


def demo_parser() -> ArgumentParser:
    """Return the parser of `demo`."""
    parser = ArgumentParser(
        "demo",
        description="Do the whole job on this machine's CPU with real handwritten digits, or go on with it.",
        exit_codes="0 done, 1 failed",
        example="--quick",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for everything the demo writes")
    parser.add_argument("--quick", action="store_true", help="a few minutes: too short to learn much")
    parser.add_argument("--train-teacher", action="store_true", help="train the teacher instead of copying it")
    return parser


def demo_command(argv: Sequence[str]) -> int:
    """Run or continue the demo."""
    options = demo_parser().parse(argv)
    run_demo(options.output, size=QUICK if options.quick else FULL, train_teacher=options.train_teacher)
    return 0


def run_demo(output_dir: Path, *, size: DemoSize, train_teacher: bool = False) -> None:
    """Make data and models, build the cache, distil two students from it, evaluate and report."""
    setup_logging(output_dir / "logs" / "demo.log")
    make_inputs(output_dir, size=size, train_teacher=train_teacher)
    first, second = (run_file(output_dir, student=student, size=size) for student in STUDENTS)
    for config in (first, second):
        write_run_config(config, output_dir / f"{config.students[0].name}.yaml", header=HEADER)
    run_pipeline(first, second)
    print(summary(output_dir, size=size))


def make_inputs(output_dir: Path, *, size: DemoSize, train_teacher: bool) -> None:
    """Make what a user brings, each part once."""
    data = output_dir / "data"
    if not (data / "test.parquet").exists():
        logger.info("composing %d conversations and %d held-out questions", size.num_train, size.num_test)
        generate_digit_vqa(data, num_train=size.num_train, num_test=size.num_test, seed=SEED, max_turns=2)
    teacher = output_dir / "teacher"
    if not train_teacher:
        copy_trained_teacher(teacher)
    elif is_trained_teacher(teacher):
        raise ConfigError(
            f"{output_dir} was made with the teacher that comes with the source, so its cache is of no other: "
            "train another teacher in another folder (--output) or remove this one (make clean)"
        )
    elif not teacher.exists():
        with timed(output_dir, step="train the teacher"):
            train_model(
                TEACHER, teacher, name="teacher", steps=TEACHER_STEPS, vision_steps=VISION_STEPS, data_seed=SEED
            )
    if not all((output_dir / "untouched" / student).exists() for student in STUDENTS):
        with timed(output_dir, step="untouched students"):
            _train_students(output_dir, size=size)


def _train_students(output_dir: Path, *, size: DemoSize) -> None:
    (output_dir / "untouched").mkdir(exist_ok=True)
    with ProcessPoolExecutor(
        len(STUDENTS),
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(output_dir, os.getpid()),
    ) as pool:
        trained = [
            pool.submit(
                train_model,
                spec,
                output_dir / "untouched" / student,
                name=f"untouched {student}",
                steps=size.student_steps,
                vision_steps=min(VISION_STEPS, size.student_steps),
                data_seed=SEED,
            )
            for student, spec in STUDENTS.items()
        ]
        for student in trained:
            student.result()


def _start_worker(output_dir: Path, parent: int) -> None:
    import torch

    os.environ[FATE_SHARED] = str(parent)
    end_with_parent()
    torch.set_num_threads(1)  # one process per student already fills a small machine
    setup_logging(output_dir / "logs" / f"untouched-{os.getpid()}.log")


def run_file(output_dir: Path, *, student: str, size: DemoSize) -> RunConfig:
    """Return the run file of one student and its baseline: the same stages without the teacher."""
    base = {"model": str(output_dir / "untouched" / student), "dtype": "float32", "max_length": 512}
    stage_options = {
        "global_batch_size": GLOBAL_BATCH_SIZE,
        "micro_batch_size": 16,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
    }
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "cache": {
            "uri": str(output_dir / "cache"),
            "teacher": {"model": str(output_dir / "teacher"), "dtype": "float32"},
            "data": {"path": str(output_dir / "data" / "train.parquet"), "max_length": 512},
            "samples_per_shard": size.samples_per_shard,
            "build": {"engine": "vllm", "num_replicas": 2, "max_batched_tokens": 2048, "kv_cache_gib": 0.125},
        },
        "students": [
            {"name": student, "method": "genrecal", **base},
            {"name": f"{student}-sft", "method": "sft", **base},
        ],
        "train": {
            **{stage: {"max_steps": steps, **stage_options} for stage, steps in size.stage_steps.items()},
            "num_processes": 2,
            "zero": {"persistence_threshold": 0},
            "seed": SEED,
            "save_interval_steps": 50,
            "log_interval_steps": 10,
            "shuffle_gap_interval_steps": 25,
        },
        "evaluation": {
            "data": str(output_dir / "data" / "test.parquet"),
            "scorer": "digits",
            "max_new_tokens": 64,
        },
    }
    return validated(values, source=f"the demo's run file for {student}")


def summary(output_dir: Path, *, size: DemoSize) -> str:
    """Return the table that ends the demo: accuracies, what the cache saved, where to look."""
    results = json.loads((output_dir / "results.json").read_text())
    seconds = {timing["step"]: timing["seconds"] for timing in json.loads((output_dir / "timings.json").read_text())}
    lines = [
        "",
        f"{'accuracy on held-out digits':<28}{'untouched':>10}{'SFT only':>10}{'distilled':>10}{'teacher':>10}",
    ]
    for name, figures in results["students"].items():
        columns = (
            figures["untouched_accuracy"],
            figures["sft_accuracy"],
            figures["accuracy"],
            results["teacher_accuracy"],
        )
        lines.append(f"{name:<28}" + "".join(f"{100 * accuracy:>9.1f}%" for accuracy in columns))
    _, second = STUDENTS
    live = len(STUDENTS) * GLOBAL_BATCH_SIZE * (size.stage_steps["align"] + size.stage_steps["distill"])
    lines += [
        "",
        f"The teacher ran once over {size.num_train} conversations, in {seconds['cache']:.0f} s with start-up; "
        f"{second} learned from the same cache without it.",
        f"Live in align and distill of both students it would have run over {live}.",
        f"report:   {output_dir / 'report.html'}",
        f"students: {output_dir / 'students'}",
        f"log:      {output_dir / 'logs' / 'demo.log'}",
    ]
    return "\n".join(lines)


HEADER = "Written by `genrecal demo`. Run it again with `genrecal run`: what is complete is skipped."
