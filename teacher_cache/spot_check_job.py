"""The first phase of a build: actors of plain transformers compute what the spot checks compare with."""

import logging
import math
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final

from teacher_cache.build_job import BuildJob, StopRequest
from teacher_cache.build_placement import ReplicaPlacement
from teacher_cache.chat import encode_conversation, load_processor
from teacher_cache.config import CacheConfig
from teacher_cache.errors import SampleError, TeacherError
from teacher_cache.progress import progress
from teacher_cache.schema import Sample
from teacher_cache.spot_check import ReferenceRows
from teacher_cache.teacher import TransformersTeacher, compute_targets
from teacher_cache.teacher_checkpoint import checkpoint_directory

logger = logging.getLogger(__name__)

SAMPLES_PER_ACTOR: Final = 16
"""With fewer samples, another actor would spend more time on loading the teacher than it saves."""
_POLL_S = 0.5


def compute_references(
    samples: Sequence[Sample],
    *,
    config: CacheConfig,
    placement: ReplicaPlacement,
    ray: ModuleType,
    stop: StopRequest,
    job: BuildJob,
) -> dict[str, ReferenceRows]:
    """Return the reference of each sample that plain transformers can compute, by sample id.

    The actors take the resources of the replicas, which start afterwards.

    Raises:
        TeacherError: The reference does not start or gives no sign for ``start_timeout_s``.
        CacheIncomplete: A signal came.
    """
    if not samples:
        return {}
    actors = min(config.build.num_replicas, -(-len(samples) // SAMPLES_PER_ACTOR))
    gpus = math.ceil(placement.resources.gpus)  # a share of a GPU is one to the actor
    started = [placement.start(_ReferenceActor, config, gpus) for _ in range(actors)]
    waiting = {
        actor.compute.options(num_returns="streaming").remote(list(samples[number::actors])): actor
        for number, actor in enumerate(started)
    }
    found: dict[str, ReferenceRows] = {}
    last_sign = time.monotonic()
    try:
        with progress(total=len(samples), unit="sample", description="spot check reference") as bar:
            while waiting:
                stop.check(job)
                ready, _ = ray.wait(list(waiting), timeout=_POLL_S, fetch_local=False)
                for stream in ready:
                    reference = _next_reference(ray, stream, config=config)
                    if reference is _END:
                        del waiting[stream]
                    else:
                        bar.update(1)
                        if reference is not None:
                            found[reference.sample_id] = reference
                    last_sign = time.monotonic()
                if time.monotonic() - last_sign > config.build.start_timeout_s:
                    raise TeacherError(
                        f"the reference of the spot check gave no sign for {config.build.start_timeout_s:g} s; see the "
                        "logs of Ray, raise `build.start_timeout_s`, or set `build.spot_check_every` to 0"
                    )
    finally:
        for actor in started:
            placement.stop(actor)
    return found


_END: Final[Any] = object()


def _next_reference(ray: ModuleType, stream: Any, *, config: CacheConfig) -> Any:
    try:
        return ray.get(next(stream))
    except StopIteration:
        return _END
    except ray.exceptions.RayError as error:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        raise TeacherError(
            f"the reference of the spot check, plain transformers, failed for the teacher {config.teacher.model}: "
            f"{cause}; set `build.spot_check_every` to 0 to build without"
        ) from error


class _ReferenceActor:
    """Loads the teacher with transformers, onto the GPUs of a replica, or a CPU."""

    def __init__(self, config: CacheConfig, num_gpus: int) -> None:
        self.config, self.num_gpus = config, num_gpus

    def compute(self, samples: list[Sample]) -> Any:
        """Yield the reference of each sample, None for one that cannot be computed."""
        config = self.config
        processor = load_processor(
            str(checkpoint_directory(config.teacher)), trust_remote_code=config.teacher.trust_remote_code
        )
        teacher = TransformersTeacher(config.teacher, num_gpus=self.num_gpus)
        for sample in samples:
            try:
                conversation = encode_conversation(processor, sample, max_length=config.data.max_length)
                (targets,) = compute_targets(teacher, [conversation], topk=config.targets.topk, question_rows=[False])
            except (SampleError, ArithmeticError, LookupError, TypeError, ValueError) as error:
                logger.warning("no reference for sample %s: %s", sample.sample_id, error)
                yield None
            else:
                yield ReferenceRows.of(targets)
