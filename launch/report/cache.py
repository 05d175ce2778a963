"""What the report says about the teacher cache, and where everything came from."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from launch.console import format_bytes
from launch.report.data import RunData
from launch.report.figures import sizes_figure


def cache_section(run: RunData) -> dict[str, Any] | None:
    """Return the figure of sizes and the sentences about the cache; None without a complete one."""
    cache = run.cache
    if cache is None:
        return None
    tiers = {"A": "tier A: answer rows", "Q": "tier Q: question rows", "L": "tier L: top-k"}
    sizes = {name: cache.tier_bytes[tier] for tier, name in tiers.items() if cache.tier_bytes.get(tier)}
    sizes["full logits"] = cache.full_logits_bytes
    ratios = {name: cache.full_logits_bytes / size for name, size in sizes.items() if size}
    labels = {name: f"{format_bytes(size)}  ({_times(ratios[name])})" for name, size in sizes.items()}
    labels["full logits"] = format_bytes(cache.full_logits_bytes)
    return {"svg": sizes_figure(sizes, labels=labels), "sentences": _cache_sentences(run)}


def _cache_sentences(run: RunData) -> list[str]:
    assert run.cache is not None
    sentences = [
        f"{run.cache.num_samples:,} samples with {run.cache.answer_tokens:,} answer tokens over a vocabulary of "
        f"{run.cache.vocab_size:,}, computed once and read by every student, stage and epoch."
    ]
    built = run.timings.get("cache")
    users = [student for student in run.students if f"train {student}" in run.timings]
    if built is not None and users:
        sentences.append(
            f"The build took {built:.1f} s. {users[0]} trained from it in {run.timings[f'train {users[0]}']:.1f} s."
        )
    for student in users[1:] if built is not None else ():
        seconds = run.timings[f"train {student}"]
        sentences.append(
            f"{student} used the same cache: {seconds:.1f} s of training, no teacher, {built:.1f} s of its time saved."
        )
    return sentences


def _times(ratio: float) -> str:
    return f"{ratio:.3g}x smaller than full logits" if ratio >= 1 else f"{1 / ratio:.3g}x larger than full logits"


def provenance_facts(run: RunData) -> dict[str, str]:
    """Return what the cache and the results say about their origin, flat."""
    facts: dict[str, str] = {}
    if run.cache is not None:
        facts["cache fingerprint"] = run.cache.fingerprint
        facts |= {f"cache {key}": value for key, value in _flatten(run.cache.provenance)}
    extra = {key: value for key, value in run.results.items() if key != "students" and not key.startswith("teacher_")}
    return facts | {f"results {key}": value for key, value in _flatten(extra)}


def _flatten(values: Mapping[str, Any], *, path: str = "") -> Iterable[tuple[str, str]]:
    """Yield dotted names and texts; a list of records becomes one line of distinct values per key."""
    for key, value in values.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, path=f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            yield name, f"{len(value)}"
            for inner in sorted({inner for item in value for inner in item}):
                distinct = sorted({_text(item.get(inner)) for item in value})
                yield (
                    f"{name}.{inner}",
                    ", ".join(distinct[:8]) + (f", … ({len(distinct)})" if len(distinct) > 8 else ""),
                )
        else:
            yield name, _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
