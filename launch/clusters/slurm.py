"""Render the jobs of a run as Slurm batch scripts. Pure functions: nothing is submitted here."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.clusters import slurm_scripts
from launch.clusters.config import SlurmJobConfig
from launch.clusters.jobs import Job, cache_shape, train_shape
from launch.run_config import RunConfig
from teacher_cache.errors import ConfigError

EXPORTED = ("HOME", "PATH", "USER")


@dataclass(frozen=True, kw_only=True)
class Script:
    """One batch script."""

    job_name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Places:
    """Absolute paths that the scripts name."""

    run_file: Path
    state_dir: Path
    """Refusals, tokens and output of the jobs."""
    working_dir: Path
    bin_dir: Path
    """Programs of the environment from which jobs are submitted."""


def cache_script(config: RunConfig, job: Job, *, places: Places) -> Script:
    """Return the cache job: a Ray cluster over its nodes, and the build in it."""
    slurm = config.cluster.slurm
    needed = cache_shape(config, slurm.cache)
    shape = {"nodes": str(needed.nodes), **_one_task(slurm.cache, gpus=needed.gpus_per_node)}
    answers = "" if config.answers is None else slurm_scripts.CACHE_ANSWERS
    body = slurm_scripts.CACHE + answers + slurm_scripts.CACHE_BUILD
    return _script(config, job.name, resources=slurm.cache, shape=shape, places=places, body=body)


def train_script(config: RunConfig, jobs: Sequence[Job], *, places: Places) -> Script:
    """Return the job array that trains every student.

    Raises:
        ConfigError: The training processes do not spread evenly over the nodes.
    """
    slurm = config.cluster.slurm
    shape = train_shape(config, slurm.train, where="cluster.slurm.train")
    options = {
        "nodes": str(shape.nodes),
        "ntasks-per-node": str(shape.processes_per_node),
        "cpus-per-task": str(slurm.train.cpus_per_process),
        **_gpus(shape.gpus_per_node),
        "array": f"0-{len(jobs) - 1}",
    }
    students = " ".join(shlex.quote(job.student or "") for job in jobs)
    name = jobs[0].name if len(jobs) == 1 else f"genrecal-train-{jobs[0].key}"
    body = f"STUDENTS=({students})\n{slurm_scripts.TRAIN}"
    return _script(config, name, resources=slurm.train, shape=options, places=places, body=body)


def report_script(config: RunConfig, job: Job, *, places: Places) -> Script:
    """Return the job that scores every model and writes the report."""
    resources = config.cluster.slurm.report
    shape = {"nodes": "1", **_one_task(resources, gpus=resources.gpus_per_node)}
    return _script(config, job.name, resources=resources, shape=shape, places=places, body=slurm_scripts.REPORT)


def _one_task(resources: SlurmJobConfig, *, gpus: int) -> dict[str, str]:
    return {"ntasks-per-node": "1", "cpus-per-task": str(resources.cpus_per_process * max(1, gpus)), **_gpus(gpus)}


def _gpus(number: int) -> dict[str, str]:
    return {"gpus-per-node": str(number)} if number else {}


def directive(name: str, value: str) -> str:
    """Return one #SBATCH line; sbatch takes quotes and backslashes in it as a shell does.

    Raises:
        ConfigError: The value is not one line of printable characters.
    """
    if not value.isprintable():
        raise ConfigError(f"sbatch option {name} is {value!r}: expected one line of printable characters")
    if not value:
        return f"#SBATCH --{name}"
    if not all(character.isalnum() or character in "-_.,:=@%+/" for character in value):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={value}"


def filename_pattern(folder: Path) -> str:
    """Return where a job writes its output, with the characters of the folder that Slurm would replace made literal.

    Raises:
        ConfigError: Slurm has no way to write the folder.
    """
    if "\\" in str(folder) or not str(folder).isprintable():
        raise ConfigError(f"output_dir leads to {str(folder)!r}: Slurm takes no backslash or control character there")
    return f"{str(folder).replace('%', '%%')}/%x-%j.log"


def assignment(name: str, value: str) -> str:
    """Return a shell assignment that takes any value literally.

    Raises:
        ConfigError: The value holds a zero byte, which no shell variable can.
    """
    if "\0" in value:
        raise ConfigError(f"{name} is {value!r}: a zero byte cannot be passed on")
    return f"{name}={shlex.quote(value)}"


def _script(
    config: RunConfig, name: str, *, resources: SlurmJobConfig, shape: Mapping[str, str], places: Places, body: str
) -> Script:
    slurm = config.cluster.slurm
    lines = [
        "#!/bin/bash",
        *(directive(option, value) for option, value in _options(config, name, resources, shape, places).items()),
        f"# Written by `genrecal submit slurm`: {name}. May be edited and submitted with sbatch.",
        assignment("RUN_FILE", str(places.run_file)),
        assignment("STATE_DIR", str(places.state_dir)),
        f"MAX_REQUEUES={slurm.max_requeues}",
        f'{assignment("PATH", str(places.bin_dir))}:"$PATH"',
        *slurm.setup,
        "",
    ]
    return Script(job_name=name, text="\n".join(lines) + slurm_scripts.PRELUDE + "\n" + body)


def _options(
    config: RunConfig, name: str, resources: SlurmJobConfig, shape: Mapping[str, str], places: Places
) -> dict[str, str]:
    slurm = config.cluster.slurm
    chosen = {
        option: value
        for option in ("partition", "account", "qos", "time")
        if (value := getattr(resources, option)) is not None
    }
    return {
        "job-name": name,
        **shape,
        **chosen,
        "chdir": str(places.working_dir),
        "output": filename_pattern(places.state_dir),
        "open-mode": "append",
        "export": ",".join((*EXPORTED, *slurm.environment)),
        "requeue": "",
        "signal": f"B:USR1@{slurm.signal_before_end_s}",
        **resources.sbatch,
    }
