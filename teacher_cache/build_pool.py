"""The pool of actors that build shards: each holds one engine and works on one shard at a time."""

import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from teacher_cache.actor_pool import ActorPool
from teacher_cache.build_job import BuildJob, StopRequest
from teacher_cache.build_metrics import BuildMetrics
from teacher_cache.build_placement import ReplicaPlacement
from teacher_cache.claims import Claims
from teacher_cache.config import CacheConfig
from teacher_cache.errors import CacheError, CacheIncomplete
from teacher_cache.ledger import record_name
from teacher_cache.plan import PlannedShard
from teacher_cache.pool_work import PieceQueue
from teacher_cache.progress import PieceProgress, progress
from teacher_cache.samples_ahead import SamplesAhead
from teacher_cache.schema import Sample
from teacher_cache.shard_worker import ShardReport, ShardWorker
from teacher_cache.spot_check import ReferenceRows
from teacher_cache.standing import standing_revisions
from teacher_cache.writer import CacheWriter

logger = logging.getLogger(__name__)

LOOKS_PER_LEASE: Final = 10
"""How often per lease a shard that another builder has claimed is looked at."""
REFUSALS: Final = 30
"""How often in a row the store may refuse a step before that ends the build."""
REFUSAL_PAUSE_S: Final = 10.0
"""Until shards are taken again."""


class ShardQueue(PieceQueue[PlannedShard]):
    """The shards that nobody works on, as far as the claims and records of other builders tell."""

    def __init__(self, shards: Sequence[PlannedShard], *, writer: CacheWriter, claims: Claims, lease_s: float) -> None:
        super().__init__(shards)
        self._writer = writer
        self._claims = claims
        self._interval_s = lease_s / LOOKS_PER_LEASE
        self._look_again: dict[str, float] = {}
        self._next_look = 0.0
        self._taken: set[str] = set()
        """What our own actors may have committed is theirs to report."""
        self._dropped_samples = 0
        self._refusals: Counter[str] = Counter()
        self._next_take = 0.0
        self._revisions: dict[str, int] = {}
        try:
            self._revisions = standing_revisions(writer.store)
            self._drop_done()  # the reference of the spot check took its time
        except CacheError as error:
            self._refused("look for commits", error)

    def take(self) -> PlannedShard | None:
        """Take the next shard that no other builder has claimed or committed; claims are looked at again later.

        So is a store that refuses it: a claim saves work and decides nothing.

        Raises:
            CacheError: It has refused ``REFUSALS`` times in a row, or what lies there is damaged.
        """
        if time.monotonic() < self._next_take:
            return None
        try:
            shard = self._take_free()
        except CacheError as error:
            self._refused("take a shard", error)
            self._next_take = time.monotonic() + REFUSAL_PAUSE_S
            return None
        self._refusals["take a shard"] = 0
        return shard

    def upcoming(self) -> PlannedShard | None:
        """Return the shard that is likely taken next, without a look at the store."""
        now = time.monotonic()
        return next((shard for shard in self.pieces if now >= self._look_again.get(shard.shard_id, 0.0)), None)

    def drop_done_elsewhere(self) -> int:
        """Forget the shards that other builders have committed; return the number of their samples."""
        if time.monotonic() >= self._next_look and any(shard.shard_id in self._look_again for shard in self.pieces):
            self._next_look = time.monotonic() + self._interval_s
            try:
                self._drop_done()
                self._refusals["look for commits"] = 0
            except CacheError as error:
                self._refused("look for commits", error)
        dropped, self._dropped_samples = self._dropped_samples, 0
        return dropped

    def _take_free(self) -> PlannedShard | None:
        for _ in range(len(self.pieces)):
            shard = self.pieces[0]
            if time.monotonic() >= self._look_again.get(shard.shard_id, 0.0):
                if self._claims.take(shard.shard_id):
                    # a claim is free again once its shard is committed
                    if shard.shard_id in self._taken or self._is_missing(shard):
                        self._taken.add(shard.shard_id)
                        return self.pieces.popleft()
                    self._claims.release(shard.shard_id)
                    self._drop_done()
                    return self._take_free()
                self._look_again[shard.shard_id] = time.monotonic() + self._interval_s
            self.pieces.rotate(-1)
        return None

    def _refused(self, step: str, error: CacheError) -> None:
        """Raise the error of a step unless it may pass."""
        self._refusals[step] += 1
        if type(error) is not CacheError or self._refusals[step] >= REFUSALS:
            raise error
        logger.warning("cannot %s, attempt %d of %d: %s", step, self._refusals[step], REFUSALS, error)

    def _is_missing(self, shard: PlannedShard) -> bool:
        """Tell whether a shard is still not committed; records are listed only where there is a new one."""
        name = record_name(shard.shard_id, self._revisions.get(shard.shard_id, -1) + 1)
        try:
            if self._writer.store.size(name) is None:
                return True
        except OSError as error:
            raise CacheError(
                f"shard {shard.shard_id}: cannot look for {self._writer.uri}/{name}: {error}; mend the store, then run "
                "the build again"
            ) from error
        return shard in self._writer.missing_shards()

    def _drop_done(self) -> None:
        missing = {shard.shard_id for shard in self._writer.missing_shards()}
        kept = [shard for shard in self.pieces if shard.shard_id in missing or shard.shard_id in self._taken]
        self._dropped_samples += sum(len(shard.sample_ids) for shard in self.pieces)
        self._dropped_samples -= sum(len(shard.sample_ids) for shard in kept)
        self.pieces = deque(kept)


class BuildWork:
    """Shards, and the actors that build them."""

    unit = "shard"

    def __init__(
        self,
        job: BuildJob,
        *,
        stop: StopRequest,
        claims: Claims,
        placement: ReplicaPlacement,
        metrics: BuildMetrics,
        references: Mapping[str, ReferenceRows],
        samples: SamplesAhead,
    ) -> None:
        self._job = job
        self._stop = stop
        self._claims = claims
        self._placement = placement
        self._metrics = metrics
        self._references = references
        self._samples = samples

    def start_actor(self) -> Any:
        """Return a new actor."""
        return self._placement.start(_Actor, self._job.config, self._job.writer, self._job.log_dir)

    def begin(self, actor: Any, piece: PlannedShard) -> Any:
        """Have an actor build a shard."""
        chosen = [self._references[id_] for id_ in piece.sample_ids if id_ in self._references]
        return actor.build.options(num_returns="streaming").remote(piece.shard_id, self._samples.take(piece), chosen)

    def num_samples(self, piece: PlannedShard) -> int:
        """Return the samples of a shard."""
        return len(piece.sample_ids)

    def name(self, piece: PlannedShard) -> str:
        """Return a shard's id."""
        return piece.shard_id

    def finish(self, piece: PlannedShard, result: ShardReport) -> None:
        """Take in what an actor has committed."""
        self._claims.release(piece.shard_id)
        self._metrics.committed(seconds=result.seconds, skipped=len(result.skipped))
        logger.info(
            "shard %s: %d samples, %d tokens in %.1f s (%.0f tokens/s)",
            piece.shard_id, result.samples, result.tokens, result.seconds, result.tokens / result.seconds,
        )  # fmt: skip
        self._job.take_in(result)

    def give_up(self, piece: PlannedShard) -> None:
        """Let other builders try."""
        self._claims.release(piece.shard_id)

    def figures(self) -> dict[str, int]:
        """Return the number of bad samples."""
        return {"skipped": len(self._job.skipped)}

    def check_stop(self, *, num_missing: int) -> None:
        """Raise CacheIncomplete after a signal."""
        self._stop.check(self._job)


def build_shards(
    job: BuildJob,
    missing: Sequence[PlannedShard],
    *,
    stop: StopRequest,
    ray: ModuleType,
    claims: Claims,
    placement: ReplicaPlacement,
    metrics: BuildMetrics,
    references: Mapping[str, ReferenceRows],
) -> None:
    """Build the missing shards in ``num_replicas`` actors.

    Raises:
        CacheIncomplete: Some failed too often, or a signal came.
        TeacherError: None could be built.
        GenrecalError: What a retry cannot mend.
    """
    build = job.config.build
    queue = ShardQueue(missing, writer=job.writer, claims=claims, lease_s=build.lease_s)
    total = sum(len(shard.sample_ids) for shard in missing)
    with (
        SamplesAhead(job.read, upcoming=queue.upcoming) as samples,
        progress(total=total, unit="sample", description="cache build") as bar,
    ):
        work = BuildWork(
            job,
            stop=stop,
            claims=claims,
            placement=placement,
            metrics=metrics,
            references=references,
            samples=samples,
        )
        pool = ActorPool(work, queue, build=build, placement=placement, ray=ray, log_dir=job.log_dir, metrics=metrics)
        pool.run(bar)
    if pool.failures:
        lines = "\n".join(f"  {shard_id}: {error}" for shard_id, error in pool.failures.items())
        raise CacheIncomplete(
            f"{len(pool.failures)} shard(s) of {job.config.uri} failed {build.max_attempts} times:\n{lines}\nAll "
            f"others are committed; run the build again to try these. Engine logs are in {job.log_dir}"
        )


class _Actor:
    """Starts its engine with its first shard, so that an engine that does not start counts as a failed attempt."""

    def __init__(self, config: CacheConfig, writer: CacheWriter, log_dir: Path) -> None:
        self.config, self.writer, self.log_dir = config, writer, log_dir
        self.worker: ShardWorker | None = None

    def ready(self) -> None:
        """Return when Ray has placed the actor."""

    def build(
        self, shard_id: str, samples: list[Sample], references: list[ReferenceRows]
    ) -> Iterator[PieceProgress | ShardReport]:
        """Build one shard; an engine that failed is stopped, for its actor is replaced."""
        try:
            self.worker = self.worker or self._start()
            yield PieceProgress(samples=0, tokens=0)
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
