"""Measure the build of a teacher cache side by side with its engine alone: ``python benchmarks/build.py``.

``docs/benchmarks.md`` says what each figure means.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from build_bench.throughput import FULL, GPU, QUICK, measure
from cache_bench.command import add_folder, make_parser, tell


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return the exit code."""
    parser = make_parser("build.py", description="Measure the build of a teacher cache.")
    add_folder(parser)
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="genrecal-benchmark-", dir=arguments.folder))
    try:
        full = GPU if torch.cuda.is_available() else FULL
        tell(measure(folder, QUICK if arguments.quick else full), arguments, folder=folder)
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
