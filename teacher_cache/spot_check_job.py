"""The first phase of a build: actors of plain transformers compute what the spot checks compare with."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from teacher_cache.actor_pool import ActorPool
from teacher_cache.build_job import BuildJob, StopRequest
from teacher_cache.build_placement import ReplicaPlacement
from teacher_cache.chat import Processor, encode_conversation, load_processor
from teacher_cache.config import CacheConfig
from teacher_cache.errors import SampleError, TeacherError
from teacher_cache.pool_work import PieceQueue
from teacher_cache.progress import PieceProgress, progress
from teacher_cache.sample_file import SampleEntry
from teacher_cache.samples_ahead import read_patiently
from teacher_cache.schema import Sample
from teacher_cache.spot_check import ReferenceRows
from teacher_cache.teacher import TransformersTeacher, compute_targets
from teacher_cache.teacher_checkpoint import checkpoint_directory
from teacher_cache.teacher_copy import TeacherCopy, require_same_copy

logger = logging.getLogger(__name__)

SAMPLES_PER_BATCH: Final = 16
"""With fewer samples, another actor would spend more time on loading the teacher than it saves."""


def compute_references(
    samples: Sequence[SampleEntry],
    *,
    placement: ReplicaPlacement,
    ray: ModuleType,
    stop: StopRequest,
    job: BuildJob,
) -> dict[str, ReferenceRows]:
    """Return the reference of each sample that plain transformers can compute, by sample id.

    The actors take the resources of the replicas, which start afterwards. Samples are read when an actor is free.

    Raises:
        DataError: The data changed while it was read.
        TeacherError: The reference does not start, or failed on some samples ``max_attempts`` times.
        CacheIncomplete: A signal came.
    """
    build, model = job.config.build, job.config.teacher.model
    batches = [samples[start : start + SAMPLES_PER_BATCH] for start in range(0, len(samples), SAMPLES_PER_BATCH)]
    work = _ReferenceWork(job, placement=placement, stop=stop)
    pool = ActorPool(work, PieceQueue(batches), build=build, placement=placement, ray=ray, log_dir=job.log_dir)
    try:
        with progress(total=len(samples), unit="sample", description="spot check reference") as bar:
            pool.run(bar)
        for name, error in pool.failures.items():
            raise TeacherError(
                f"{work.unit} {name} failed {build.max_attempts} times, the last time with: {error}"
            ) from error
    except TeacherError as error:
        raise TeacherError(
            f"the reference of the spot check, plain transformers, failed for the teacher {model}: {error}; set "
            "`cache.build.spot_check_every` to 0 to build without"
        ) from error
    return work.found


@dataclass(frozen=True, kw_only=True)
class _ReferenceBatch:
    """The references of a batch that could be computed."""

    references: tuple[ReferenceRows, ...]
    tokens: int


class _ReferenceWork:
    """Batches of samples, and the actors that compute their references."""

    unit = "part"

    def __init__(self, job: BuildJob, *, placement: ReplicaPlacement, stop: StopRequest) -> None:
        self._job = job
        self._placement = placement
        self._stop = stop
        self.found: dict[str, ReferenceRows] = {}

    def start_actor(self) -> Any:
        """Return a new actor; a share of a GPU is one to it."""
        num_gpus = math.ceil(self._placement.resources.gpus)
        return self._placement.start(_Actor, self._job.config, self._job.writer.teacher, num_gpus)

    def begin(self, actor: Any, piece: Sequence[SampleEntry]) -> Any:
        """Have an actor compute a batch."""
        return actor.compute.options(num_returns="streaming").remote([self._read(entry) for entry in piece])

    def num_samples(self, piece: Sequence[SampleEntry]) -> int:
        """Return the samples of a batch."""
        return len(piece)

    def name(self, piece: Sequence[SampleEntry]) -> str:
        """Return the first sample's id."""
        return f"of sample {piece[0].sample_id}"

    def finish(self, piece: Sequence[SampleEntry], result: _ReferenceBatch) -> None:
        """Keep the references."""
        self.found |= {reference.sample_id: reference for reference in result.references}

    def give_up(self, piece: Sequence[SampleEntry]) -> None:
        """Do nothing: nobody else computes the batches."""

    def figures(self) -> dict[str, int]:
        """Return nothing."""
        return {}

    def check_stop(self, *, num_missing: int) -> None:
        """Raise CacheIncomplete after a signal."""
        self._stop.check(self._job)

    def _read(self, entry: SampleEntry) -> Sample:
        self._stop.check(self._job)  # each sample may lie in a large row group of its own
        what = f"spot check of sample {entry.sample_id}"
        (sample,) = read_patiently(lambda: self._job.file.read([entry]), what=what)
        return sample


class _Actor:
    """Loads the teacher with transformers, onto the GPUs of a replica, or a CPU."""

    def __init__(self, config: CacheConfig, copy: TeacherCopy, num_gpus: int) -> None:
        self.config, self.copy, self.num_gpus = config, copy, num_gpus
        self.loaded: tuple[Processor, TransformersTeacher] | None = None

    def ready(self) -> None:
        """Return when Ray has placed the actor."""

    def compute(self, samples: list[Sample]) -> Iterator[PieceProgress | _ReferenceBatch]:
        """Compute one batch; leave out samples that cannot be computed."""
        self.loaded = self.loaded or self._load()
        processor, teacher = self.loaded
        config, found, tokens = self.config, [], 0
        for done, sample in enumerate(samples):
            yield PieceProgress(samples=done, tokens=tokens)
            try:
                conversation = encode_conversation(processor, sample, max_length=config.data.max_length)
                (targets,) = compute_targets(teacher, [conversation], topk=config.targets.topk, question_rows=[False])
            except (SampleError, ArithmeticError, LookupError, TypeError, ValueError) as error:
                logger.warning("no reference for sample %s: %s", sample.sample_id, error)
            else:
                found.append(ReferenceRows.of(targets))
                tokens += len(targets.token_ids)
        yield _ReferenceBatch(references=tuple(found), tokens=tokens)

    def _load(self) -> tuple[Processor, TransformersTeacher]:
        config = require_same_copy(self.config.teacher, expected=self.copy)
        processor = load_processor(str(checkpoint_directory(config)), trust_remote_code=config.trust_remote_code)
        return processor, TransformersTeacher(config, num_gpus=self.num_gpus)
