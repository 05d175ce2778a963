"""The books of a build: what is to be done, what was, the skip budget, metrics, and the stop on a signal."""

import dataclasses
import json
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from teacher_cache.build_plan import engine_version
from teacher_cache.config import CacheConfig
from teacher_cache.errors import CacheIncomplete, DataError
from teacher_cache.plan import PlannedShard
from teacher_cache.reader import open_cache
from teacher_cache.row_sample import evenly_spread
from teacher_cache.sample_file import SampleEntry, SampleFile
from teacher_cache.samples import check_skip_budget
from teacher_cache.schema import Sample, SkippedSample
from teacher_cache.shard_worker import ShardReport
from teacher_cache.spot_check import SpotCheck, is_spot_checked
from teacher_cache.writer import CacheWriter

logger = logging.getLogger(__name__)

METRICS_FILE = "cache-build.metrics.jsonl"
MOST_CHECKED: Final = 1024
"""Samples that a start of a build computes twice at most: their references are held in memory, and no shard is built
before all of them are there."""


@dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """What one run of a build did; the counts of samples and shards are those of the whole cache."""

    uri: str
    engine: str
    engine_version: str
    shards: int
    shards_built: int
    """By this run."""
    samples: int
    skipped: tuple[SkippedSample, ...]
    """Of this run's data."""
    tokens: int
    """Teacher tokens computed by this run, image tokens included."""
    seconds: float
    tokens_per_s: float
    spot_check: SpotCheck
    """Over the shards of this run."""
    workers: tuple[dict[str, str], ...]
    """Engine, version, actor id, process id and host of each worker that built shards in this run."""


@dataclass(kw_only=True)
class BuildJob:
    """What is to be built, and what has been."""

    config: CacheConfig
    writer: CacheWriter
    samples: dict[str, SampleEntry]
    file: SampleFile
    skipped: list[SkippedSample]
    log_dir: Path
    reports: list[ShardReport] = field(default_factory=list)

    def missing_shards(self) -> list[PlannedShard]:
        """Return the shards to build: all that are missing and whose samples this run has."""
        missing = self.writer.missing_shards()
        own = [shard for shard in missing if all(sample_id in self.samples for sample_id in shard.sample_ids)]
        if len(own) < len(missing):
            others = len(missing) - len(own)
            logger.warning("%d missing shard(s) of %s hold samples of other runs", others, self.config.uri)
        return own

    def read(self, shard: PlannedShard) -> list[Sample]:
        """Return the samples of a shard."""
        return self.file.read([self.samples[sample_id] for sample_id in shard.sample_ids])

    def spot_checked(self, shards: Sequence[PlannedShard], *, stop: "StopRequest") -> list[SampleEntry]:
        """Return the samples of these shards that are computed twice: at most ``MOST_CHECKED``, evenly spread.

        Raises:
            CacheIncomplete: A signal came.
        """
        every = self.config.build.spot_check_every if self.config.build.engine != "transformers" else 0
        chosen: list[SampleEntry] = []
        for shard in shards:
            stop.check(self)
            entries = (self.samples[sample_id] for sample_id in shard.sample_ids)
            chosen += (entry for entry in entries if is_spot_checked(entry.digest, every=every))
        return [chosen[number] for number in evenly_spread(len(chosen), at_most=MOST_CHECKED)]

    def take_in(self, report: ShardReport) -> None:
        """Count a committed shard.

        Raises:
            DataError: The skip budget is exceeded.
        """
        self.reports.append(report)
        self.skipped += report.skipped
        self.write_metrics(dataclasses.asdict(report))
        self.check_budget()

    def check_budget(self) -> None:
        """Raise DataError when more samples were skipped than the config allows."""
        data = self.config.data
        try:
            check_skip_budget(self.skipped, allowed=data.max_skipped_samples, source=data.path)
        except DataError as error:
            bad = {one.sample_id for one in self.skipped if one.sample_id in self.samples}
            shards = [shard.shard_id for shard in self.writer.plan.shards if not bad.isdisjoint(shard.sample_ids)]
            if not shards:
                raise
            raise DataError(
                f"{error}\nShards with bad samples: {', '.join(shards[:10])}. Where not the data but a machine was at "
                "fault, `genrecal cache repair URI --withdraw SHARD` has the next build compute a shard again."
            ) from error

    def finish(self, *, seconds: float) -> BuildSummary:
        """Return the summary of a complete cache, and log it."""
        cache = open_cache(self.config.uri)
        tokens = sum(report.tokens for report in self.reports)
        engine = self.config.build.engine
        summary = BuildSummary(
            uri=self.config.uri,
            engine=engine,
            engine_version=engine_version(engine),
            shards=len(cache.shard_ids),
            shards_built=len(self.reports),
            samples=len(cache),
            skipped=tuple(self.skipped),
            tokens=tokens,
            seconds=seconds,
            tokens_per_s=tokens / seconds,
            spot_check=SpotCheck.merged([report.spot_check for report in self.reports]),
            workers=tuple({report.worker["actor_id"]: report.worker for report in self.reports}.values()),
        )
        self.write_metrics({"summary": dataclasses.asdict(summary)})
        return summary

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics file."""
        with (self.log_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time()} | record) + "\n")


class StopRequest:
    """Remembers a SIGTERM or SIGINT until the pool looks."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def install(self) -> None:
        """Catch both signals from now on, where this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._remember)

    def check(self, job: BuildJob) -> None:
        """Raise CacheIncomplete when a signal came."""
        if self.signal is not None:
            raise CacheIncomplete(
                f"stopped by {signal.Signals(self.signal).name} with {len(job.writer.missing_shards())} shard(s) of "
                f"{job.config.uri} missing; run the build again to complete them"
            )

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGINT within the block; the handlers from before come back after it."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = StopRequest()
    stop.install()
    try:
        yield stop
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in previous.items():
                signal.signal(number, handler)
