"""Checkpoints for another number of processes: DeepSpeed's universal form, and what that form leaves out.

The universal form holds master weights and moments of the trained parameters. Frozen parameters and buffers are kept
beside it, and the digest of every tensor, so that what the new processes loaded is compared with what the old ones
stored.
"""

import argparse
import contextlib
import io
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.checkpoint import (
    ANY_SIZE,
    Checkpoint,
    commit,
    committed_tags,
    discard_tag,
    intact_checkpoint,
)
from distill.processes import Processes
from distill.stages import StageModel
from distill.zero_files import MASTER, MOMENTS, ZeroTensors, model_states_name, read_zero_tensors
from teacher_cache.durable_files import remove
from teacher_cache.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

REST = "rest.safetensors"
"""Frozen parameters and buffers."""
DIGESTS = "tensors.json"
SUFFIX = "-any"
"""Of the tag's name: sorts after the tag that it was made of."""


def reshard(stage_directory: Path) -> Path:
    """Make the newest intact checkpoint of a stage readable by any number of ZeRO-3 processes; return its tag.

    Raises:
        ConfigError: There is no checkpoint, or one that needs no conversion.
        CheckpointError: All checkpoints are damaged, or a tensor changed on the way.
    """
    directory = stage_directory / "checkpoints"
    if not committed_tags(directory):
        raise ConfigError(f"no checkpoint in {directory}: expected RUN/training/STUDENT/STAGE of a stage under way")
    checkpoint = intact_checkpoint(directory)
    layout = checkpoint.record.layout
    if layout["backend"] != "zero3":
        raise ConfigError(
            f"{checkpoint.directory} was written by backend {layout['backend']}, which trains in one process: there is "
            "nothing to convert, and backend zero3 cannot read it"
        )
    if layout["world_size"] == ANY_SIZE:
        logger.info("%s is readable by any number of processes already", checkpoint.directory)
        return checkpoint.directory
    target = checkpoint.directory.with_name(checkpoint.directory.name + SUFFIX)
    discard_tag(target)
    _convert(checkpoint, target)
    commit(target, replace(checkpoint.record, layout={**layout, "world_size": ANY_SIZE}))
    return target


def _convert(checkpoint: Checkpoint, target: Path) -> None:
    source = checkpoint.directory
    tensors = read_zero_tensors(source, world_size=checkpoint.record.layout["world_size"])
    expected = tensor_digests(tensors)
    _to_universal(source, target)
    for file in target.glob("*_model_states.pt"):
        # shares of the frozen parameters; the first one's other entries are still read
        if file.name != model_states_name(0):
            remove(file)
    save_file({name: tensor.contiguous() for name, tensor in _rest(tensors).items()}, target / REST)
    (target / DIGESTS).write_text(json.dumps(expected, indent=0))
    require_same_tensors(expected, tensor_digests(read_resharded(target)), where=target)


def is_resharded(tag: Path) -> bool:
    """Tell whether `reshard` made a tag."""
    return (tag / DIGESTS).is_file()


def read_resharded(tag: Path) -> ZeroTensors:
    """Return the tensors of a tag that `reshard` made; those of trained parameters are flat."""
    names = json.loads((tag / DIGESTS).read_text())
    rest = load_file(tag / REST)
    trained: dict[str, dict[str, Tensor]] = {}
    for entry in names:
        kind, _, name = entry.partition(":")
        if kind in (MASTER, *MOMENTS):
            path = tag / "zero" / name / f"{kind}.pt"
            trained.setdefault(name, {})[kind] = torch.load(path, map_location="cpu", weights_only=True)
    return ZeroTensors(
        trained=trained,
        frozen={name: rest[name] for entry in names if (name := entry.removeprefix("frozen:")) != entry},
        buffers={name: rest[name] for entry in names if (name := entry.removeprefix("buffer:")) != entry},
    )


def load_resharded(engine: Any, model: StageModel, tag: Path, *, processes: Processes) -> None:
    """Load a tag that `reshard` made into a DeepSpeed engine, and compare every tensor; every process calls this.

    Raises:
        CheckpointError: A tensor is not as it was stored.
    """
    import deepspeed

    engine._config.load_universal_checkpoint = True
    engine.load_checkpoint(str(tag.parent), tag=tag.name)
    engine._config.load_universal_checkpoint = False
    separate_steps(engine.optimizer.optimizer)
    rest = load_file(tag / REST)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if processes.rank == 0:
                        parameter.copy_(rest[name])
        for name, buffer in model.named_buffers():
            if name in rest:
                buffer.copy_(rest[name])
    found = dict(_loaded_digests(model))
    expected = json.loads((tag / DIGESTS).read_text())
    if processes.rank == 0:
        require_same_tensors(expected, found, where=tag)
    processes.barrier()


def separate_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give every group a step count of its own beside its parameters.

    DeepSpeed gives all of them one tensor in main memory: each would count it up, and a fused update on a GPU reads it
    as if it were there.
    """
    for parameter, state in optimizer.state.items():
        if isinstance(state["step"], Tensor):
            state["step"] = state["step"].to(parameter.device, copy=True)


def tensor_digests(tensors: ZeroTensors) -> dict[str, str]:
    """Return the digest of every tensor, under its kind and name."""
    digests = {f"{key}:{name}": _digest(t) for name, states in tensors.trained.items() for key, t in states.items()}
    digests |= {f"frozen:{name}": _digest(tensor) for name, tensor in tensors.frozen.items()}
    return digests | {f"buffer:{name}": _digest(tensor) for name, tensor in tensors.buffers.items()}


def require_same_tensors(expected: Mapping[str, str], found: Mapping[str, str], *, where: Path) -> None:
    """Raise CheckpointError, naming the first, unless all tensors have the same digests."""
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(expected)} tensors of {where} changed on the way to another number of processes, "
            f"first {wrong[0]}: go on with the number of processes that wrote the checkpoint, and report this"
        )


def _to_universal(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    # it prints, and shows bars
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    remove(target.parent / "latest_universal")


def _loaded_digests(model: StageModel) -> Iterator[tuple[str, str]]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield f"{MASTER}:{name}", _digest(safe_get_full_fp32_param(parameter))
            for key in MOMENTS:
                yield f"{key}:{name}", _digest(safe_get_full_optimizer_state(parameter, key))
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                yield f"frozen:{name}", _digest(parameter)
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield f"buffer:{name}", _digest(buffer)


def _rest(tensors: ZeroTensors) -> dict[str, Tensor]:
    return tensors.frozen | tensors.buffers


def _digest(tensor: Tensor) -> str:
    # whatever its shape, which the universal form does not keep
    content = tensor.detach().cpu().contiguous().flatten()
    return blake3(str(content.dtype).encode()).update(content.view(torch.uint8).numpy().data).hexdigest()
