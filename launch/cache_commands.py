"""`genrecal cache answers`, `build`, `status` and `inspect`."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from launch.arguments import ArgumentParser, cache_parser, run_parser
from launch.clusters.marks import mark_cache
from launch.console import count_of, format_tiers, names_in_line, print_facts, print_json
from launch.logs import setup_logging
from launch.provenance import cache_output, recorded
from launch.run_config import parse_run
from teacher_cache.errors import CacheIncomplete, ConfigError

if TYPE_CHECKING:
    from teacher_cache.answers import AnswersSummary
    from teacher_cache.build_job import BuildSummary
    from teacher_cache.inspect import CacheStatus

Summary = TypeVar("Summary")
_SHOWN_VALUES = 3


def answers_parser() -> ArgumentParser:
    """Return the parser of `cache answers`; what it does not know overrides fields of the run file."""
    return run_parser(
        "cache answers",
        description="Have the teacher replace the very short answers of a run file's data, before the cache is built.",
        exit_codes="0 complete, 3 parts are missing (run it again), 4 the file that is there holds other content",
        json="print the summary as JSON",
    )


def answers_command(argv: Sequence[str]) -> int:
    """Write the data file of a run file's cache from the one that has the original answers."""
    options, config = parse_run(answers_parser(), argv)
    if config.answers is None:
        raise ConfigError(f"{options.config} has no section `answers`, which says whose answers are to be replaced")
    log_dir = Path(config.output_dir) / "logs"
    setup_logging(log_dir / "cache-answers.log")
    from teacher_cache.answers import write_answers

    with recorded(lambda: [Path(config.cache.data.path)], config=config) as recording:
        summary = write_answers(config.cache, answers=config.answers, log_dir=log_dir)
        recording.counts = summary.parts_written > 0
    return _print_summary(summary, _answers_facts, as_json=options.json)


def build_parser() -> ArgumentParser:
    """Return the parser of `cache build`; what it does not know overrides fields of the run file."""
    return run_parser(
        "cache build",
        description="Run the Ray job that fills the cache of a run file, or what is left of it.",
        exit_codes="0 complete, 3 shards are missing (run it again), 4 the cache that is there holds other content",
        json="print the summary as JSON",
    )


def build_command(argv: Sequence[str]) -> int:
    """Run or resume the Ray job that fills the cache of a run file."""
    options, config = parse_run(build_parser(), argv)
    log_dir = Path(config.output_dir) / "logs"
    setup_logging(log_dir / "cache-build.log")
    from teacher_cache.build import build_cache

    with recorded(lambda: [cache_output(config)], config=config) as recording:
        summary = build_cache(config.cache, log_dir=log_dir)
        recording.counts = summary.shards_built > 0
    mark_cache(config)
    return _print_summary(summary, _build_facts, as_json=options.json)


def _print_summary(summary: Summary, facts: Callable[[Summary], dict[str, str]], *, as_json: bool) -> int:
    if as_json:
        print_json(summary)
    else:
        print_facts(facts(summary))
    return 0


def status_parser() -> ArgumentParser:
    """Return the parser of `cache status`."""
    return cache_parser(
        "cache status",
        description="Show how far a cache is, from its commit records.",
        exit_codes="0 complete, 3 incomplete, 4 what decides is damaged",
    )


def status_command(argv: Sequence[str]) -> int:
    """Print what is committed; exit 3 until the cache is complete and a snapshot says so."""
    options = status_parser().parse(argv)
    from teacher_cache.inspect import cache_status

    status = cache_status(options.uri)
    if options.json:
        print_json({**dataclasses.asdict(status), "complete": status.complete})
    else:
        print_facts(_status_facts(status))
    return 0 if status.published else 3


def inspect_parser() -> ArgumentParser:
    """Return the parser of `cache inspect`."""
    parser = cache_parser(
        "cache inspect",
        description="Show what a cache holds: its identity, its origin and the digest to trust it by; or one sample.",
        exit_codes="0 done, 1 there is no such sample, 4 what was read is damaged",
    )
    parser.add_argument("--sample", metavar="ID", help="read the targets of this sample and describe them")
    return parser


def inspect_command(argv: Sequence[str]) -> int:
    """Print snapshot, identity and provenance, or the shapes of one sample's targets."""
    options = inspect_parser().parse(argv)
    from teacher_cache.reader import open_cache

    try:
        cache = open_cache(options.uri)
    except CacheIncomplete:
        cache = open_cache(options.uri, allow_incomplete=True)
    if options.sample is None:
        from teacher_cache.verify import snapshot_digest

        record: dict[str, Any] = {
            "uri": options.uri,
            "snapshot": cache.snapshot,
            "snapshot_digest": None if cache.snapshot is None else snapshot_digest(options.uri),
            "fingerprint": cache.fingerprint,
            "samples": len(cache),
            "tier_bytes": cache.tier_bytes(),
            "identity": cache.identity,
            "provenance": cache.provenance,
        }
        facts = _cache_facts(record)
    else:
        (targets,) = cache.read([options.sample])
        record = {field.name: _described(getattr(targets, field.name)) for field in dataclasses.fields(targets)}
        facts = {name: _as_text(value) for name, value in record.items()}
    if options.json:
        print_json(record)
    else:
        print_facts(facts)
    return 0


def _answers_facts(summary: "AnswersSummary") -> dict[str, str]:
    counts = summary.counts
    skipped = f", {summary.skipped[0].sample_id} first" if summary.skipped else ""
    return {
        "data": summary.path,
        "answers": f"{counts.replaced:,} replaced, {counts.unverified:,} not verified and kept, {counts.kept:,} kept",
        "samples": f"{counts.samples:,} written, {len(summary.skipped):,} skipped{skipped}",
        "parts": f"{summary.parts:,}, of which this run wrote {summary.parts_written:,}",
        "generated": f"{count_of(summary.tokens, 'token')} in {summary.seconds:,.0f} s",
    }


def _build_facts(summary: "BuildSummary") -> dict[str, str]:
    skipped = f", {summary.skipped[0].sample_id} first" if summary.skipped else ""
    speed = f" ({summary.tokens_per_s:,.0f} per second)" if summary.tokens else ""
    return {
        "cache": summary.uri,
        "state": "complete",
        "shards": f"{summary.shards:,}, of which this run built {summary.shards_built:,}",
        "samples": f"{summary.samples:,} stored, {len(summary.skipped):,} skipped{skipped}",
        "computed": f"{count_of(summary.tokens, 'token')} in {summary.seconds:,.0f} s{speed}",
        "engine": f"{summary.engine} {summary.engine_version}",
    }


def _status_facts(status: "CacheStatus") -> dict[str, str]:
    state, step = "complete", ""
    if not status.complete:
        state = f"incomplete: {count_of(len(status.missing_shards), 'shard')} to build"
        step = "run `genrecal cache build CONFIG`"
    elif not status.published:
        older = "none yet" if status.snapshot is None else "the latest is of an older state"
        state = f"all shards are committed, but there is no snapshot of them ({older})"
        step = "run `genrecal cache build CONFIG`, which writes the snapshot"
    return {
        "cache": status.uri,
        "state": state,
        "snapshot": "none" if status.snapshot is None else str(status.snapshot),
        "shards": f"{status.committed_shards:,} of {status.planned_shards:,} committed",
        "samples": f"{status.stored_samples:,} stored, {status.skipped_samples:,} skipped, of "
        f"{status.planned_samples:,} planned",
        "stored": format_tiers(status.tier_bytes),
        "missing": names_in_line(status.missing_shards),
        "withdrawn": names_in_line(status.withdrawn_shards),
        "next": step,
    }


def _cache_facts(record: Mapping[str, Any]) -> dict[str, str]:
    provenance = {name: value for name, value in record["provenance"].items() if name != "shards"}
    shards = record["provenance"]["shards"]
    snapshot = "none: the cache is not complete" if record["snapshot"] is None else str(record["snapshot"])
    return {
        "cache": record["uri"],
        "snapshot": snapshot,
        "digest": record["snapshot_digest"] or "",
        "fingerprint": record["fingerprint"],
        "samples": f"{record['samples']:,} in {count_of(len(shards), 'shard')}",
        "stored": format_tiers(record["tier_bytes"]),
        **{f"identity {name}": text for name, text in _flat(record["identity"])},
        **{f"origin {name}": text for name, text in _flat(provenance)},
        **{f"shards {name}": text for name, text in _shard_facts(shards)},
    }


def _shard_facts(shards: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the distinct values over all shards of whatever they record."""
    values: dict[str, dict[str, None]] = {}
    for shard in shards:
        for name, text in _flat({name: value for name, value in shard.items() if name != "shard_id"}):
            values.setdefault(name, {})[text] = None
    for name, texts in values.items():
        more = len(texts) - _SHOWN_VALUES
        yield name, ", ".join([*texts][:_SHOWN_VALUES]) + (f" and {more:,} other values" if more > 0 else "")


def _flat(values: Mapping[str, Any], *, path: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, path=f"{path}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{path}{name}", count_of(len(value), "entry").replace("entrys", "entries")
        else:
            yield f"{path}{name}", value if isinstance(value, str) else json.dumps(value)


def _described(value: object) -> object:
    import torch

    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return value


def _as_text(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['dtype']} {' x '.join(map(str, value['shape']))}"
    return "not stored" if value is None else str(value)
