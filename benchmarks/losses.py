"""Measure the losses through a head, beside dense torch and other libraries: ``python benchmarks/losses.py``.

``docs/benchmarks.md`` says what each figure means.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cache_bench import machine
from cache_bench.figures import Figure, table
from losses_bench import exactness, memory, speed
from losses_bench.sides import Shape

FULL = Shape(tokens=512, vocab=152_064, hidden=1024)
QUICK = Shape(tokens=512, vocab=2_048, hidden=32)
PAIRS, QUICK_PAIRS = 5, 2

PARTS: dict[str, Callable[[bool], Iterator[Figure]]] = {
    "exactness": lambda quick: exactness.measure(quick=quick),
    "memory": lambda quick: memory.measure(QUICK if quick else FULL),
    "speed": lambda quick: speed.measure(QUICK if quick else FULL, pairs=QUICK_PAIRS if quick else PAIRS),
}


def main(argv: Sequence[str]) -> int:
    """Measure the chosen parts, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks/losses.py", description="Measure the losses through a head.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that all parts work, in seconds")
    parser.add_argument("--json", action="store_true", help="print one object, figure name to value, and no table")
    parser.add_argument(
        "--details", type=Path, metavar="FILE", help="write figures, spread, machine and versions to it"
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part alone; may be repeated")
    arguments = parser.parse_args(argv)
    about = machine.describe(Path.cwd())
    print(", ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
    figures: list[Figure] = []
    for name in arguments.only or PARTS:
        for figure in PARTS[name](arguments.quick):
            figures.append(figure)
            print(table([figure]).splitlines()[-1], file=sys.stderr)
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
