"""Measure the Recalibrator side by side with the student's own blocks: ``python benchmarks/recalibrator_step.py``.

``docs/benchmarks.md`` says what each figure means.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cache_bench import machine
from cache_bench.figures import table


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks/recalibrator_step.py", description="Measure the Recalibrator.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="one object, figure name to value: print it, or write FILE"
    )
    parser.add_argument(
        "--details", type=Path, metavar="FILE", help="write figures, spread, machine and versions to it"
    )
    arguments = parser.parse_args(argv)
    # this file has the name of the package that it measures
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from recalibrator_bench.settings import FULL, QUICK
    from recalibrator_bench.throughput import measure

    about = machine.describe(Path.cwd())
    print(", ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
    figures = []
    for figure in measure(QUICK if arguments.quick else FULL):
        figures.append(figure)
        print(table([figure]).splitlines()[-1], file=sys.stderr)
    values = json.dumps({figure.key: figure.value for figure in figures}, indent=1)
    print(values if arguments.json == "-" else table(figures))
    if arguments.json not in (None, "-"):
        Path(arguments.json).write_text(values + "\n")
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
