"""`genrecal submit slurm`, `ray` and `kuberay`: hand the jobs of a run to a cluster."""

import dataclasses
from collections.abc import Sequence

from launch.arguments import ArgumentParser
from launch.clusters.submission import Outcome, outcome_rows, write_frozen_run_file
from launch.console import print_json, print_table
from launch.run_config import load_run_config

EXIT_CODES = "0 submitted or complete already, 1 the scheduler refused, 2 usage or config"


def slurm_parser() -> ArgumentParser:
    """Return the parser of `submit slurm`."""
    return _parser("slurm", description="Write batch scripts for the jobs of a run and submit them to Slurm.")


def slurm_command(argv: Sequence[str]) -> int:
    """Submit the cache job, a training array and the report, each after the one before."""
    options, overrides = slurm_parser().parse_known_args(argv)
    config = load_run_config(options.config, overrides)
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
    options, overrides = ray_parser().parse_known_args(argv)
    if options.insecure:
        overrides = [*overrides, "--cache.build.insecure-ray"]
    config = load_run_config(options.config, overrides)
    from launch.clusters.ray_submit import describe_ray, submit_ray

    if options.plan:
        print(describe_ray(config), end="")
        return 0
    write_frozen_run_file(config)
    return _print_outcomes(submit_ray(config), as_json=options.json)


def kuberay_parser() -> ArgumentParser:
    """Return the parser of `submit kuberay`."""
    return _parser("kuberay", description="Apply manifests for the jobs of a run to Kubernetes with KubeRay.")


def kuberay_command(argv: Sequence[str]) -> int:
    """Apply a RayJob for the cache and Indexed Jobs for training and report, which wait for it."""
    options, overrides = kuberay_parser().parse_known_args(argv)
    config = load_run_config(options.config, overrides)
    from launch.clusters.kuberay_submit import describe_kuberay, submit_kuberay

    if options.plan:
        print(describe_kuberay(config), end="")
        return 0
    write_frozen_run_file(config)
    return _print_outcomes(submit_kuberay(config), as_json=options.json)


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
