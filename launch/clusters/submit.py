"""`genrecal submit slurm`, `ray` and `kuberay`: hand the jobs of a run to a cluster."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import get_args

from launch.arguments import ArgumentParser
from launch.clusters.jobs import Kind
from launch.clusters.submission import Outcome, outcome_rows, write_frozen_run_file
from launch.console import print_json, print_table
from launch.run_config import parse_run

EXIT_CODES = "0 submitted or complete already, 1 the scheduler refused, 2 usage or config"


def slurm_parser() -> ArgumentParser:
    """Return the parser of `submit slurm`."""
    return _parser("slurm", description="Write batch scripts for the jobs of a run and submit them to Slurm.")


def slurm_command(argv: Sequence[str]) -> int:
    """Submit the cache job, a training array and the report, each after the one before."""
    options, config = parse_run(slurm_parser(), argv)
    from launch.clusters.slurm_submit import describe_slurm, submit_slurm

    if options.plan:
        print(describe_slurm(config), end="")
        return 0
    write_frozen_run_file(config)
    return _print_outcomes(submit_slurm(config), as_json=options.json)


def ray_parser() -> ArgumentParser:
    """Return the parser of `submit ray`."""
    parser = _parser("ray", description="Submit the jobs of a run to a Ray cluster that runs already.")
    parser.add_argument("--insecure", action="store_true", help="accept a cluster that asks for no token")
    return parser


def ray_command(argv: Sequence[str]) -> int:
    """Submit the cache job, a training job per student and the report; each waits for those before it."""
    allowed = ["--cache.build.insecure-ray"] if "--insecure" in argv else []
    options, config = parse_run(ray_parser(), [*argv, *allowed])
    from launch.clusters.ray_submit import describe_ray, submit_ray

    if options.plan:
        print(describe_ray(config), end="")
        return 0
    write_frozen_run_file(config)
    return _print_outcomes(submit_ray(config), as_json=options.json)


def kuberay_parser() -> ArgumentParser:
    """Return the parser of `submit kuberay`."""
    parser = _parser("kuberay", description="Apply manifests for the jobs of a run to Kubernetes with KubeRay.")
    parser.add_argument(
        "--only",
        action="append",
        choices=get_args(Kind),
        default=[],
        metavar="KIND",
        help="submit only jobs of this kind: cache, train or report; may be repeated",
    )
    return parser


def kuberay_command(argv: Sequence[str]) -> int:
    """Apply a RayJob for the cache and Indexed Jobs for training and report, which wait for it."""
    options, config = parse_run(kuberay_parser(), argv)
    from launch.clusters.kuberay_submit import describe_kuberay, hidden_marks, submit_kuberay

    if hidden := hidden_marks(config):
        print(f"note: {hidden}", file=sys.stderr)
    if options.plan:
        print(describe_kuberay(config, only=options.only), end="")
        return 0
    write_frozen_run_file(config)
    return _print_outcomes(submit_kuberay(config, only=options.only), as_json=options.json)


def _parser(command: str, *, description: str) -> ArgumentParser:
    parser = ArgumentParser(f"submit {command}", description=description, exit_codes=EXIT_CODES)
    parser.add_config()
    parser.add_argument("--plan", action="store_true", help="print everything that would be submitted, and end")
    parser.add_argument("--json", action="store_true", help="print what became of each job as JSON")
    return parser


def _print_outcomes(outcomes: Sequence[Outcome], *, as_json: bool) -> int:
    if as_json:
        print_json([dataclasses.asdict(outcome) for outcome in outcomes])
    else:
        print_table(outcome_rows(outcomes))
    return 0
