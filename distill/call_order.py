"""Ranks that would call different modules are found before they wait for each other for ever."""

import zlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from distill.processes import Processes
from teacher_cache.errors import GenrecalError


def require_same_calls(inputs: dict[str, Any], *, processes: Processes) -> None:
    """Raise GenrecalError on every process unless the inputs of all bring the same tensors.

    Which tensors a batch brings (images, the teacher's question rows, ...) decides which modules run, and under ZeRO-3
    a module that runs on some processes only is a wait without end. One small collective per forward pass.
    """
    if processes.world_size == 1:
        return
    names = sorted(_tensor_names(inputs))
    signatures = [row[0] for row in processes.gather([float(zlib.crc32(" ".join(names).encode()))])]
    if len(set(signatures)) > 1:
        unlike = [rank for rank, signature in enumerate(signatures) if signature != signatures[0]]
        raise GenrecalError(
            f"processes {', '.join(map(str, unlike))} bring other inputs to this forward pass than process 0, and "
            f"would call other modules; process {processes.rank} has {', '.join(names)}. Every micro-batch needs the "
            "fillers of JoinedData: this is a fault of the data path, not of the samples"
        )


def _tensor_names(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, Tensor):
        yield prefix
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _tensor_names(entry, f"{prefix}.{key}")
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensor_names(getattr(value, field.name), f"{prefix}.{field.name}")
