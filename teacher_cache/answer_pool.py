"""The pool of actors that write answers: each holds one engine and works on one part of the data at a time."""

import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from teacher_cache.actor_pool import ActorPool
from teacher_cache.answer_job import AnswerJob
from teacher_cache.answer_writing import AnswerWriter, WrittenPart
from teacher_cache.answers_config import AnswersConfig
from teacher_cache.build_job import StopRequest
from teacher_cache.build_placement import ReplicaPlacement
from teacher_cache.chat import load_processor
from teacher_cache.config import CacheConfig
from teacher_cache.errors import DataIncomplete
from teacher_cache.pool_work import PieceQueue
from teacher_cache.progress import PieceProgress, progress
from teacher_cache.samples_ahead import read_patiently
from teacher_cache.schema import Sample
from teacher_cache.teacher_checkpoint import checkpoint_directory
from teacher_cache.teacher_copy import TeacherCopy, require_same_copy

SIGN_OF_LIFE_S: Final = 1.0


class AnswerWork:
    """Parts of the data by number, and the actors that write their answers."""

    unit = "part"

    def __init__(
        self,
        job: AnswerJob,
        *,
        cache: CacheConfig,
        answers: AnswersConfig,
        placement: ReplicaPlacement,
        stop: StopRequest,
        log_dir: Path,
    ) -> None:
        self._job = job
        self._cache = cache
        self._answers = answers
        self._placement = placement
        self._stop = stop
        self._log_dir = log_dir

    def start_actor(self) -> Any:
        """Return a new actor."""
        return self._placement.start(_Actor, self._cache, self._answers, self._job.teacher, self._log_dir)

    def begin(self, actor: Any, piece: int) -> Any:
        """Have an actor write a part."""
        samples = read_patiently(lambda: self._job.read(piece), what=f"part {piece}")
        return actor.write.options(num_returns="streaming").remote(samples)

    def num_samples(self, piece: int) -> int:
        """Return the samples of a part."""
        return len(self._job.parts[piece])

    def name(self, piece: int) -> str:
        """Return a part's number."""
        return str(piece)

    def finish(self, piece: int, result: WrittenPart) -> None:
        """Commit a part."""
        self._job.commit(piece, result.samples)

    def give_up(self, piece: int) -> None:
        """Do nothing: nobody else writes the parts."""

    def figures(self) -> dict[str, int]:
        """Return nothing."""
        return {}

    def check_stop(self, *, num_missing: int) -> None:
        """Raise DataIncomplete after a signal."""
        if self._stop.signal is not None:
            raise DataIncomplete(
                f"stopped by {signal.Signals(self._stop.signal).name} with {num_missing} part(s) of "
                f"{self._cache.data.path} missing; run the command again to write them"
            )


def write_parts(
    job: AnswerJob,
    missing: Sequence[int],
    *,
    cache: CacheConfig,
    answers: AnswersConfig,
    stop: StopRequest,
    ray: ModuleType,
    placement: ReplicaPlacement,
    log_dir: Path,
) -> int:
    """Write the missing parts in ``num_replicas`` actors; return the number of generated tokens.

    Raises:
        DataIncomplete: Some failed too often, or a signal came.
        TeacherError: None could be written.
    """
    work = AnswerWork(job, cache=cache, answers=answers, placement=placement, stop=stop, log_dir=log_dir)
    queue = PieceQueue(missing)
    pool = ActorPool(work, queue, build=cache.build, placement=placement, ray=ray, log_dir=log_dir)
    samples = sum(len(job.parts[part]) for part in missing)
    with progress(total=samples, unit="sample", description="cache answers") as bar:
        pool.run(bar)
    if pool.failures:
        lines = "\n".join(f"  part {part}: {error}" for part, error in pool.failures.items())
        raise DataIncomplete(
            f"{len(pool.failures)} part(s) of {cache.data.path} failed {cache.build.max_attempts} times:\n{lines}\nAll "
            f"others are kept; run the command again. Engine logs are in {log_dir}"
        )
    return pool.tokens


class _Actor:
    """Starts its engine with its first part, so that an engine that does not start counts as a failed attempt."""

    def __init__(self, cache: CacheConfig, answers: AnswersConfig, copy: TeacherCopy, log_dir: Path) -> None:
        self.cache, self.answers, self.copy, self.log_dir = cache, answers, copy, log_dir
        self.writer: AnswerWriter | None = None

    def ready(self) -> None:
        """Return when Ray has placed the actor."""

    def write(self, samples: list[Sample]) -> Iterator[PieceProgress | WrittenPart]:
        """Write one part; tell how far it is now and then."""
        self.writer = self.writer or self._start()
        yield PieceProgress(samples=0, tokens=0)
        told = 0.0
        for sign in self.writer.write(samples):
            if not isinstance(sign, PieceProgress) or time.monotonic() - told >= SIGN_OF_LIFE_S:
                told = time.monotonic()
                yield sign

    def _start(self) -> AnswerWriter:
        import ray

        from teacher_cache.answer_engine import VllmAnswerEngine

        teacher = require_same_copy(self.cache.teacher, expected=self.copy)
        actor_id = str(ray.get_runtime_context().get_actor_id())
        directory = str(checkpoint_directory(teacher))
        cache = self.cache.model_copy(update={"teacher": teacher})
        return AnswerWriter(
            VllmAnswerEngine(cache, answers=self.answers, log_file=self.log_dir / f"engine-{actor_id}.log"),
            processor=load_processor(directory, trust_remote_code=self.cache.teacher.trust_remote_code),
            config=self.answers,
            max_length=self.cache.data.max_length,
        )
