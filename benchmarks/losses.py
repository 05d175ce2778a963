"""Measure the losses through a head, beside dense torch and other libraries: ``python benchmarks/losses.py``.

``docs/benchmarks.md`` says what each figure means.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cache_bench.command import make_parser, tell
from cache_bench.figures import Figure
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
    arguments = make_parser("losses.py", description="Measure the losses through a head.", parts=PARTS).parse_args(argv)
    measured = (figure for name in arguments.only or PARTS for figure in PARTS[name](arguments.quick))
    tell(measured, arguments, folder=Path.cwd())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
