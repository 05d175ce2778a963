"""Measure the build of a teacher cache side by side with its engine alone: ``python benchmarks/build.py``.

``docs/benchmarks.md`` says what each figure means.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from build_bench.throughput import FULL, QUICK, measure
from cache_bench import machine
from cache_bench.figures import table


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks/build.py", description="Measure the build of a teacher cache.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works")
    parser.add_argument("--json", action="store_true", help="print one object, figure name to value, and no table")
    parser.add_argument(
        "--details", type=Path, metavar="FILE", help="write figures, spread, machine and versions to it"
    )
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where to write, by default the working folder")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="genrecal-benchmark-", dir=arguments.folder))
    about = machine.describe(folder)
    print(", ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
    try:
        figures = list(measure(folder, QUICK if arguments.quick else FULL))
    finally:
        shutil.rmtree(folder)
    print(json.dumps({figure.key: figure.value for figure in figures}, indent=1) if arguments.json else table(figures))
    if arguments.details:
        document = {
            "quick": arguments.quick,
            "machine": about,
            "versions": machine.versions(),
            "figures": [figure.as_json() for figure in figures],
        }
        arguments.details.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
