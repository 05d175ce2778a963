"""The jobs of a run, whatever runs them: the cache, one training per student, evaluation and report at the end."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from distill.config import StudentConfig
from launch.clusters.config import NodeResources
from launch.clusters.marks import cache_complete, cache_content, report_complete, student_complete
from launch.run_config import RunConfig
from teacher_cache.errors import ConfigError
from teacher_cache.manifest import fingerprint

Kind = Literal["cache", "train", "report"]
KEY_DIGITS = 10


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of a run."""

    kind: Kind
    student: str | None
    key: str
    """Digest of everything that decides what the job makes: the same job has the same key wherever it runs."""
    complete: bool
    """Its marks are there: it need not be submitted."""

    @property
    def label(self) -> str:
        """What the job is called on the console."""
        return self.kind if self.student is None else f"{self.kind} {self.student}"

    @property
    def name(self) -> str:
        """Name of the job for a scheduler: lower case letters, digits and dashes, at most 63."""
        student = "" if self.student is None else "".join(c if c.isalnum() else "-" for c in self.student.lower())
        middle = f"-{student[:30].strip('-')}" if student else ""
        return f"genrecal-{self.kind}{middle}-{self.key}"


def run_jobs(config: RunConfig) -> list[Job]:
    """Return the jobs of a run in the order in which they depend on each other.

    A student counts as complete only beside a complete cache, and a report beside complete students.
    """
    cache_spec = {"cache": cache_content(config), "answers": config.answers and config.answers.model_dump(mode="json")}
    cache = _job("cache", spec=cache_spec, complete=partial(cache_complete, config))
    students = [_student_job(config, student, cache=cache, spec=cache_spec) for student in config.students]
    jobs = [cache, *students]
    if config.evaluation is not None:
        keys = [job.key for job in students]
        spec = {"students": keys, "evaluation": config.evaluation.model_dump(mode="json")}
        done = all(job.complete for job in jobs)
        jobs.append(_job("report", spec=spec, complete=lambda: done and report_complete(config)))
    return jobs


def _student_job(config: RunConfig, student: StudentConfig, *, cache: Job, spec: dict[str, Any]) -> Job:
    train = config.train.model_dump(mode="json")
    return _job(
        "train",
        student=student.name,
        spec={**spec, "student": student.model_dump(mode="json"), "train": train, "output_dir": config.output_dir},
        complete=lambda: cache.complete and student_complete(config, student.name),
    )


def _job(kind: Kind, *, spec: dict[str, Any], complete: Callable[[], bool], student: str | None = None) -> Job:
    key = fingerprint({"kind": kind, **spec})[:KEY_DIGITS]
    return Job(kind=kind, student=student, key=key, complete=complete())


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What the replicas of the teacher need of nodes."""

    nodes: int
    gpus_per_node: int
    """GPUs that are asked for, those that replicas use."""


def cache_shape(config: RunConfig, resources: NodeResources) -> CacheShape:
    """Return how the replicas of the teacher spread over nodes; by default over as few as hold them.

    Raises:
        ConfigError: A node has fewer GPUs than a replica, which lies on one node.
    """
    build = config.cache.build
    gpus = build.gpus_per_replica
    if gpus is None:
        gpus = build.tensor_parallel_size * build.pipeline_parallel_size
    if not resources.gpus_per_node or not gpus:
        return CacheShape(nodes=resources.nodes or 1, gpus_per_node=0)
    if gpus > resources.gpus_per_node:
        raise ConfigError(
            f"a replica of the teacher takes {gpus:g} GPUs "
            "(cache.build.tensor_parallel_size x pipeline_parallel_size), "
            f"a node has {resources.gpus_per_node}: lower these, or take nodes with more GPUs"
        )
    most = int(resources.gpus_per_node // gpus)
    nodes = resources.nodes or math.ceil(build.num_replicas / most)
    each = min(most, math.ceil(build.num_replicas / nodes))
    return CacheShape(nodes=nodes, gpus_per_node=math.ceil(each * gpus))


@dataclass(frozen=True, kw_only=True)
class TrainShape:
    """How the training processes lie on nodes."""

    nodes: int
    processes_per_node: int
    gpus_per_node: int
    """GPUs that are asked for: one per process, or none."""


def train_shape(config: RunConfig, resources: NodeResources, *, where: str) -> TrainShape:
    """Return how the processes of one training spread over nodes: evenly, one per GPU where there are GPUs.

    Raises:
        ConfigError: They do not spread evenly, or a node has fewer GPUs than processes.
    """
    processes, gpus = config.train.num_processes, resources.gpus_per_node
    nodes = resources.nodes or max(1, math.ceil(processes / gpus) if gpus else 1)
    per_node, left = divmod(processes, nodes)
    if left or per_node == 0 or (gpus and per_node > gpus):
        raise ConfigError(
            f"train.num_processes is {processes}, which {where} cannot spread over {nodes} node(s) of {gpus} GPU(s): "
            f"expected the same number on each and at most one per GPU; change {where}.nodes or train.num_processes"
        )
    return TrainShape(nodes=nodes, processes_per_node=per_node, gpus_per_node=per_node if gpus else 0)
