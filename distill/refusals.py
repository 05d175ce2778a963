"""What stands for the losses of rows that cannot have any, so that every process finishes the calls others wait in."""

import torch
from jaxtyping import Bool
from torch import Tensor


def nan_of(*tensors: Tensor | None) -> Tensor:
    """Return one NaN that depends on these tensors.

    Its backward pass reaches all that the losses' backward pass reaches: under ZeRO-3 every process has to take part in
    the same collectives, also the one whose rows are bad.
    """
    nan = float("nan") * sum((tensor.sum().float() for tensor in tensors if tensor is not None), start=0.0)
    assert isinstance(nan, Tensor)
    return nan


def are_finite(*tensors: Tensor) -> list[bool]:
    """Tell of each tensor whether all values are finite; waits for the device once."""
    return torch.stack([all_finite(tensor) for tensor in tensors]).tolist()


def all_finite(rows: Tensor) -> Bool[Tensor, ""]:
    """Tell whether all values are finite, from the least and the greatest of them: 20 times as fast as one by one."""
    if rows.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=rows.device)
    return torch.stack(rows.detach().aminmax()).isfinite().all()


def zero_bad(rows: Tensor) -> Tensor:
    """Return the rows with zeros where they are not finite."""
    return torch.where(rows.isfinite(), rows, 0.0)
