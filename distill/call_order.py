"""Ranks that would call different modules are found before they wait for each other for ever.

Which tensors a batch brings (images, the teacher's question rows, ...) decides which modules run, and under ZeRO-3 a
module that runs on some processes only is a wait without end.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from distill.processes import Processes
from teacher_cache.errors import GenrecalError

UNLIKE = -1.0
"""In the place of a signature that several passes share; crc32 gives none below 0."""


def shared_signature(passes: Sequence[Any]) -> float:
    """Return a number for the tensors that forward passes bring, where all bring the same; `UNLIKE` where they do not.

    No pass at all is `UNLIKE` too.
    """
    found = {_signature(inputs) for inputs in passes}
    return found.pop() if len(found) == 1 else UNLIKE


def require_same_calls(passes: Sequence[Any], *, processes: Processes) -> None:
    """Raise GenrecalError on every process unless the inputs of all bring the same tensors, pass by pass.

    One small collective, however many passes; every process has as many.
    """
    if processes.world_size == 1:
        return
    signatures = processes.gather([_signature(inputs) for inputs in passes])
    for number, found in enumerate(zip(*signatures, strict=True)):
        unlike = [rank for rank, signature in enumerate(found) if signature != found[0]]
        if unlike:
            raise GenrecalError(
                f"processes {', '.join(map(str, unlike))} bring other inputs to forward pass {number + 1} of "
                f"{len(passes)} than process 0, and would call other modules; process {processes.rank} has "
                f"{', '.join(_names(passes[number]))}. Every micro-batch needs the fillers of JoinedData: this is a "
                "fault of the data path, not of the samples"
            )


def _signature(inputs: Any) -> float:
    return float(zlib.crc32(" ".join(_names(inputs)).encode()))


def _names(inputs: Any) -> list[str]:
    return sorted(_tensor_names(inputs))


def _tensor_names(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, Tensor):
        yield prefix
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _tensor_names(entry, f"{prefix}.{key}")
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensor_names(getattr(value, field.name), f"{prefix}.{field.name}")
