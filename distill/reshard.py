"""Checkpoints for another number of processes: DeepSpeed's universal form, and what that form leaves out.

The universal form holds master weights and moments of the trained parameters. Frozen parameters and buffers are kept
beside it, and the digest of every tensor, so that what the new processes loaded is compared with what the old ones
stored.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from distill.checkpoint import (
    ANY_SIZE,
    Checkpoint,
    commit,
    committed_tags,
    discard_tag,
    intact_checkpoint,
)
from distill.folder_lock import locked_folder
from distill.processes import Processes
from distill.stages import StageModel
from distill.zero_files import (
    BUFFER,
    FROZEN,
    MASTER,
    MOMENTS,
    Read,
    load_states,
    model_states_name,
    optimizer_states_path,
    zero_tensors,
)
from teacher_cache.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

DIGESTS = "tensors.json"
SUFFIX = "-any"
"""Of the tag's name: sorts after the tag that it was made of."""


def reshard(stage_directory: Path) -> Path:
    """Make the newest intact checkpoint of a stage readable by any number of ZeRO-3 processes; return its tag.

    Raises:
        ConfigError: There is no checkpoint, or one that needs no conversion.
        CheckpointError: All checkpoints are damaged, or a tensor changed on the way.
        TrainingBusy: The student is being trained.
    """
    directory = stage_directory / "checkpoints"
    if not committed_tags(directory):
        raise ConfigError(f"no checkpoint in {directory}: expected RUN/training/STUDENT/STAGE of a stage under way")
    with locked_folder(stage_directory.resolve().parent):
        return _reshard_newest(directory)


def _reshard_newest(directory: Path) -> Path:
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
    try:
        _convert(checkpoint, target)
        commit(target, replace(checkpoint.record, layout={**layout, "world_size": ANY_SIZE}))
    except BaseException:
        discard_tag(target)
        raise
    return target


def _convert(checkpoint: Checkpoint, target: Path) -> None:
    source = checkpoint.directory
    tensors = zero_tensors(source, world_size=checkpoint.record.layout["world_size"])
    expected = {entry: _store(read(), target, entry) for entry, read in tensors.items()}
    _store_other_states(source, target)
    (target / DIGESTS).write_text(json.dumps(expected, indent=0))
    found = {entry: _digest(read()) for entry, read in resharded_tensors(target).items()}
    require_same_tensors(expected, found, where=target)


def is_resharded(tag: Path) -> bool:
    """Tell whether `reshard` made a tag."""
    return (tag / DIGESTS).is_file()


def resharded_tensors(tag: Path) -> dict[str, Read]:
    """Return how to read the tensors of a tag that `reshard` made, as `zero_tensors` does; trained ones are flat."""
    entries = json.loads((tag / DIGESTS).read_text())
    load = partial(torch.load, map_location="cpu", weights_only=True, mmap=True)
    return {entry: partial(load, _tensor_path(tag, entry)) for entry in entries}


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
    tensors = resharded_tensors(tag)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if processes.rank == 0:
                        parameter.copy_(tensors[f"{FROZEN}:{name}"]())
        for name, buffer in model.named_buffers():
            if f"{BUFFER}:{name}" in tensors:
                buffer.copy_(tensors[f"{BUFFER}:{name}"]())
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


def require_same_tensors(expected: Mapping[str, str], found: Mapping[str, str], *, where: Path) -> None:
    """Raise CheckpointError, naming the first, unless all tensors have the same digests."""
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(expected)} tensors of {where} changed on the way to another number of processes, "
            f"first {wrong[0]}: go on with the number of processes that wrote the checkpoint, and report this"
        )


def _store(tensor: Tensor, tag: Path, entry: str) -> str:
    """Write a tensor, flat where DeepSpeed expects it flat; return its digest."""
    path = _tensor_path(tag, entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensor.flatten() if _is_trained(entry) else tensor, path)
    return _digest(tensor)


def _tensor_path(tag: Path, entry: str) -> Path:
    """Return where a tensor lies: of a trained parameter where DeepSpeed looks for it."""
    kind, _, name = entry.partition(":")
    return tag / "zero" / name / f"{kind}.pt" if _is_trained(entry) else tag / kind / f"{name}.pt"


def _is_trained(entry: str) -> bool:
    return entry.partition(":")[0] in (MASTER, *MOMENTS)


def _store_other_states(source: Path, target: Path) -> None:
    """Write what DeepSpeed reads beside the tensors: steps, settings of the optimizer, counts."""
    model = load_states(source / model_states_name(0))
    torch.save(model | {"frozen_param_fragments": None}, target / model_states_name(0))
    state = load_states(optimizer_states_path(source, 0))["optimizer_state_dict"]
    inner = state["optimizer_state_dict"]
    steps = {group: {"step": own["step"]} for group, own in inner["state"].items()}
    torch.save(
        state | {"fp32_flat_groups": [], "optimizer_state_dict": inner | {"state": steps}},
        target / "zero" / "optimizer_state.pt",
    )


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
                yield f"{FROZEN}:{name}", _digest(parameter)
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield f"{BUFFER}:{name}", _digest(buffer)


def _digest(tensor: Tensor) -> str:
    # whatever its shape, which the universal form does not keep
    content = tensor.detach().cpu().contiguous().flatten()
    return blake3(str(content.dtype).encode()).update(content.view(torch.uint8).numpy().data).hexdigest()
