"""Records that hold tensors: dataclasses, dictionaries and tuples, one in the other."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Record = TypeVar("Record")


def to_device(record: Record, device: torch.device) -> Record:
    """Return a record, with every tensor in it, on a device."""
    return map_tensors(record, lambda tensor: tensor.to(device, non_blocking=True))


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
