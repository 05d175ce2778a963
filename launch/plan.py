"""`genrecal cache plan`: what a cache will hold, take and cost, before anything runs."""

from collections.abc import Sequence

from launch.arguments import ArgumentParser, run_parser
from launch.console import print_json
from launch.run_config import parse_run


def plan_parser() -> ArgumentParser:
    """Return the parser of `cache plan`; what it does not know overrides fields of the run file."""
    return run_parser(
        "cache plan",
        description="Tell what the cache of a run file will take and cost, from a part of its data and the teacher's "
        "configuration. Writes nothing, fetches nothing, loads no weights.",
        exit_codes="0 done, 1 no row is a usable sample, 2 something is missing that the run file can state instead",
        json="print everything as JSON",
    )


def plan_command(argv: Sequence[str]) -> int:
    """Print sizes, GPU-hours and the break-even of the cache of a run file."""
    options, config = parse_run(plan_parser(), argv)
    from launch.cache_plan import make_plan
    from launch.plan_text import as_record, print_plan

    plan = make_plan(config)
    if options.json:
        print_json(as_record(plan))
    else:
        print_plan(plan)
    return 0
