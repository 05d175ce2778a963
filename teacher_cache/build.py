"""The Ray job that fills a teacher cache: a pool of actors, one engine each, one shard at a time each.

Shards are committed by the actors themselves, once, whole or not at all, so the job may be killed at any
moment and started again. A failed shard is tried again in a fresh actor.
"""

import logging
import math
import os
import secrets
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from teacher_cache.build_job import BuildJob, BuildSummary, StopRequest, stop_on_signals
from teacher_cache.build_plan import open_builder
from teacher_cache.claims import Claims
from teacher_cache.config import BuildConfig, CacheConfig
from teacher_cache.errors import CacheError, CacheIncomplete, ConfigError, GenrecalError, TeacherError
from teacher_cache.plan import PlannedShard
from teacher_cache.progress import Progress, progress
from teacher_cache.reader import open_cache
from teacher_cache.samples import read_samples
from teacher_cache.schema import Sample
from teacher_cache.shard_worker import ShardReport, ShardWorker
from teacher_cache.storage import log_folder
from teacher_cache.vllm_teacher import engine_environment
from teacher_cache.writer import CacheWriter

logger = logging.getLogger(__name__)

POLL_S = 0.5
LOOKS_PER_LEASE = 10
"""How often per lease a shard that another builder has claimed is looked at."""


def build_cache(config: CacheConfig, *, log_dir: Path | None = None) -> BuildSummary:
    """Build a cache, or what is missing of it.

    Engine logs and ``cache-build.metrics.jsonl`` go to ``log_dir``, by default a folder beside a local cache.

    Raises:
        DataError: More samples are bad than ``max_skipped_samples``.
        CacheMismatch: The cache that is there was built from other content.
        CacheIncomplete: Shards failed ``max_attempts`` times, or a signal ended the run; run it again.
        TeacherError: The teacher does not start, or no shard at all can be computed.
    """
    started = time.monotonic()
    log_dir = log_dir or log_folder(config.uri)
    log_dir.mkdir(parents=True, exist_ok=True)
    samples = read_samples(config.data)
    writer = open_builder(config, samples)
    job = BuildJob(
        config=config,
        writer=writer,
        samples={sample.sample_id: sample for sample in samples.samples},
        skipped=[*samples.skipped, *open_cache(config.uri, allow_incomplete=True).skipped],
        log_dir=log_dir,
    )
    job.check_budget()
    if missing := job.missing_shards():
        claims = Claims(writer.store, lease_s=config.build.lease_s)
        with stop_on_signals() as stop, _ray_session(config.build) as ray, claims:
            stop.install()
            _Pool(job, stop=stop, ray=ray, claims=claims).run(missing)
    writer.complete()
    return job.finish(seconds=time.monotonic() - started)


class _Pool:
    """Hands out shards to ``num_replicas`` actors until all are built or given up."""

    def __init__(self, job: BuildJob, *, stop: StopRequest, ray: ModuleType, claims: Claims) -> None:
        self.job = job
        self.stop = stop
        self.ray = ray
        self.claims = claims
        self.actor_class = ray.remote(_Actor).options(
            max_restarts=0, max_task_retries=0, **_actor_options(job.config, available=ray.cluster_resources())
        )
        self.attempts: Counter[str] = Counter()
        self.failures: dict[str, BaseException] = {}
        self.queue: deque[PlannedShard] = deque()
        self.idle: list[Any] = []
        self.running: dict[Any, tuple[Any, PlannedShard]] = {}
        self.look_again: dict[str, float] = {}
        self.next_look = 0.0
        self.started = time.monotonic()

    def run(self, missing: Sequence[PlannedShard]) -> None:
        """Build the missing shards.

        Raises:
            CacheIncomplete: Some failed too often, or a signal came.
            GenrecalError: What a retry cannot mend.
        """
        self.queue.extend(missing)
        self.idle = [self._new_actor() for _ in range(min(len(missing), self.job.config.build.num_replicas))]
        try:
            with progress(total=len(missing), unit="shard", description="cache build") as bar:
                while self.queue or self.running:
                    self.stop.check(self.job)
                    self._hand_out()
                    bar.update(self._drop_committed())
                    if not self.running:
                        time.sleep(POLL_S)  # all that is left is claimed by other builders
                        continue
                    done, _ = self.ray.wait(list(self.running), timeout=POLL_S)
                    for reference in done:
                        self._collect(reference, bar)
        finally:
            for actor in [*self.idle, *(actor for actor, _ in self.running.values())]:
                self.ray.kill(actor)
        if self.failures:
            lines = "\n".join(f"  {shard_id}: {error}" for shard_id, error in self.failures.items())
            raise CacheIncomplete(
                f"{len(self.failures)} shard(s) of {self.job.config.uri} failed "
                f"{self.job.config.build.max_attempts} times:\n{lines}\nAll others are committed; run the build "
                f"again to try these. Engine logs are in {self.job.log_dir}"
            )

    def _new_actor(self) -> Any:
        return self.actor_class.remote(self.job.config, self.job.writer, self.job.log_dir)

    def _hand_out(self) -> None:
        while self.idle and (shard := self._take_shard()) is not None:
            actor = self.idle.pop()
            self.attempts[shard.shard_id] += 1
            samples = [self.job.samples[sample_id] for sample_id in shard.sample_ids]
            self.running[actor.build.remote(shard.shard_id, samples)] = (actor, shard)

    def _take_shard(self) -> PlannedShard | None:
        """Take the next shard that no other builder has claimed; one that is claimed is looked at again later."""
        for _ in range(len(self.queue)):
            shard = self.queue.popleft()
            if time.monotonic() >= self.look_again.get(shard.shard_id, 0.0):
                if self.claims.take(shard.shard_id):
                    return shard
                self.look_again[shard.shard_id] = time.monotonic() + self.job.config.build.lease_s / LOOKS_PER_LEASE
            self.queue.append(shard)
        return None

    def _drop_committed(self) -> int:
        """Forget the shards that other builders have committed; return their number."""
        waiting = [shard for shard in self.queue if shard.shard_id in self.look_again]
        if not waiting or time.monotonic() < self.next_look:
            return 0
        self.next_look = time.monotonic() + self.job.config.build.lease_s / LOOKS_PER_LEASE
        missing = {shard.shard_id for shard in self.job.writer.missing_shards()}
        done = [shard for shard in waiting if shard.shard_id not in missing]
        for shard in done:
            self.queue.remove(shard)
        return len(done)

    def _collect(self, reference: Any, bar: Progress) -> None:
        actor, shard = self.running.pop(reference)
        try:
            report = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self.ray.kill(actor)
            self._failed(shard, error.cause if isinstance(error, self.ray.exceptions.RayTaskError) else error)
            self.idle.append(self._new_actor())
            return
        self.idle.append(actor)
        self.claims.release(shard.shard_id)
        self.job.take_in(report)
        rate = sum(report.tokens for report in self.job.reports) / (time.monotonic() - self.started)
        bar.update(1, tokens_per_s=round(rate), skipped=len(self.job.skipped))

    def _failed(self, shard: PlannedShard, error: BaseException) -> None:
        # a CacheError proper is a refused write; its subclasses, as other errors of ours, stay when tried again
        retryable = not isinstance(error, GenrecalError) or type(error) in (TeacherError, CacheError)
        if not retryable:
            raise error
        attempts, allowed = self.attempts[shard.shard_id], self.job.config.build.max_attempts
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

    def build(self, shard_id: str, samples: list[Sample]) -> ShardReport:
        """Build one shard; an engine that failed is stopped, for its actor is replaced."""
        try:
            self.worker = self.worker or self._start()
            return self.worker.build(shard_id, samples)
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


def import_ray() -> ModuleType:
    """Import Ray; a cluster of our own, which listens on all interfaces, is guarded by a random token.

    Ray takes its authentication mode from the environment when it is imported: who imports it first decides.
    """
    if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)} | os.environ
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"} | os.environ
    import ray

    return ray


@contextmanager
def _ray_session(build: BuildConfig) -> Iterator[ModuleType]:
    """Use the Ray that this process is connected to, the cluster at RAY_ADDRESS, or a local one of our own."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"address": os.environ.get("RAY_ADDRESS", "local")}
    if options["address"] == "local":
        needed = math.ceil(build.num_replicas * build.cpus_per_replica)
        options |= {"include_dashboard": False, "num_cpus": max(needed, os.cpu_count() or 1)}
    ray.init(**options, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield ray
    finally:
        ray.shutdown()


def _actor_options(config: CacheConfig, *, available: dict[str, float]) -> dict[str, Any]:
    build = config.build
    gpus = build.gpus_per_replica
    if gpus is None:
        gpus = build.tensor_parallel_size if available.get("GPU", 0) else 0
    for kind, wanted in (("CPU", build.cpus_per_replica), ("GPU", gpus)):
        if wanted * build.num_replicas > available.get(kind, 0):
            raise ConfigError(
                f"{build.num_replicas} replica(s) with {wanted:g} {kind}(s) each do not fit the Ray cluster, which "
                f"has {available.get(kind, 0):g} {kind}(s); lower `build.num_replicas` or add nodes"
            )
    return {
        "num_cpus": build.cpus_per_replica,
        "num_gpus": gpus,
        "runtime_env": {"env_vars": engine_environment(model=config.teacher.model, on_cuda=gpus > 0)},
    }
