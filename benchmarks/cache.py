"""Measure the teacher cache side by side with what it could be at best: ``python benchmarks/cache.py``.

``docs/benchmarks.md`` says what each figure means.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cache_bench import object_store, opening, peer_table, reading, settings, sizes, verifying, writing
from cache_bench.command import add_folder, make_parser, tell
from cache_bench.figures import Figure
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
    parser = make_parser("cache.py", description="Measure the teacher cache.", parts=PARTS)
    add_folder(parser)
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="genrecal-benchmark-", dir=arguments.folder))
    try:
        chosen = (settings.quick if arguments.quick else settings.full)(folder)
        measured = (figure for name in arguments.only or PARTS for figure in PARTS[name](chosen))
        tell(measured, arguments, folder=folder)
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
