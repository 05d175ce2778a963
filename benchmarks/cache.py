"""Measure the teacher cache side by side with what it could be at best: ``python benchmarks/cache.py``.

``docs/benchmarks.md`` says what each figure means.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cache_bench import machine, object_store, opening, peer_table, reading, settings, sizes, verifying, writing
from cache_bench.figures import Figure, table
from cache_bench.settings import Settings

PARTS: dict[str, Callable[[Settings], Iterator[Figure]]] = {
    "write": writing.measure,
    "read": reading.measure,
    "peers": peer_table.measure,
    "object-store": object_store.measure,
    "open": opening.measure,
    "verify": verifying.measure,
    "size": sizes.measure,
}


def main(argv: Sequence[str]) -> int:
    """Measure the chosen parts, print, and return the exit code."""
    arguments = _parse(argv)
    folder = Path(tempfile.mkdtemp(prefix="genrecal-benchmark-", dir=arguments.folder))
    figures: list[Figure] = []
    about = machine.describe(folder)
    print(", ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
    try:
        chosen = (settings.quick if arguments.quick else settings.full)(folder)
        for name in arguments.only or PARTS:
            for figure in PARTS[name](chosen):
                figures.append(figure)
                print(table([figure]).splitlines()[-1], file=sys.stderr)
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


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/cache.py", description="Measure the teacher cache.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that all parts work, in seconds")
    parser.add_argument("--json", action="store_true", help="print one object, figure name to value, and no table")
    parser.add_argument(
        "--details", type=Path, metavar="FILE", help="write figures, spread, machine and versions to it"
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part alone; may be repeated")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where to write, by default the working folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
