"""Measure training from the cache beside training with the teacher live: ``python benchmarks/train.py``.

``docs/benchmarks.md`` says what each figure means.
"""

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from cache_bench.command import add_folder, make_parser, tell
from cache_bench.figures import Figure
from train_bench import equality, overhead, speed, trainings
from train_bench.inputs import Inputs, make_inputs
from train_bench.settings import FULL, QUICK

from distill.processes import Processes
from distill.zero import launched_processes

PARTS: dict[str, Callable[[Inputs, Path, Processes], Iterator[Figure]]] = {
    "speed": lambda inputs, _, processes: speed.measure(inputs, processes),
    "trainings": lambda inputs, folder, _: trainings.measure(inputs, folder),
    "overhead": lambda inputs, folder, _: overhead.measure(inputs, folder),
    "equality": lambda inputs, folder, _: equality.measure(inputs, folder),
}


def main(argv: Sequence[str]) -> int:
    """Measure the chosen parts, print, and return the exit code."""
    parser = make_parser("train.py", description="Measure training from the cache.", parts=PARTS)
    add_folder(parser)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch 2.13 warns at each collective of deepspeed 0.19.8
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    folder = Path(tempfile.mkdtemp(prefix="genrecal-benchmark-", dir=arguments.folder))
    try:
        inputs = make_inputs(folder, QUICK if arguments.quick else FULL)
        # one process group for all parts
        with launched_processes(backend="zero3", num_processes=1) as processes:
            measured = (figure for name in arguments.only or PARTS for figure in PARTS[name](inputs, folder, processes))
            tell(measured, arguments, folder=folder)
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
