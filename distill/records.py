"""Records that hold tensors: dataclasses, dictionaries and tuples, one in the other."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Record = TypeVar("Record")


def to_device(record: Record, device: torch.device) -> Record:
    """Return a record, with every tensor in it, on a device; one that it holds twice is moved once."""
    return map_tensors(record, once_each(lambda tensor: tensor.to(device, non_blocking=True)))


def once_each(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Return a function that gives the same for a tensor that it has seen; its arguments must outlive it."""
    seen: dict[int, Any] = {}

    def call(tensor: Tensor) -> Any:
        if id(tensor) not in seen:
            seen[id(tensor)] = function(tensor)
        return seen[id(tensor)]

    return call


def map_tensors(record: Record, function: Callable[[Any], Any], *, kind: type = Tensor) -> Record:
    """Return a record of dataclasses, dictionaries and tuples with what a function makes of every tensor in it.

    Args:
        record: What holds tensors.
        function: Takes a tensor.
        kind: Take values of this type instead.
    """
    if isinstance(record, kind):
        return cast(Record, function(record))
    if isinstance(record, dict):
        return cast(Record, {key: map_tensors(value, function, kind=kind) for key, value in record.items()})
    if isinstance(record, tuple) and type(record) is tuple:
        return cast(Record, tuple(map_tensors(value, function, kind=kind) for value in record))
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        values = {f.name: map_tensors(getattr(record, f.name), function, kind=kind) for f in dataclasses.fields(record)}
        return cast(Record, type(record)(**values))
    return record
