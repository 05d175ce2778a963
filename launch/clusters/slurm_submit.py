"""Submit the jobs of a run to Slurm, each depending on those before it; ask Slurm how they stand."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.clusters.jobs import Job, Kind, run_jobs
from launch.clusters.journal import Submission, append, latest
from launch.clusters.programs import run_program
from launch.clusters.slurm import Places, Script, cache_script, report_script, train_script
from launch.clusters.states import slurm_states
from launch.clusters.submission import Outcome, frozen_run_file, now, submit_folder
from launch.run_config import RunConfig
from teacher_cache.errors import ConfigError, GenrecalError

ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One script and the jobs in it."""

    file: str
    script: Script
    jobs: tuple[Job, ...]


def plan_slurm(config: RunConfig, jobs: Sequence[Job]) -> list[Batch]:
    """Return the scripts of the jobs that are not complete, in the order of their dependencies."""
    folder = submit_folder(config) / "slurm"
    places = Places(
        run_file=frozen_run_file(config),
        state_dir=folder / "jobs",
        working_dir=Path.cwd(),
        bin_dir=Path(sys.executable).parent,
    )
    left = [job for job in jobs if not job.complete]
    students = [job for job in left if job.kind == "train"]
    batches = [
        Batch(file="cache.sbatch", script=cache_script(config, job, places=places), jobs=(job,))
        for job in left
        if job.kind == "cache"
    ]
    if students:
        script = train_script(config, students, places=places)
        batches.append(Batch(file="train.sbatch", script=script, jobs=tuple(students)))
    batches += [
        Batch(file="report.sbatch", script=report_script(config, job, places=places), jobs=(job,))
        for job in left
        if job.kind == "report"
    ]
    for batch in batches:
        _check_syntax(batch)
    return batches


def sbatch_command(path: Path, *, after: Sequence[str]) -> list[str]:
    """Return the command that submits a script once the jobs ``after`` have succeeded."""
    dependency = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *dependency, str(path)]


def describe_slurm(config: RunConfig) -> str:
    """Return everything that would be written and called."""
    jobs = run_jobs(config)
    folder = submit_folder(config) / "slurm"
    parts = [f"# complete already: {job.label}\n" for job in jobs if job.complete]
    after: list[str] = []
    commands = []
    for batch in plan_slurm(config, jobs):
        parts.append(f"# ==> {folder / batch.file}\n{batch.script.text}")
        commands.append(shlex.join(sbatch_command(folder / batch.file, after=after)))
        after = [f"<{batch.file.removesuffix('.sbatch')}>"]
    parts.append("".join(f"# {command}\n" for command in commands))
    return "\n".join(parts)


def submit_slurm(config: RunConfig) -> list[Outcome]:
    """Write the scripts and submit what is neither complete nor under way."""
    jobs = run_jobs(config)
    left = [job for job in jobs if not job.complete]
    folder = submit_folder(config) / "slurm"
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    under_way = _under_way(submit_folder(config), left)
    fresh = [job for job in left if job.key not in under_way]
    if any(job.kind == "train" for job in fresh):
        # a report that waits already does not wait for these
        fresh = [job for job in left if job.key not in under_way or job.kind == "report"]
    outcomes = {job.key: Outcome(job=job, job_id=None, state="complete already") for job in jobs if job.complete}
    outcomes |= {
        job.key: Outcome(job=job, job_id=under_way[job.key], state="under way already")
        for job in left
        if job not in fresh
    }
    job_ids: dict[Kind, list[str]] = {"cache": [], "train": [], "report": []}
    for job in left:
        if job.key in under_way:
            job_ids[job.kind].append(under_way[job.key])
    for batch in plan_slurm(config, fresh):
        kind = batch.jobs[0].kind
        path = folder / batch.file
        path.write_text(batch.script.text, encoding="utf-8")
        after = job_ids["cache"] if kind == "train" else job_ids["train"] if kind == "report" else []
        answer = run_program(sbatch_command(path, after=after)).strip()
        number = answer.partition(";")[0]
        if not number.isdigit():
            raise GenrecalError(f"sbatch answered {answer!r} to {path}: expected the number of a job")
        job_ids[kind].append(number)
        outcomes |= {job.key: _submitted(config, batch, job, index, number) for index, job in enumerate(batch.jobs)}
    return [outcomes[job.key] for job in jobs]


def _under_way(folder: Path, jobs: Sequence[Job]) -> dict[str, str]:
    """Return the Slurm job or array task in which a job waits or runs, by its key, for those that do."""
    entries = {job.key: latest(folder, scheduler="slurm", key=job.key) for job in jobs}
    known = {key: entry.job_id for key, entry in entries.items() if entry is not None}
    states = slurm_states([entry for entry in entries.values() if entry is not None]) if known else {}
    return {key: job_id for key, job_id in known.items() if states.get(job_id) in ACTIVE}


def _submitted(config: RunConfig, batch: Batch, job: Job, index: int, number: str) -> Outcome:
    job_id = number if job.kind != "train" else f"{number}_{index}"
    submission = Submission(
        scheduler="slurm",
        label=job.label,
        key=job.key,
        job_id=job_id,
        run_file=str(frozen_run_file(config)),
        submitted=now(),
        where={"script": str(submit_folder(config) / "slurm" / batch.file)},
    )
    append(submit_folder(config), submission)
    return Outcome(job=job, job_id=job_id, state="submitted")


def _check_syntax(batch: Batch) -> None:
    done = subprocess.run(["bash", "-n"], input=batch.script.text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(
            f"{batch.file} is no valid shell script: {done.stderr.strip()}; see `cluster.slurm.setup` in the run file"
        )
