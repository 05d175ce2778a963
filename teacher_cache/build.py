"""The Ray job that fills a teacher cache: a pool of actors, one engine each, one shard at a time each.

Shards are committed by the actors themselves, once, whole or not at all, so the job may be killed at any
moment and started again. A failed or hung shard is tried again in a fresh actor.
"""

import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from teacher_cache.build_job import BuildJob, BuildSummary, stop_on_signals
from teacher_cache.build_metrics import BuildMetrics
from teacher_cache.build_placement import ReplicaPlacement
from teacher_cache.build_plan import open_builder
from teacher_cache.build_pool import build_shards
from teacher_cache.claims import Claims
from teacher_cache.config import CacheConfig
from teacher_cache.ray_guard import cluster_exposure, require_private, token_exposure
from teacher_cache.reader import open_cache
from teacher_cache.sample_file import SampleFile, scan_samples
from teacher_cache.skipped_rows import write_skipped_rows
from teacher_cache.spot_check_job import compute_references
from teacher_cache.storage import log_folder

logger = logging.getLogger(__name__)

_ALLOWANCE: Final = "`cache.build.insecure_ray`"
_RAY_STARTS: Final = 3


def build_cache(config: CacheConfig, *, log_dir: Path | None = None) -> BuildSummary:
    """Build a cache, or what is missing of it.

    Engine logs, ``cache-build.metrics.jsonl`` and the list of bad rows go to ``log_dir``, by default a folder beside a
    local cache.

    Raises:
        DataError: More samples are bad than ``max_skipped_samples``, or the data changed while it was read.
        CacheMismatch: The cache that is there was built from other content.
        CacheIncomplete: Shards failed ``max_attempts`` times, or a signal ended the run; run it again.
        TeacherError: The teacher does not start, or no shard at all can be computed.
    """
    started = time.monotonic()
    log_dir = log_dir or log_folder(config.uri)
    log_dir.mkdir(parents=True, exist_ok=True)
    table = scan_samples(config.data)
    write_skipped_rows(table.skipped, folder=log_dir)
    writer = open_builder(config, table)
    samples = {sample.sample_id: sample for sample in table.samples}
    stored = open_cache(config.uri, allow_incomplete=True).skipped
    with SampleFile(config.data) as file:
        job = BuildJob(
            config=config,
            writer=writer,
            samples=samples,
            file=file,
            skipped=[*table.skipped, *(bad for bad in stored if bad.sample_id in samples)],
            log_dir=log_dir,
        )
        job.check_budget()
        if job.missing_shards():
            _build_missing(job)
        writer.complete()
        return job.finish(seconds=time.monotonic() - started)


def _build_missing(job: BuildJob) -> None:
    build = job.config.build
    claims = Claims(job.writer.store, lease_s=build.lease_s)
    cpus = build.num_replicas * build.cpus_per_replica
    with stop_on_signals() as stop, ray_session(num_cpus=cpus, insecure=build.insecure_ray) as ray, claims:
        stop.install()
        placement = ReplicaPlacement(ray, job.config)
        missing = job.missing_shards()
        checked = job.spot_checked(missing, stop=stop)
        references = compute_references(checked, placement=placement, ray=ray, stop=stop, job=job)
        build_shards(
            job,
            missing,
            stop=stop,
            ray=ray,
            claims=claims,
            placement=placement,
            metrics=BuildMetrics(uri=job.config.uri),
            references=references,
        )


def import_ray() -> ModuleType:
    """Import Ray; a cluster of our own, which listens on all interfaces, is guarded by a random token.

    Ray takes its authentication mode from the environment when it is imported: who imports it first decides. One that
    was not told any takes to tokens when it starts a cluster.
    """
    if "RAY_ADDRESS" not in os.environ:
        token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ |= (token if "ray" in sys.modules else {"RAY_AUTH_MODE": "token", **token}) | os.environ
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"} | os.environ
    import ray

    return ray


def start_ray(ray: ModuleType, **options: Any) -> None:
    """Connect to a cluster or start one, again where a busy machine brings Ray's processes up too late for it."""
    for attempt in range(1, _RAY_STARTS + 1):
        try:
            ray.init(**options, logging_level=logging.WARNING)
        except Exception as error:  # Ray's own class for it is Exception
            if "timed out during startup" not in str(error) or attempt == _RAY_STARTS:
                raise
            logger.warning("start %d of %d of Ray failed: %s", attempt, _RAY_STARTS, error)
            ray.shutdown()
        else:
            return


@contextmanager
def ray_session(*, num_cpus: float, insecure: bool, log_to_driver: bool = False) -> Iterator[ModuleType]:
    """Use the Ray that this process is connected to, the cluster at RAY_ADDRESS, or a local one of our own.

    Args:
        num_cpus: CPUs that a local one offers at least.
        insecure: Whether a cluster will do that asks for no token.
        log_to_driver: Whether this process prints what the workers print.

    Raises:
        ConfigError: The cluster asks for no token, or others may read it.
    """
    ray = import_ray()
    if ray.is_initialized():
        _check_cluster(ray, insecure=insecure)
        yield ray
        return
    options: dict[str, Any] = {"address": os.environ.get("RAY_ADDRESS", "local")}
    if options["address"] == "local":
        options |= {"include_dashboard": False, "num_cpus": max(math.ceil(num_cpus), os.cpu_count() or 1)}
    # Ray that was imported before and told no mode chooses when it starts a cluster: that one is looked at below
    if not insecure and (options["address"] != "local" or "RAY_AUTH_MODE" in os.environ):
        require_private(token_exposure(os.environ), allowance=_ALLOWANCE)
    start_ray(ray, **options, log_to_driver=log_to_driver)
    try:
        _check_cluster(ray, insecure=insecure)
        yield ray
    finally:
        ray.shutdown()


def _check_cluster(ray: ModuleType, *, insecure: bool) -> None:
    """Refuse a connected cluster that is not private, before it gets any work."""
    if not insecure:
        require_private(token_exposure(os.environ), allowance=_ALLOWANCE)
        require_private(cluster_exposure(ray.get_runtime_context().gcs_address), allowance=_ALLOWANCE)
