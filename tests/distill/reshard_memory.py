"""Measure what memory a reshard takes above its imports: ``python tests/distill/reshard_memory.py [MEGABYTES]``."""

import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill.checkpoint import Record, commit
from distill.reshard import reshard
from distill.zero_files import MASTER, MOMENTS

TAG = Path("checkpoints/step-00000002")
MIB = 1 << 20
LARGEST_MIB = 50


def write_stage(
    folder: Path,
    *,
    world_size: int,
    trained: Sequence[Mapping[str, Mapping[str, Tensor]]],
    frozen: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    in_zip_files: bool = True,
) -> None:
    """Write a stage's folder with one checkpoint, as DeepSpeed does: one group of parameters after the other."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    tag = folder / TAG
    tag.mkdir(parents=True)
    shapes = [OrderedDict((name, states[MASTER].shape) for name, states in group.items()) for group in trained]
    module = {name: torch.zeros(0) for group in trained for name in group} | dict(buffers)
    for rank in range(world_size):

        def flat(kind: str, group: Mapping[str, Mapping[str, Tensor]], rank: int = rank) -> Tensor:
            return torch.cat([_share(states[kind], rank, world_size) for states in group.values()])

        model = {
            "module": OrderedDict(module),
            "buffer_names": list(buffers),
            "param_shapes": shapes,
            "frozen_param_shapes": OrderedDict((name, tensor.shape) for name, tensor in frozen.items()),
            "frozen_param_fragments": OrderedDict((name, _share(t, rank, world_size)) for name, t in frozen.items()),
            "dp_world_size": world_size,
        }
        state = {
            number: {"step": torch.tensor(2.0)} | {kind: flat(kind, group) for kind in MOMENTS}
            for number, group in enumerate(trained)
        }
        optimizer = {
            "zero_stage": ZeroStageEnum.weights,
            "loss_scaler": LossScaler(1.0),
            "partition_count": world_size,
            "optimizer_state_dict": {"state": state, "param_groups": [{"lr": 1e-3, "params": list(state)}]},
            "fp32_flat_groups": [flat(MASTER, group).requires_grad_() for group in trained],
        }
        for name, content in (("model", model), ("optim", {"optimizer_state_dict": optimizer})):
            file = tag / f"zero_pp_rank_{rank}_mp_rank_00_{name}_states.pt"
            torch.save(content, file, _use_new_zipfile_serialization=in_zip_files)
    layout = {"backend": "zero3", "world_size": world_size}
    commit(tag, Record(step=2, identity={}, layout=layout, origin={}, state={}))


def _share(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    flat = tensor.flatten()
    padded = torch.cat([flat, flat.new_zeros(-flat.numel() % world_size)])
    return padded.chunk(world_size)[rank].clone()


def write_large_stage(folder: Path, *, megabytes: int, world_size: int) -> None:
    """Write a checkpoint of tensors of `LARGEST_MIB`: three quarters masters and moments, the rest frozen."""
    numel = LARGEST_MIB * MIB // 4
    number = megabytes // LARGEST_MIB // 4
    kinds = (MASTER, *MOMENTS)
    trained = [{f"body.{i}.weight": {kind: torch.rand(numel) for kind in kinds} for i in range(number)}]
    frozen = {f"vision.{i}.weight": torch.rand(numel) for i in range(number)}
    write_stage(folder, world_size=world_size, trained=trained, frozen=frozen, buffers={})


def peak_mib() -> float:
    """Return the most memory that this program has had in main memory, without what started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak_of_reshard(folder: Path) -> float:
    """Return the MiB that a fresh process needs for a reshard, above its imports."""
    finished = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, check=True)
    # DeepSpeed tells of the accelerator first
    return float(finished.stdout.split()[-1])


def own_peak(folder: Path) -> float:
    """Reshard, and return the MiB that this took above what was there before."""
    import deepspeed  # noqa: F401 - one of the imports

    before = peak_mib()
    reshard(folder)
    return peak_mib() - before


def main(megabytes: int) -> None:
    for world_size in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            write_large_stage(Path(folder), megabytes=megabytes, world_size=world_size)
            peak = peak_of_reshard(Path(folder))
        print(f"{megabytes} MiB of {world_size} processes, largest tensor {LARGEST_MIB} MiB: peak {peak:.0f} MiB")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [argument] if Path(argument).is_dir():
            print(own_peak(Path(argument)))
        case arguments:
            main(*map(int, arguments or ["400"]))
