"""The pool of actors that build shards: each holds one engine and works on one shard at a time."""

import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from teacher_cache.build_job import BuildJob, StopRequest
from teacher_cache.build_metrics import BuildMetrics
from teacher_cache.build_placement import ReplicaPlacement
from teacher_cache.claims import Claims
from teacher_cache.config import CacheConfig
from teacher_cache.errors import CacheError, CacheIncomplete, GenrecalError, TeacherError
from teacher_cache.plan import PlannedShard
from teacher_cache.progress import Progress, progress
from teacher_cache.schema import Sample
from teacher_cache.shard_worker import ShardProgress, ShardReport, ShardWorker
from teacher_cache.spot_check import ReferenceRows
from teacher_cache.writer import CacheWriter

logger = logging.getLogger(__name__)

POLL_S: Final = 0.5
LOOKS_PER_LEASE: Final = 10
"""How often per lease a shard that another builder has claimed is looked at."""
WAIT_NOTICE_S: Final = 60.0


@dataclass(kw_only=True)
class _Attempt:
    """An actor at work on a shard."""

    actor: Any
    shard: PlannedShard
    last_sign_s: float
    has_started: bool = False
    samples: int = 0
    tokens: int = 0


class BuildPool:
    """Hands out shards to ``num_replicas`` actors until all are built or given up."""

    def __init__(
        self,
        job: BuildJob,
        *,
        stop: StopRequest,
        ray: ModuleType,
        claims: Claims,
        placement: ReplicaPlacement,
        metrics: BuildMetrics,
        references: Mapping[str, ReferenceRows],
    ) -> None:
        self.job = job
        self.build = job.config.build
        self.stop = stop
        self.ray = ray
        self.claims = claims
        self.placement = placement
        self.metrics = metrics
        self.references = references
        self.attempts: Counter[str] = Counter()
        self.failures: dict[str, BaseException] = {}
        self.queue: deque[PlannedShard] = deque()
        self.starting: dict[Any, Any] = {}
        self.idle: list[Any] = []
        self.running: dict[Any, _Attempt] = {}
        self.look_again: dict[str, float] = {}
        self.next_look = 0.0
        self.tokens = 0
        self.started = self.notice = time.monotonic()

    def run(self, missing: Sequence[PlannedShard]) -> None:
        """Build the missing shards.

        Raises:
            CacheIncomplete: Some failed too often, or a signal came.
            GenrecalError: What a retry cannot mend.
        """
        self.queue.extend(missing)
        for _ in range(min(len(missing), self.build.num_replicas)):
            self._start_actor()
        samples = sum(len(shard.sample_ids) for shard in missing)
        try:
            with progress(total=samples, unit="sample", description="cache build") as bar:
                while self.queue or self.running:
                    self.stop.check(self.job)
                    self._hand_out()
                    bar.update(self._drop_committed(), **self._figures())
                    self._wait(bar)
                    self._replace_hung(bar)
        finally:
            for actor in [*self.starting.values(), *self.idle, *(attempt.actor for attempt in self.running.values())]:
                self.placement.stop(actor)
        if self.failures:
            lines = "\n".join(f"  {shard_id}: {error}" for shard_id, error in self.failures.items())
            raise CacheIncomplete(
                f"{len(self.failures)} shard(s) of {self.job.config.uri} failed {self.build.max_attempts} times:\n"
                f"{lines}\nAll others are committed; run the build again to try these. Engine logs are in "
                f"{self.job.log_dir}"
            )

    def _start_actor(self) -> None:
        actor = self.placement.start(_Actor, self.job.config, self.job.writer, self.job.log_dir)
        self.starting[actor.ready.remote()] = actor

    def _hand_out(self) -> None:
        while self.idle and (shard := self._take_shard()) is not None:
            actor = self.idle.pop()
            self.attempts[shard.shard_id] += 1
            chosen = [self.references[id_] for id_ in shard.sample_ids if id_ in self.references]
            stream = actor.build.options(num_returns="streaming").remote(shard.shard_id, self.job.read(shard), chosen)
            self.running[stream] = _Attempt(actor=actor, shard=shard, last_sign_s=time.monotonic())

    def _take_shard(self) -> PlannedShard | None:
        """Take the next shard that no other builder has claimed; one that is claimed is looked at again later."""
        for _ in range(len(self.queue)):
            shard = self.queue.popleft()
            if time.monotonic() >= self.look_again.get(shard.shard_id, 0.0):
                if self.claims.take(shard.shard_id):
                    return shard
                self.look_again[shard.shard_id] = time.monotonic() + self.build.lease_s / LOOKS_PER_LEASE
            self.queue.append(shard)
        return None

    def _drop_committed(self) -> int:
        """Forget the shards that other builders have committed; return the number of their samples."""
        waiting = [shard for shard in self.queue if shard.shard_id in self.look_again]
        if not waiting or time.monotonic() < self.next_look:
            return 0
        self.next_look = time.monotonic() + self.build.lease_s / LOOKS_PER_LEASE
        missing = {shard.shard_id for shard in self.job.writer.missing_shards()}
        done = [shard for shard in waiting if shard.shard_id not in missing]
        for shard in done:
            self.queue.remove(shard)
        return sum(len(shard.sample_ids) for shard in done)

    def _wait(self, bar: Progress) -> None:
        """Take in what actors have told."""
        waitables = [*self.running, *self.starting]
        if not waitables:
            time.sleep(POLL_S)  # all that is left is claimed by other builders
            return
        ready, _ = self.ray.wait(waitables, timeout=POLL_S, fetch_local=False)
        for told in ready:
            if told in self.starting:
                self._take_actor(told)
            else:
                self._take_sign(told, bar)
        if not self.running and not self.idle and time.monotonic() - self.notice > WAIT_NOTICE_S:
            self.notice = time.monotonic()
            logger.warning("waiting for Ray to place %d replica(s): are there free resources?", len(self.starting))

    def _take_actor(self, ready: Any) -> None:
        actor = self.starting.pop(ready)
        try:
            self.ray.get(ready)
        except self.ray.exceptions.RayError as error:
            logger.warning("a replica died before it had work: %s", error)
            self.placement.stop(actor)
            self._start_actor()
        else:
            self.idle.append(actor)

    def _take_sign(self, stream: Any, bar: Progress) -> None:
        attempt = self.running[stream]
        try:
            sign = self.ray.get(next(stream))
        except self.ray.exceptions.RayError as error:
            del self.running[stream]
            self._give_up(attempt, bar)
            self._failed(attempt.shard, error.cause if isinstance(error, self.ray.exceptions.RayTaskError) else error)
            return
        attempt.last_sign_s, attempt.has_started = time.monotonic(), True
        if isinstance(sign, ShardProgress):
            self._advance(attempt, bar, samples=sign.samples, tokens=sign.tokens)
            return
        del self.running[stream]
        self._advance(attempt, bar, samples=len(attempt.shard.sample_ids), tokens=sign.tokens)
        self.idle.append(attempt.actor)
        self._commit(attempt.shard, sign)

    def _commit(self, shard: PlannedShard, report: ShardReport) -> None:
        self.claims.release(shard.shard_id)
        self.metrics.committed(seconds=report.seconds, skipped=len(report.skipped))
        logger.info(
            "shard %s: %d samples, %d tokens in %.1f s (%.0f tokens/s)",
            shard.shard_id, report.samples, report.tokens, report.seconds, report.tokens / report.seconds,
        )  # fmt: skip
        self.job.take_in(report)

    def _advance(self, attempt: _Attempt, bar: Progress, *, samples: int, tokens: int) -> None:
        new_samples, new_tokens = samples - attempt.samples, tokens - attempt.tokens
        attempt.samples, attempt.tokens = samples, tokens
        self.tokens += new_tokens
        if new_samples > 0:
            self.metrics.advanced(samples=new_samples, tokens=new_tokens)
        bar.update(new_samples, **self._figures())

    def _figures(self) -> dict[str, int]:
        missing = len(self.queue) + len(self.running)
        self.metrics.state(missing_shards=missing, running_replicas=len(self.running))
        rate = self.tokens / (time.monotonic() - self.started)
        return {"tokens_per_s": round(rate), "missing_shards": missing, "skipped": len(self.job.skipped)}

    def _replace_hung(self, bar: Progress) -> None:
        for stream, attempt in list(self.running.items()):
            limit = self.build.stall_timeout_s if attempt.has_started else self.build.start_timeout_s
            if time.monotonic() - attempt.last_sign_s > limit:
                del self.running[stream]
                self._give_up(attempt, bar)
                what = "has finished no sample" if attempt.has_started else "has not started its engine"
                self._failed(attempt.shard, TeacherError(f"its replica {what} for {limit:g} s and was killed"))

    def _give_up(self, attempt: _Attempt, bar: Progress) -> None:
        """Take back what an attempt has counted, and put a fresh actor in the place of its own."""
        self._advance(attempt, bar, samples=0, tokens=0)
        self.metrics.failed()
        self.placement.stop(attempt.actor)
        self._start_actor()

    def _failed(self, shard: PlannedShard, error: BaseException) -> None:
        # a CacheError proper is a refused write; its subclasses, as other errors of ours, stay when tried again
        retryable = not isinstance(error, GenrecalError) or type(error) in (TeacherError, CacheError)
        if not retryable:
            raise error
        attempts, allowed = self.attempts[shard.shard_id], self.build.max_attempts
        logger.warning("shard %s: attempt %d of %d failed: %s", shard.shard_id, attempts, allowed, error)
        if attempts < allowed:
            self.queue.appendleft(shard)
        elif not self.job.reports:
            raise TeacherError(
                f"no shard could be built; shard {shard.shard_id} failed {attempts} times, the last time with: "
                f"{error}. Engine logs are in {self.job.log_dir}"
            ) from error
        else:
            self.claims.release(shard.shard_id)
            self.failures[shard.shard_id] = error


class _Actor:
    """Starts its engine with its first shard, so that an engine that does not start counts as a failed attempt."""

    def __init__(self, config: CacheConfig, writer: CacheWriter, log_dir: Path) -> None:
        self.config, self.writer, self.log_dir = config, writer, log_dir
        self.worker: ShardWorker | None = None

    def ready(self) -> None:
        """Return when Ray has placed the actor."""

    def build(
        self, shard_id: str, samples: list[Sample], references: list[ReferenceRows]
    ) -> Iterator[ShardProgress | ShardReport]:
        """Build one shard; an engine that failed is stopped, for its actor is replaced."""
        try:
            self.worker = self.worker or self._start()
            yield ShardProgress(samples=0, tokens=0)
            yield from self.worker.build(shard_id, samples, references=references)
        except Exception:
            if self.worker is not None:
                self.worker.close()
            raise

    def _start(self) -> ShardWorker:
        import ray

        actor_id = str(ray.get_runtime_context().get_actor_id())
        identity = {"actor_id": actor_id, "pid": str(os.getpid()), "host": socket.gethostname()}
        log_file = self.log_dir / f"engine-{actor_id}.log"
        return ShardWorker(self.config, writer=self.writer, identity=identity, log_file=log_file)
