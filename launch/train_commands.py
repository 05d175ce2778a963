"""`genrecal train`, `eval`, `export` and `reshard`."""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config import STAGES, Stage, StudentConfig
from launch.arguments import ArgumentParser, run_parser
from launch.logs import setup_logging
from launch.processes import end_with_parent, process_rank, run_trainers, under_launcher
from launch.provenance import recorded
from launch.results import Evaluated, collect_results, evaluated_models
from launch.run_config import EvaluationConfig, RunConfig, parse_run
from launch.run_students import RunStudent
from launch.suites.command import add_suite_arguments, evaluate_suites, require_suite
from teacher_cache.config import DataConfig
from teacher_cache.errors import ConfigError, DataError

if TYPE_CHECKING:
    from distill.scoring import Scorer

logger = logging.getLogger(__name__)

DONE = "DONE.json"
"""In the folder of a stage that is done."""


def train_parser() -> ArgumentParser:
    """Return the parser of `train`; what it does not know overrides fields of the run file."""
    parser = run_parser(
        "train",
        description="Train one student from the cache, or go on with it; also under torchrun, deepspeed and srun.",
        exit_codes="0 done, 1 failed, 3 it stood still (run it again), 4 the cache or a checkpoint is of another run",
    )
    parser.add_argument("--student", metavar="NAME", help="which student, where the run file has several")
    parser.add_argument("--stage", choices=STAGES, help="only this stage; by default all of them")
    return parser


def train_command(argv: Sequence[str]) -> int:
    """Train one student; start the configured number of processes unless a launcher did."""
    options, config = parse_run(train_parser(), argv)
    student = config.student(options.student)
    output_dir = Path(config.output_dir)
    end_with_parent()
    if config.train.num_processes > 1 and not under_launcher():
        command = [sys.executable, "-m", "launch.cli", "train", *argv]
        log_dir = output_dir / "logs" / f"train-{student.name}-ranks"
        return run_trainers(command, num_processes=config.train.num_processes, log_dir=log_dir)
    rank = process_rank()
    log_name = f"train-{student.name}" + (f"-rank{rank}" if rank else "")
    setup_logging(output_dir / "logs" / f"{log_name}.log", console=rank == 0)
    from distill.trainer import train_student

    stages = None if options.stage is None else (options.stage,)
    finished = _finished(config, student)
    outputs = partial(_trained, config, student, finished_before=finished)
    expected = _stages_left(config, student, stage=options.stage, finished=finished) if rank == 0 else []
    with recorded(outputs, config=config, expected=expected) as run:
        run.counts = rank == 0
        train_student(
            cache=config.cache,
            student=student.alone(),
            train=student.settings(config.train),
            output_dir=output_dir,
            stages=stages,
        )
    return 0


def _finished(config: RunConfig, student: StudentConfig) -> set[Path]:
    """Return the folders of the stages that are done."""
    return {done.parent for done in (Path(config.output_dir) / "training" / student.name).glob(f"*/{DONE}")}


def _stages_left(config: RunConfig, student: RunStudent, *, stage: Stage | None, finished: set[Path]) -> list[Path]:
    """Return the folders of the stages that a training will work on."""
    folder = Path(config.output_dir) / "training" / student.name
    own = [one for one in student.settings(config.train).stages if one != "align" or student.method == "genrecal"]
    return [folder / one for one in own if stage in (None, one) and folder / one not in finished]


def _trained(config: RunConfig, student: StudentConfig, *, finished_before: set[Path]) -> list[Path]:
    """Return what a training worked on: the folders of stages that were not done before it, and the student."""
    folder = Path(config.output_dir) / "training" / student.name
    stages = [folder / stage for stage in STAGES if (folder / stage).is_dir() and folder / stage not in finished_before]
    exported = Path(config.output_dir) / "students" / student.name
    return [*stages, exported] if stages and exported.is_dir() else stages


def eval_parser() -> ArgumentParser:
    """Return the parser of `eval`; what it does not know overrides fields of the run file."""
    parser = ArgumentParser(
        "eval",
        description="Score the teacher and every student, untouched and trained, on held-out data; print results.json. "
        "With --suite, put students through published benchmarks instead, by lmms-eval. What is scored already is "
        "left alone.",
        exit_codes="0 done, 1 failed, 2 wrong usage or run file, 3 a suite came to no result (run it again)",
        example="run.yaml",
    )
    parser.add_config(optional=True)
    add_suite_arguments(parser)
    return parser


def eval_command(argv: Sequence[str]) -> int:
    """Score the teacher, every untouched student and every trained one; write results.json, or run suites."""
    parser = eval_parser()
    if parser.parse_known_args(argv)[0].config is None:
        options = parser.parse(argv)
        if options.suite is None:
            parser.error("a run file is needed, or --suite and --student")
        return evaluate_suites(options, None)
    options, config = parse_run(parser, argv)
    if options.suite is not None:
        return evaluate_suites(options, config)
    require_suite(parser, options)
    setup_logging(Path(config.output_dir) / "logs" / "eval.log")
    evaluate_run(config)
    print(json.dumps(collect_results(config), indent=2))
    return 0


def evaluate_run(config: RunConfig) -> bool:
    """Score all models of a run that exist and are not scored yet, write results.json; return whether any was scored.

    Raises:
        ConfigError: The run file has no `evaluation`.
    """
    if config.evaluation is None:
        raise ConfigError("the run file has no `evaluation`: add at least `evaluation: {data: held-out.parquet}`")
    output_dir = Path(config.output_dir)
    with recorded(lambda: [output_dir / "evaluation"], config=config) as run:
        scored = []
        for model in evaluated_models(config):
            if model.trained and not Path(model.model).exists():
                logger.info("student %s is not trained yet: not scored", model.name)
                continue
            scored.append(_evaluate(model, config=config, evaluation=config.evaluation))
        run.counts = any(scored)
    collect_results(config)
    return run.counts


def export_parser() -> ArgumentParser:
    """Return the parser of `export`."""
    parser = ArgumentParser(
        "export",
        description="Write the student of a finished stage, or of a checkpoint in the middle of one, as a Hugging Face "
        "directory of its own.",
        exit_codes="0 done, 1 there is no student, or the directory is taken, 4 the checkpoint is damaged",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="CHECKPOINT",
        help="RUN/training/STUDENT/STAGE, or RUN/training/STUDENT/STAGE/checkpoints/STEP",
    )
    parser.add_argument("target", type=Path, metavar="OUT", help="directory to make")
    return parser


def export_command(argv: Sequence[str]) -> int:
    """Write the student of a finished stage, or of a checkpoint in the middle of one, to a directory of its own."""
    options = export_parser().parse(argv)
    source, target = options.source, options.target
    if target.exists():
        raise DataError(f"{target} exists already: choose another directory")
    finished = source / "export" if (source / "export").is_dir() else source
    if (finished / "config.json").is_file():
        shutil.copytree(finished, target)
    elif (source / "COMMIT.json").exists() or (source / "checkpoints").is_dir():
        from distill.export_checkpoint import export_checkpoint

        source = export_checkpoint(source, target)
    else:
        raise DataError(f"no student in {source}: expected a stage's folder or one of its checkpoints")
    print(f"wrote {target} from {source}")
    return 0


def reshard_parser() -> ArgumentParser:
    """Return the parser of `reshard`."""
    parser = ArgumentParser(
        "reshard",
        description="Make the newest checkpoint of a stage readable by any number of processes.",
        exit_codes="0 done, 1 there is no checkpoint, 4 it is damaged",
        example="runs/mine/training/small/distill",
    )
    parser.add_argument("stage", type=Path, metavar="STAGE", help="RUN/training/STUDENT/STAGE")
    return parser


def reshard_command(argv: Sequence[str]) -> int:
    """Make a stage's newest checkpoint readable by any number of processes."""
    options = reshard_parser().parse(argv)
    from distill.reshard import reshard

    print(f"readable by any number of processes: {reshard(options.stage)}")
    return 0


def _evaluate(model: Evaluated, *, config: RunConfig, evaluation: EvaluationConfig) -> bool:
    from distill.student import resolve_model

    path = resolve_model(model.model, revision=model.revision)
    folder = Path(config.output_dir) / "evaluation"
    result_path = folder / f"{model.name}.json"
    key_path = result_path.with_suffix(".key")
    key = _evaluation_key(path, evaluation=evaluation)
    if result_path.exists() and key_path.exists() and key_path.read_text() == key:
        return False
    logger.info("scoring %s (%s)", model.name, path)
    from distill.evaluate import EvaluationSettings, evaluate_model
    from distill.scoring import read_result

    teacher = folder / "teacher.json"
    settings = EvaluationSettings(
        batch_size=evaluation.batch_size,
        dtype=evaluation.dtype,
        max_new_tokens=evaluation.max_new_tokens,
        trust_remote_code=model.trust_remote_code,
    )
    evaluate_model(
        path,
        name=model.name,
        data=DataConfig(
            path=evaluation.data, max_samples=evaluation.max_samples, max_length=config.cache.data.max_length
        ),
        output_path=result_path,
        scorer=_scorer(evaluation.scorer),
        teacher_answers=read_result(teacher).answers if model.name != "teacher" and evaluation.score_teacher else None,
        settings=settings,
    )
    key_path.write_text(key)
    return True


def _scorer(name: str) -> "Scorer":
    if name == "digits":
        from launch.demo.digits import score

        return lambda row, answer: score(row.columns["family"], row.columns["facts"], answer)
    from distill.scoring import exact_match

    return exact_match


def _evaluation_key(path: Path, *, evaluation: EvaluationConfig) -> str:
    digest = hashlib.sha256(evaluation.model_dump_json().encode())
    for file in (*sorted(path.glob("*.safetensors")), *sorted(path.glob("*.json")), Path(evaluation.data)):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
