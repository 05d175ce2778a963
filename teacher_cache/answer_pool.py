"""The pool of actors that write answers: each holds one engine and works on one part of the data at a time."""

import logging
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from teacher_cache.answer_job import AnswerJob
from teacher_cache.answer_writing import AnswerWriter, WritingProgress, WrittenPart
from teacher_cache.answers_config import AnswersConfig
from teacher_cache.build_job import StopRequest
from teacher_cache.build_placement import ReplicaPlacement
from teacher_cache.chat import load_processor
from teacher_cache.config import CacheConfig
from teacher_cache.errors import DataIncomplete, GenrecalError, TeacherError
from teacher_cache.progress import Progress, progress
from teacher_cache.schema import Sample
from teacher_cache.teacher_checkpoint import checkpoint_directory

logger = logging.getLogger(__name__)

POLL_S: Final = 0.5
SIGN_OF_LIFE_S: Final = 1.0


@dataclass(kw_only=True)
class _Attempt:
    """An actor at work on a part."""

    actor: Any
    part: int
    last_sign_s: float
    has_started: bool = False
    samples: int = 0
    tokens: int = 0


class AnswerPool:
    """Hands out parts to ``num_replicas`` actors until all are written or given up."""

    def __init__(
        self,
        job: AnswerJob,
        *,
        cache: CacheConfig,
        answers: AnswersConfig,
        ray: ModuleType,
        placement: ReplicaPlacement,
        log_dir: Path,
    ) -> None:
        self._job = job
        self._cache = cache
        self._answers = answers
        self._ray = ray
        self._placement = placement
        self._log_dir = log_dir
        self._queue: deque[int] = deque()
        self._idle: list[Any] = []
        self._running: dict[Any, _Attempt] = {}
        self._attempts: Counter[int] = Counter()
        self._failures: dict[int, BaseException] = {}
        self._written = 0
        self._started = time.monotonic()
        self.tokens = 0
        """Generated so far."""

    def run(self, missing: Sequence[int], *, stop: StopRequest) -> None:
        """Write the missing parts.

        Raises:
            DataIncomplete: Some failed too often, or a signal came.
            TeacherError: None could be written.
        """
        self._queue.extend(missing)
        self._idle = [self._start_actor() for _ in range(min(len(missing), self._cache.build.num_replicas))]
        samples = sum(len(self._job.parts[part]) for part in missing)
        try:
            with progress(total=samples, unit="sample", description="cache answers") as bar:
                while self._queue or self._running:
                    self._check_stop(stop)
                    self._hand_out()
                    self._wait(bar)
                    self._replace_hung(bar)
        finally:
            for actor in [*self._idle, *(attempt.actor for attempt in self._running.values())]:
                self._placement.stop(actor)
        if self._failures:
            lines = "\n".join(f"  part {part}: {error}" for part, error in self._failures.items())
            raise DataIncomplete(
                f"{len(self._failures)} part(s) of {self._cache.data.path} failed {self._cache.build.max_attempts} "
                f"times:\n{lines}\nAll others are kept; run the command again. Engine logs are in {self._log_dir}"
            )

    def _start_actor(self) -> Any:
        return self._placement.start(_Actor, self._cache, self._answers, self._log_dir)

    def _check_stop(self, stop: StopRequest) -> None:
        if stop.signal is not None:
            left = len(self._queue) + len(self._running)
            raise DataIncomplete(
                f"stopped by {signal.Signals(stop.signal).name} with {left} part(s) of {self._cache.data.path} "
                "missing; run the command again to write them"
            )

    def _hand_out(self) -> None:
        while self._idle and self._queue:
            actor, part = self._idle.pop(), self._queue.popleft()
            self._attempts[part] += 1
            stream = actor.write.options(num_returns="streaming").remote(self._job.read(part))
            self._running[stream] = _Attempt(actor=actor, part=part, last_sign_s=time.monotonic())

    def _wait(self, bar: Progress) -> None:
        ready, _ = self._ray.wait([*self._running], timeout=POLL_S, fetch_local=False)
        for stream in ready:
            attempt = self._running[stream]
            try:
                sign = self._ray.get(next(stream))
            except self._ray.exceptions.RayError as error:
                self._give_up(stream, bar)
                self._failed(
                    attempt.part, error.cause if isinstance(error, self._ray.exceptions.RayTaskError) else error
                )
                continue
            attempt.last_sign_s, attempt.has_started = time.monotonic(), True
            if isinstance(sign, WritingProgress):
                self._advance(attempt, bar, samples=sign.samples, tokens=sign.tokens)
                continue
            del self._running[stream]
            self._idle.append(attempt.actor)
            self._job.commit(attempt.part, sign.samples)
            self._written += 1
            self._advance(attempt, bar, samples=len(sign.samples), tokens=sign.tokens)

    def _advance(self, attempt: _Attempt, bar: Progress, *, samples: int, tokens: int) -> None:
        new_samples, new_tokens = samples - attempt.samples, tokens - attempt.tokens
        attempt.samples, attempt.tokens = samples, tokens
        self.tokens += new_tokens
        rate = self.tokens / (time.monotonic() - self._started)
        bar.update(new_samples, tokens_per_s=round(rate), missing_parts=len(self._queue) + len(self._running))

    def _replace_hung(self, bar: Progress) -> None:
        build = self._cache.build
        for stream, attempt in list(self._running.items()):
            limit = build.stall_timeout_s if attempt.has_started else build.start_timeout_s
            if time.monotonic() - attempt.last_sign_s > limit:
                self._give_up(stream, bar)
                what = "has gone no step further" if attempt.has_started else "has not started its engine"
                self._failed(attempt.part, TeacherError(f"its replica {what} for {limit:g} s and was killed"))

    def _give_up(self, stream: Any, bar: Progress) -> None:
        """Take back what an attempt has counted, and put a fresh actor in the place of its own."""
        attempt = self._running.pop(stream)
        self._advance(attempt, bar, samples=0, tokens=0)
        self._placement.stop(attempt.actor)
        self._idle.append(self._start_actor())

    def _failed(self, part: int, error: BaseException) -> None:
        if isinstance(error, GenrecalError) and not isinstance(error, TeacherError):
            raise error  # another attempt would end the same
        attempts, allowed = self._attempts[part], self._cache.build.max_attempts
        logger.warning("part %d: attempt %d of %d failed: %s", part, attempts, allowed, error)
        if attempts < allowed:
            self._queue.appendleft(part)
        elif not self._written:
            raise TeacherError(
                f"no part of {self._cache.data.path} could be written; part {part} failed {attempts} times, the last "
                f"time with: {error}. Engine logs are in {self._log_dir}"
            ) from error
        else:
            self._failures[part] = error


class _Actor:
    """Starts its engine with its first part, so that an engine that does not start counts as a failed attempt."""

    def __init__(self, cache: CacheConfig, answers: AnswersConfig, log_dir: Path) -> None:
        self.cache, self.answers, self.log_dir = cache, answers, log_dir
        self.writer: AnswerWriter | None = None

    def write(self, samples: list[Sample]) -> Iterator[WritingProgress | WrittenPart]:
        """Write one part; tell how far it is now and then."""
        self.writer = self.writer or self._start()
        told = 0.0
        for sign in self.writer.write(samples):
            if not isinstance(sign, WritingProgress) or time.monotonic() - told >= SIGN_OF_LIFE_S:
                told = time.monotonic()
                yield sign

    def _start(self) -> AnswerWriter:
        import ray

        from teacher_cache.answer_engine import VllmAnswerEngine

        actor_id = str(ray.get_runtime_context().get_actor_id())
        directory = str(checkpoint_directory(self.cache.teacher))
        return AnswerWriter(
            VllmAnswerEngine(self.cache, answers=self.answers, log_file=self.log_dir / f"engine-{actor_id}.log"),
            processor=load_processor(directory, trust_remote_code=self.cache.teacher.trust_remote_code),
            config=self.answers,
            max_length=self.cache.data.max_length,
        )
