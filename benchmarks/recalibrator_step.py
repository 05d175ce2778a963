"""Measure the Recalibrator side by side with the student's own blocks: ``python benchmarks/recalibrator_step.py``.

``docs/benchmarks.md`` says what each figure means.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cache_bench.command import make_parser, tell
from recalibrator_bench.settings import FULL, QUICK
from recalibrator_bench.throughput import measure


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return the exit code."""
    arguments = make_parser("recalibrator_step.py", description="Measure the Recalibrator.").parse_args(argv)
    tell(measure(QUICK if arguments.quick else FULL), arguments, folder=Path.cwd())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
