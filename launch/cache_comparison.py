"""`genrecal cache diff` and `find`: what caches have in common with each other, and with a run."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import ArgumentParser
from launch.console import count_of, first_of, format_bytes, print_facts, print_json, print_table
from launch.run_config import RunConfig, parse_run
from teacher_cache.errors import ConfigError

if TYPE_CHECKING:
    from teacher_cache.inspect import CacheDifference, CacheStatus, FoundCache


def diff_parser() -> ArgumentParser:
    """Return the parser of `cache diff`."""
    parser = ArgumentParser(
        "cache diff",
        description="Show what two caches do not have in common: identity, samples and tiers. Reads no tensor.",
        exit_codes="0 nothing, 3 nothing, but one of them is not complete, 4 something differs",
    )
    parser.add_argument("left", metavar="URI", help="where one cache lies")
    parser.add_argument("right", metavar="URI", help="where the other one lies")
    parser.add_json()
    return parser


def diff_command(argv: Sequence[str]) -> int:
    """Print what differs between two caches; exit 4 when something does, 3 when one of them is not complete."""
    options = diff_parser().parse(argv)
    from teacher_cache.inspect import cache_status, compare_caches

    difference = compare_caches(options.left, options.right)
    left, right = cache_status(options.left), cache_status(options.right)
    complete = left.complete and right.complete
    tiers = [tier for tier, size in left.tier_bytes.items() if complete and bool(size) != bool(right.tier_bytes[tier])]
    same = difference.same and not tiers
    if options.json:
        sides = {"left": dataclasses.asdict(left), "right": dataclasses.asdict(right)}
        print_json({**dataclasses.asdict(difference), "same": same, "tiers_on_one_side": tiers, **sides})
    else:
        _print_sides(left, right)
        print()
        print_facts(_difference_facts(difference, tiers=tiers, complete=complete))
    if not same:
        return 4
    return 0 if complete else 3


def find_parser() -> ArgumentParser:
    """Return the parser of `cache find`; what it does not know overrides fields of the run file."""
    parser = ArgumentParser(
        "cache find",
        description="Name the caches under a folder that serve a run file and, for the others, what differs. Hashes "
        "the teacher's checkpoint and the data, as a build does.",
        exit_codes="0 a complete cache serves the run, 3 one will when it is complete, 4 none does",
    )
    parser.add_argument("folder", metavar="FOLDER", help="local folder that is searched, with the folders below it")
    parser.add_config()
    parser.add_json("print one record per cache as JSON")
    return parser


def find_command(argv: Sequence[str]) -> int:
    """Print which caches under a folder serve a run file; exit 4 when none does."""
    parser = find_parser()
    folder = Path(parser.parse_known_args(argv)[0].folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no local folder; give the folder first: genrecal cache find FOLDER CONFIG")
    options, config = parse_run(parser, argv)
    from teacher_cache.build_plan import cache_identity
    from teacher_cache.inspect import find_caches
    from teacher_cache.samples import read_samples

    digests = {sample.sample_id: sample.digest for sample in read_samples(config.cache.data).samples}
    found = find_caches(folder, identity=cache_identity(config.cache), digests=digests)
    if options.json:
        print_json([dataclasses.asdict(cache) for cache in found])
    else:
        _print_found(found, folder=folder, config=config, run_file=options.config)
    serving = [cache for cache in found if cache.serves]
    if not serving:
        return 4
    return 0 if any(cache.complete for cache in serving) else 3


def _print_sides(left: "CacheStatus", right: "CacheStatus") -> None:
    rows = ["", "cache", "shards", "samples", "skipped", *(f"tier {tier}" for tier in left.tier_bytes)]
    print_table(list(zip(rows, _column("left", left), _column("right", right), strict=True)))


def _column(title: str, side: "CacheStatus") -> list[str]:
    return [
        title,
        side.uri,
        f"{side.committed_shards:,} of {side.planned_shards:,}",
        f"{side.stored_samples:,}",
        f"{side.skipped_samples:,}",
        *(format_bytes(size) for size in side.tier_bytes.values()),
    ]


def _difference_facts(
    difference: "CacheDifference", *, tiers: Sequence[str], complete: bool
) -> dict[str, str | Sequence[str]]:
    names = {"only left": difference.only_left, "only right": difference.only_right, "changed": difference.changed}
    facts: dict[str, str | Sequence[str]] = {"identity": first_of(difference.identity) or "the same"}
    facts |= {f"samples {name}": first_of(sample_ids) for name, sample_ids in names.items()}
    if tiers:
        facts["tiers"] = f"only one side stores {', '.join(tiers)}"
    if difference.same and not tiers:
        facts["samples"] = f"the same {difference.samples_both:,}"
    if not complete:
        facts["next"] = "complete them first: run `genrecal cache build CONFIG`, then compare again"
    return facts


def _print_found(found: Sequence["FoundCache"], *, folder: Path, config: RunConfig, run_file: str) -> None:
    if not found:
        print(f"no cache under {folder}; `genrecal cache build {shlex.quote(run_file)}` makes {config.cache.uri}")
    dropped = config.cache.targets.question_fraction > 0
    for cache in found:
        print(f"{cache.uri}  {_verdict(cache)}")
        reasons = [f"differs in {line}" for line in cache.differences]
        if cache.complete and cache.serves and dropped and not cache.tier_bytes["Q"]:
            reasons.append("its tier Q was dropped: align needs `regularization_weight: 0`")
        for line in (*first_of(reasons), *_advice(cache, run_file=run_file)):
            print(f"    {line}")


def _verdict(cache: "FoundCache") -> str:
    if cache.serves:
        return f"serves: {'complete' if cache.complete else 'not complete yet'}, {count_of(cache.samples, 'sample')}"
    if cache.differences:
        return "does not serve"
    parts = [f"lacks {count_of(cache.missing_samples, 'sample')} of the run"] if cache.missing_samples else []
    if cache.changed_samples:
        parts.append(f"holds {count_of(cache.changed_samples, 'sample')} with another text or other images")
    return f"does not serve: {' and '.join(parts)}"


def _advice(cache: "FoundCache", *, run_file: str) -> list[str]:
    uri = shlex.quote(cache.uri)
    build = f"`genrecal cache build {shlex.quote(run_file)} --cache.uri {uri}"
    if cache.serves and cache.complete:
        return [f"reuse it: set `cache.uri: {cache.uri}`"]
    if cache.serves:
        return [f"complete it: {build}`"]
    if not cache.differences and not cache.changed_samples:
        return [f"add the samples to it: {build} --cache.build.extend`"]
    return []
