"""`genrecal config show`, `schema` and `example`: the run file as it is taken, and what may be in one."""

import json
from collections.abc import Sequence

import yaml

from launch.arguments import ArgumentParser, run_parser
from launch.run_config import RunConfig, parse_run

DONE = "0 done, 2 wrong usage or run file"


def show_parser() -> ArgumentParser:
    """Return the parser of `config show`; what it does not know overrides fields of the run file."""
    return run_parser(
        "config show",
        description="Print a run file with all defaults filled in and all students spelled out: what a run will take.",
        exit_codes=DONE,
        example="run.yaml --train.align.max-steps 100",
    )


def show_command(argv: Sequence[str]) -> int:
    """Print a run file with all defaults filled in."""
    _, config = parse_run(show_parser(), argv)
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
    return 0


def schema_parser() -> ArgumentParser:
    """Return the parser of `config schema`."""
    return ArgumentParser(
        "config schema", description="Print the JSON schema of run files, for editors.", exit_codes=DONE
    )


def schema_command(argv: Sequence[str]) -> int:
    """Print the JSON schema of run files."""
    schema_parser().parse(argv)
    print(json.dumps(RunConfig.model_json_schema(), indent=2))
    return 0


def example_parser() -> ArgumentParser:
    """Return the parser of `config example`."""
    return ArgumentParser(
        "config example",
        description="Print a run file with every field at its default, and what each means.",
        exit_codes=DONE,
    )


def example_command(argv: Sequence[str]) -> int:
    """Print a run file with every field."""
    example_parser().parse(argv)
    from launch.field_comments import all_fields

    print(all_fields(), end="")
    return 0
