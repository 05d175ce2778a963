"""Evaluation, then the report, as one process: ``python -m launch.clusters.report_job``."""

import argparse
import sys
from collections.abc import Sequence

from launch import cli
from launch.clusters.marks import mark_report
from launch.run_config import load_run_config


def main(argv: Sequence[str] | None = None) -> int:
    """Score every model of a run, write its report and leave its mark; return the first exit code that is not 0."""
    parser = argparse.ArgumentParser(prog="python -m launch.clusters.report_job", allow_abbrev=False)
    parser.add_argument("run_file")
    run_file = parser.parse_args(argv).run_file
    code = cli.main(["eval", run_file])
    if code == 0:
        config = load_run_config(run_file)
        code = cli.main(["report", config.output_dir])
        if code == 0:
            mark_report(config)
    return code


if __name__ == "__main__":
    sys.exit(main())
