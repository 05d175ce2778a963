"""Check and time the heavy parts on one GPU in a few minutes: ``python benchmarks/gpu``.

The losses, the Recalibrator, a ZeRO-3 step, the shard writer from device memory, and the main job as a whole.
``docs/benchmarks.md`` says what each figure means. ``--quick --device cpu`` shows on any machine that everything works.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# run as a folder: the packages and the siblings are not importable by themselves
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

PARTS = ("gpu_losses", "gpu_recalibrator", "gpu_zero", "gpu_shards", "gpu_job")


def main(argv: Sequence[str]) -> int:
    """Measure all parts, print, and return the exit code: 1 where a check failed."""
    machine, figures_module = (importlib.import_module(f"cache_bench.{name}") for name in ("machine", "figures"))
    parser = argparse.ArgumentParser(prog="benchmarks/gpu", description="Check and time the heavy parts on a GPU.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that all parts work, in seconds")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", action="store_true", help="print one object, figure name to value, and no table")
    parser.add_argument("--details", type=Path, metavar="FILE", help="write figures, machine and versions to it")
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part alone; may be repeated")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        parser.error("torch sees no NVIDIA GPU; --quick --device cpu shows on this machine that all parts work")
    figures = []
    with tempfile.TemporaryDirectory(prefix="genrecal-benchmark-", dir=Path.cwd()) as folder:
        about = {**machine.describe(Path(folder)), "device": _device_name(arguments.device)}
        print(", ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
        for name in arguments.only or PARTS:
            start = time.perf_counter()
            part = importlib.import_module(name)
            for figure in part.measure(device=arguments.device, quick=arguments.quick, folder=Path(folder) / name):
                figures.append(figure)
                print(figures_module.table([figure]).splitlines()[-1], file=sys.stderr)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    values = {figure.key: figure.value for figure in figures}
    print(json.dumps(values, indent=1) if arguments.json else figures_module.table(figures))
    if arguments.details:
        document = {
            "quick": arguments.quick,
            "machine": about,
            "versions": machine.versions(),
            "figures": [figure.as_json() for figure in figures],
        }
        arguments.details.write_text(json.dumps(document, indent=1) + "\n")
    return int(any(figure.met is False for figure in figures if figure.section.endswith("check")))


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
