"""`genrecal doctor`: whether this machine, and a run file if one is given, are fit to run; nothing is changed."""

import dataclasses
import os
from collections.abc import Iterator, Sequence

from launch.arguments import ArgumentParser
from launch.console import print_json, print_table
from launch.doctor.findings import Finding, has_problem
from launch.doctor.machine import check_machine
from launch.doctor.ray_settings import check_ray
from launch.doctor.versions import check_requirements, check_versions
from launch.run_config import RunConfig, parse_run


def doctor_parser() -> ArgumentParser:
    """Return the parser of `doctor`; what it does not know overrides fields of the run file."""
    parser = ArgumentParser(
        "doctor",
        description="Check versions, GPUs, toolchain, Ray, permissions and, with a run file, its store, data, models "
        "and disk space. Changes nothing and asks no server but those that are named.",
        exit_codes="0 nothing is wrong or there are warnings only, 1 something is wrong, 2 wrong usage",
    )
    parser.add_config(optional=True)
    parser.add_json("print every finding as JSON")
    return parser


def doctor_command(argv: Sequence[str]) -> int:
    """Print what is wrong with this machine and how to mend it; exit 1 when something is."""
    parser = doctor_parser()
    if parser.parse_known_args(argv)[0].config is None:
        options, config = parser.parse(argv), None
    else:
        options, config = parse_run(parser, argv)
    findings = list(examine(config))
    if options.json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        print_table([_row(finding) for finding in findings])
    return 1 if has_problem(findings) else 0


def examine(config: RunConfig | None) -> Iterator[Finding]:
    """Yield all findings; those about a run file only where there is one."""
    yield from check_versions()
    yield check_requirements()
    yield from check_machine()
    yield from check_ray(os.environ, dashboard=None if config is None else config.cluster.ray.address)
    if config is not None:
        from launch.doctor.run_inputs import check_run

        yield from check_run(config)


def _row(finding: Finding) -> list[str]:
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    status = finding.status.upper() if finding.status == "problem" else finding.status
    return [status, finding.check, f"{finding.found}{remedy}"]
