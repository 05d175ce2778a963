"""`genrecal cache verify`, `repair` and `gc`: whether a cache is intact, and what to do about it."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.arguments import ArgumentParser, cache_parser
from launch.console import count_of, first_of, format_bytes, names_in_line, print_facts, print_json
from launch.logs import console_logging
from teacher_cache.config import LEVELS

if TYPE_CHECKING:
    from teacher_cache.gc import GcReport
    from teacher_cache.inspect import CacheStatus
    from teacher_cache.repair import RepairReport
    from teacher_cache.verify import VerifyReport

_BUILD = "run `genrecal cache build CONFIG`"


def verify_parser() -> ArgumentParser:
    """Return the parser of `cache verify`."""
    parser = cache_parser(
        "cache verify",
        description="Check what is stored against what was committed.",
        exit_codes="0 intact and complete, 1 files cannot be read, 3 intact so far, 4 missing, changed or extra files",
    )
    levels = "; ".join(f"{level}: {text}" for level, text in LEVELS.items())
    parser.add_argument("--level", choices=list(LEVELS), default="full", help=f"how much is read ({levels})")
    parser.add_argument("--trusted-digest", metavar="HEX", help="digest that `cache inspect` showed, kept elsewhere")
    return parser


def verify_command(argv: Sequence[str]) -> int:
    """Check a cache; exit 4 when something is damaged, extra or not trusted, 3 while shards are not built."""
    parser = verify_parser()
    options = parser.parse(argv)
    trusted = None if options.trusted_digest is None else options.trusted_digest.lower()
    if trusted is not None and not re.fullmatch("[0-9a-f]{64}", trusted):
        parser.error(f"--trusted-digest {options.trusted_digest!r}: expected 64 hexadecimal digits")
    from teacher_cache.verify import verify_cache

    with console_logging():
        report = verify_cache(options.uri, level=options.level, trusted_digest=trusted)
    if options.json:
        print_json({**dataclasses.asdict(report), "ok": report.ok})
    else:
        print_facts(_verify_facts(report))
    if not report.ok:
        return 1 if all(problem.kind == "unreadable" for problem in report.problems) else 4
    return 3 if report.missing_shards or report.unpublished else 0


def repair_parser() -> ArgumentParser:
    """Return the parser of `cache repair`."""
    parser = cache_parser(
        "cache repair",
        description="Verify every byte, then give up the shards that are damaged, so that the next build computes "
        "them again and nothing else; write damaged snapshots again.",
        exit_codes="0 nothing is left to do, 1 files cannot be read, 3 run the build now, 4 beyond repair",
    )
    parser.add_argument(
        "--withdraw",
        action="append",
        metavar="SHARD",
        help="verify nothing, but give up this shard, damaged or not; may be given several times",
    )
    return parser


def repair_command(argv: Sequence[str]) -> int:
    """Repair a cache; exit 3 when the build has to compute shards again, 4 when that is not enough."""
    options = repair_parser().parse(argv)
    from teacher_cache.inspect import cache_status
    from teacher_cache.repair import repair_cache, withdraw_shards

    with console_logging():
        report = withdraw_shards(options.uri, options.withdraw) if options.withdraw else repair_cache(options.uri)
    status = None if report.beyond_repair else cache_status(options.uri)
    if options.json:
        print_json(report)
    else:
        print_facts(_repair_facts(report, status))
    if status is None:
        return 4
    return 0 if status.published else 3


def gc_parser() -> ArgumentParser:
    """Return the parser of `cache gc`."""
    parser = cache_parser(
        "cache gc",
        description="Remove what killed or beaten builds left; safe while builders and readers are at work.",
        exit_codes="0 done, 3 tier Q is to go from an incomplete cache, 4 what decides is damaged",
    )
    parser.add_argument(
        "--drop-question-rows",
        action="store_true",
        help="also remove tier Q for good, which only the regularization loss of align needs",
    )
    return parser


def gc_command(argv: Sequence[str]) -> int:
    """Remove what no reader will ask for, and on request tier Q."""
    options = gc_parser().parse(argv)
    from teacher_cache.gc import collect_garbage

    with console_logging():
        report = collect_garbage(options.uri, drop_question_rows=options.drop_question_rows)
    if options.json:
        print_json(report)
    else:
        print_facts(_gc_facts(report))
    return 0


def _verify_facts(report: "VerifyReport") -> dict[str, str | Sequence[str]]:
    result = "intact"
    if report.problems:
        result = f"NOT intact: {count_of(len(report.problems), 'problem')}"
    elif report.missing_shards:
        result = f"intact so far, {count_of(len(report.missing_shards), 'shard')} to build"
    elif report.unpublished:
        result = "intact, but no snapshot is of the latest shards"
    return {
        "cache": report.uri,
        "result": result,
        "level": f"{report.level}: {LEVELS[report.level]}",
        "files": f"{report.files:,}",
        "samples": f"{report.samples:,} intact",
        "missing": names_in_line(report.missing_shards),
        "problems": first_of([f"{problem.kind}: {problem.message}" for problem in report.problems]),
        "next": _steps_after_verify(report),
    }


def _steps_after_verify(report: "VerifyReport") -> list[str]:
    kinds = {problem.kind for problem in report.problems}
    uri = shlex.quote(report.uri)
    if "unreadable" in kinds:
        return ["mend the store, then verify again: what cannot be read may be intact"]
    steps = []
    if "untrusted" in kinds:
        steps.append("find out who changed the cache; use a copy that has the trusted digest")
    if kinds & {"missing", "changed"}:
        steps.append(f"run `genrecal cache repair {uri}`, then `genrecal cache build CONFIG`")
    if "extra" in kinds:
        steps.append(f"run `genrecal cache gc {uri}`, then remove by hand what is still extra")
    if not report.problems and (report.missing_shards or report.unpublished):
        steps.append(_BUILD)
    return steps


def _repair_facts(report: "RepairReport", status: "CacheStatus | None") -> dict[str, str | Sequence[str]]:
    facts: dict[str, str | Sequence[str]] = {
        "cache": report.uri,
        "withdrawn": names_in_line(report.withdrawn_shards),
        "removed": first_of(report.removed),
        "rewritten": "the latest snapshot and its index" if report.rewritten else "",
    }
    changed = any(facts[name] for name in ("withdrawn", "removed", "rewritten"))
    if status is None:
        facts["beyond"] = first_of([problem.message for problem in report.beyond_repair])
        facts["next"] = "restore these files from a copy, or build the cache anew at another place"
    elif not status.published:
        facts["next"] = f"{_BUILD}: it computes {count_of(len(status.missing_shards), 'shard')} and nothing else"
    elif not changed:
        facts["result"] = "nothing to repair"
    return facts


def _gc_facts(report: "GcReport") -> dict[str, str | Sequence[str]]:
    facts: dict[str, str | Sequence[str]] = {
        "cache": report.uri,
        "freed": f"{format_bytes(report.removed_bytes)} in {count_of(len(report.removed), 'item')}",
        "removed": first_of(report.removed),
        "kept": first_of([f"{name}: a builder may be at work on it" for name in report.pending]),
    }
    if report.pending:
        facts["next"] = f"{_BUILD}, which also removes these attempts when their shards are committed"
    return facts
