"""How a plan is shown: aligned lines for people with the assumptions underneath, and one record for machines."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from launch.cache_plan import CachePlan, Storage
from launch.console import count_of, first_of, format_bytes, names_in_line, print_facts, print_table
from launch.plan_cost import FLOPS_PER_PARAMETER, StageReading, StudentCost
from teacher_cache.cache_size import ZSTD_RATIOS
from teacher_cache.schema import TIERS


def as_record(plan: CachePlan) -> dict[str, Any]:
    """Return all figures of a plan by name; sizes in bytes."""
    size, counts, speed, pays = plan.storage.size, plan.statistics.counts, plan.speed, plan.break_even
    return {
        "uri": plan.config.cache.uri,
        "rows": plan.statistics.rows,
        "sampled_rows": plan.statistics.sampled_rows,
        "samples": plan.samples,
        "skipped": plan.skipped,
        "skipped_in_sample": [dataclasses.asdict(sample) for sample in plan.statistics.skipped],
        "tokens": plan.tokens,
        "tokens_relative_error": plan.statistics.tokens_error,
        "question_tokens": plan.tokens - round(counts.answer_tokens),
        "answer_tokens": round(counts.answer_tokens),
        "image_tokens": round(counts.image_tokens),
        **_storage_record(plan.storage),
        "bytes_per_shard": _bytes_per_shard(plan),
        "shards": size.shards,
        "files": size.files,
        "teacher_head_bytes": size.head_bytes,
        "document_bytes": size.document_bytes,
        "alternatives": [_storage_record(storage) for storage in plan.alternatives],
        "hidden_size": plan.teacher.hidden_size,
        "vocab_size": plan.teacher.vocab_size,
        "parameters": plan.teacher.parameters,
        "flops_per_token": speed.flops_per_token,
        "tokens_per_s_per_replica": speed.tokens_per_s_per_replica,
        "gpus": speed.gpus_per_replica * speed.replicas,
        "gpu_hours": speed.gpu_hours(counts.tokens),
        "wall_hours": speed.wall_hours(counts.tokens),
        "reading": [dataclasses.asdict(reading) for reading in plan.readings],
        "cache_gpu_hours": pays.cache_gpu_hours,
        "by_student": [dataclasses.asdict(cost) for cost in pays.by_student],
        "live_gpu_hours_per_student": pays.live_gpu_hours_per_student,
        "read_gpu_hours_per_student": pays.read_gpu_hours_per_student,
        "break_even_students": pays.students,
        "break_even_epochs": pays.epochs,
        "assumptions": assumptions(plan),
    }


def print_plan(plan: CachePlan) -> None:
    """Print a plan for people."""
    print_facts(_data_facts(plan))
    print()
    columns = ["stored", *(f"tier {tier}" for tier in TIERS), "head", "other", "total"]
    print_table([columns, *(_row(storage, chosen=storage is plan.storage) for storage in _storages(plan))])
    print()
    print_facts(_cost_facts(plan))
    print()
    print_facts({"assumes": assumptions(plan)})


def assumptions(plan: CachePlan) -> list[str]:
    """Return what the figures of a plan take for granted, one line each."""
    settings, config = plan.config.plan, plan.config.cache
    ratios = {name: ZSTD_RATIOS[name] for name in (config.teacher.dtype, "float8_e4m3fn", "int32")}
    speed = (
        f"measured: {plan.speed.tokens_per_s_per_replica:,.0f} tokens/s per replica"
        if plan.speed.is_measured
        else f"{settings.utilisation:.0%} of {settings.gpu_peak_tflop_per_s:g} TFLOP/s per GPU, "
        f"{FLOPS_PER_PARAMETER} FLOPs per parameter and token"
    ).replace("%", " %")
    storage = (
        f"storage at {settings.storage_gpu_hours_per_tb:g} GPU-hours per TB"
        if settings.storage_gpu_hours_per_tb
        else "storage that costs no GPU-hours"
    )
    return [
        _origin(plan),
        speed,
        "no time for starting replicas and decoding images",
        "zstd by " + ", ".join(f"{ratio:g} ({name})" for name, ratio in ratios.items()),
        "a live teacher of the same speed: one forward per sample in each step of a stage that reads targets",
        f"reading at {settings.read_gb_per_s_per_process:g} GB/s per training process, hidden by nothing; {storage}",
    ]


def _origin(plan: CachePlan) -> str:
    statistics = plan.statistics
    if not statistics.sampled_rows:
        return "the statistics under `plan` in the run file"
    if statistics.sampled_rows == statistics.rows:
        return f"nothing about the data: {count_of(statistics.rows, 'row')} tokenised, all there are"
    return (
        f"{statistics.sampled_rows:,} of {statistics.rows:,} rows tokenised, evenly spread: tokens within "
        f"{200 * statistics.tokens_error:.2g} % (two standard errors)"
    )


def _data_facts(plan: CachePlan) -> dict[str, str | Sequence[str]]:
    counts, size, allowed = plan.statistics.counts, plan.storage.size, plan.config.cache.data.max_skipped_samples
    facts: dict[str, str | Sequence[str]] = {
        "cache": plan.config.cache.uri,
        "samples": f"{plan.samples:,} stored, {plan.skipped:,} skipped",
        "tokens": f"{plan.tokens:,}: {plan.tokens - round(counts.answer_tokens):,} question "
        f"({round(counts.image_tokens):,} image), {round(counts.answer_tokens):,} answer",
        "shards": f"{size.shards:,} of about {format_bytes(_bytes_per_shard(plan))}, {size.files:,} files",
    }
    if plan.statistics.skipped:
        facts["skipped"] = first_of([f"{bad.sample_id}: {bad.reason}" for bad in plan.statistics.skipped], shown=5)
    if plan.skipped > allowed:
        facts["next"] = (
            f"`cache.data.max_skipped_samples` allows {allowed:,}: mend the data or raise it, or the build will stop"
        )
    return facts


def _cost_facts(plan: CachePlan) -> dict[str, str | Sequence[str]]:
    speed, pays, tokens = plan.speed, plan.break_even, plan.statistics.counts.tokens
    gpus = speed.gpus_per_replica * speed.replicas
    work = "" if speed.flops_per_token is None else f", {speed.flops_per_token / 1e9:,.3g} GFLOP per token"
    parameters = "" if plan.teacher.parameters is None else f"{plan.teacher.parameters:,} parameters{work}, "
    return {
        "teacher": f"{parameters}{_rounded(speed.tokens_per_s_per_replica)} tokens/s per replica",
        "build": f"{_rounded(speed.gpu_hours(tokens))} GPU-hours: {_rounded(speed.wall_hours(tokens))} hours on "
        f"{count_of(gpus, 'GPU')}",
        "reading": [_reading(reading, of_several=len(plan.config.students) > 1) for reading in plan.readings],
        "students": [_student(cost) for cost in pays.by_student] if len(plan.config.students) > 1 else [],
        "per student": f"{_rounded(pays.live_gpu_hours_per_student)} GPU-hours with a live teacher, "
        f"{_rounded(pays.read_gpu_hours_per_student)} to read the cache instead",
        "break-even": _break_even(plan),
    }


def _reading(reading: StageReading, *, of_several: bool) -> str:
    speed = (
        f"{format_bytes(reading.bytes_per_s_per_1000_tokens_per_s)}/s for each 1,000 teacher tokens/s"
        if reading.bytes_per_s is None
        else f"{format_bytes(reading.bytes_per_s)}/s"
    )
    who = f"{reading.method}: {names_in_line(reading.students)}" if of_several else reading.method
    return (
        f"{reading.stage} ({who}): {format_bytes(reading.bytes_per_sample)} per sample of tier "
        f"{', '.join(reading.tiers)}; {format_bytes(reading.bytes_per_step)} per step; {speed}"
    )


def _student(cost: StudentCost) -> str:
    return (
        f"{cost.name}: {cost.samples:,} samples, {_rounded(cost.live_gpu_hours)} GPU-hours with a live teacher, "
        f"{_rounded(cost.read_gpu_hours)} to read the cache instead"
    )


def _break_even(plan: CachePlan) -> str:
    pays = plan.break_even
    if not plan.readings:
        return "none: no stage of these students needs the teacher"
    if pays.students is None or pays.epochs is None:
        return "never: reading the cache takes longer than running the teacher"
    return f"{pays.students:.3g} students, or {pays.epochs:.3g} epochs of one"


def _row(storage: Storage, *, chosen: bool) -> list[str]:
    size = storage.size
    sizes = [*(size.tier_bytes[tier] for tier in TIERS), size.head_bytes, size.document_bytes, size.total_bytes]
    name = f"{storage.codec}, {storage.compression}" + (" (this run)" if chosen else "")
    return [name, *map(format_bytes, sizes)]


def _storages(plan: CachePlan) -> list[Storage]:
    return [plan.storage, *plan.alternatives]


def _storage_record(storage: Storage) -> dict[str, Any]:
    return {
        "codec": storage.codec,
        "compression": storage.compression,
        "bytes_by_tier": storage.size.tier_bytes,
        "total_bytes": storage.size.total_bytes,
    }


def _bytes_per_shard(plan: CachePlan) -> int:
    size = plan.storage.size
    return round(sum(size.tier_bytes.values()) / size.shards)


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
