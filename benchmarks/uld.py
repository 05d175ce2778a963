"""Measure aligned ULD side by side with TRL's GOLD: ``python benchmarks/uld.py``.

``docs/benchmarks.md`` says what each figure means.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cache_bench.command import make_parser, tell
from uld_bench.aligned import measure
from uld_bench.settings import FULL, QUICK


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return the exit code."""
    arguments = make_parser("uld.py", description="Measure aligned ULD.").parse_args(argv)
    tell(measure(QUICK if arguments.quick else FULL), arguments, folder=Path.cwd())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
