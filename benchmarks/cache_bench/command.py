"""What all benchmarks share on the command line: their options, and how figures are told and kept."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from cache_bench import machine
from cache_bench.figures import Figure, table


def make_parser(script: str, *, description: str, parts: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of a script, with the parts of which some may be chosen."""
    parser = argparse.ArgumentParser(prog=f"benchmarks/{script}", description=description)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that all parts work")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="one object, figure name to value: print it, or write FILE"
    )
    parser.add_argument(
        "--details", type=Path, metavar="FILE", help="write figures, spread, machine and versions to it"
    )
    if parts:
        parser.add_argument("--only", action="append", choices=parts, help="measure this part alone; may be repeated")
    return parser


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Let the user say where a benchmark writes."""
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where to write, by default the working folder")


def tell(measured: Iterable[Figure], arguments: argparse.Namespace, *, folder: Path) -> None:
    """Measure one figure after the other, tell each when it is there, and print and keep them as the arguments say."""
    about = machine.describe(folder)
    print(", ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
    figures = []
    for figure in measured:
        figures.append(figure)
        print(table([figure]).splitlines()[-1], file=sys.stderr)
    values = json.dumps({figure.json_name or figure.key: figure.value for figure in figures}, indent=1)
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
