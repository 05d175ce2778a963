"""Write a trained student as an ordinary Hugging Face directory, and the Recalibrator beside it."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.adapters import has_adapters, is_adapter, merge_adapters, write_adapters
from distill.config import LoraConfig
from distill.engine import Engine
from distill.processes import Processes
from teacher_cache.durable_files import remove, sync_file, sync_folder, sync_tree

SHARD_BYTES = 4 * 2**30
PROCESSOR_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*processor_config.json",
    "processor_config.json",
    "chat_template*",
    "additional_chat_templates/*",
)


def export_student(engine: Engine, target: Path, *, source: Path, dtype: str, processes: Processes) -> None:
    """Write the student; ``source`` is the directory it was loaded from and gives tokenizer and processor.

    Parameters are gathered one by one, and only rank 0 keeps them. Adapters are merged. Every process calls this.
    """
    state = _gather(engine, engine.model.student, dtype=dtype, processes=processes)
    if processes.rank == 0:
        state = merge_adapters(engine.model.student, state)
        staging = target.with_name(f"{target.name}.partial")
        remove(staging)
        student = engine.model.student
        student.save_pretrained(staging, state_dict=state, max_shard_size=SHARD_BYTES)
        _copy_processor(source, staging)
        sync_tree(staging)
        remove(target)
        staging.rename(target)
        sync_folder(target.parent)
    processes.barrier()


def export_recalibrator(engine: Engine, path: Path, *, processes: Processes) -> None:
    """Write the Recalibrator's parameters, where the stage has one; every process calls this."""
    recalibrator = engine.model.recalibrator
    if recalibrator is None:
        return
    state = _gather(engine, recalibrator, dtype=None, processes=processes)
    if processes.rank == 0:
        temporary = path.with_suffix(".tmp")
        save_file(state, temporary, metadata={"format": "pt"})
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    processes.barrier()


def export_adapters(engine: Engine, folder: Path, *, config: LoraConfig, base: str, processes: Processes) -> None:
    """Write the student's adapters, where it has any; every process calls this."""
    student = engine.model.student
    if not has_adapters(student):
        return
    state = _gather(engine, student, dtype=None, processes=processes, only=is_adapter)
    if processes.rank == 0:
        write_adapters(student, state, folder, config=config, base=base)
    processes.barrier()


def _gather(
    engine: Engine,
    module: nn.Module,
    *,
    dtype: str | None,
    processes: Processes,
    only: Callable[[str], bool] = lambda _: True,
) -> dict[str, Tensor]:
    state = {}
    for name, parameter in module.named_parameters():
        if not only(name):
            continue
        with engine.gathered(parameter):
            if processes.rank == 0:
                tensor = parameter.detach().to("cpu", getattr(torch, dtype) if dtype else None, copy=True)
                state[name] = tensor.contiguous()
    if processes.rank == 0:
        persistent = module.state_dict(keep_vars=True)
        state |= {name: buffer.detach().cpu().clone() for name, buffer in module.named_buffers() if name in persistent}
    return state


def _copy_processor(source: Path, target: Path) -> None:
    for pattern in PROCESSOR_FILES:
        for file in source.glob(pattern):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
