"""Run by torchrun in two processes without compiler and home: steps under offload, then inputs that disagree."""

import json
import sys
from pathlib import Path

from distill.call_order import require_same_calls
from distill.zero import launched_processes
from teacher_cache.errors import GenrecalError
from tests.distill.zero_scenarios import ENGINE_RUNS, run_variant


def main(folder: Path) -> None:
    import torch

    with launched_processes(backend="zero3", num_processes=2) as processes:
        run = run_variant(json.loads((folder / "inputs.json").read_text()), ENGINE_RUNS["offload"], processes=processes)
        assert len(run.losses) > 0
        images = {"pixel_values": torch.zeros(1)} if processes.rank else {}
        require_same_calls([{"batch": {"input_ids": torch.zeros(1)}}], processes=processes)
        try:
            require_same_calls([{"batch": {"input_ids": torch.zeros(1), **images}}], processes=processes)
        except GenrecalError as error:
            (folder / f"refused-{processes.rank}").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
