"""Spare the last decoder block what nobody reads: its feed-forward part runs at the needed rows alone.

Attention needs keys and values of all rows, but after it a row of the last block depends on itself alone, and only
the rows that predict an answer token are read. The other rows come out without their feed-forward part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn


def run_at_rows(
    block: nn.Module,
    rows: Int[Tensor, " needed_rows"],
    hidden_states: Float[Tensor, "1 joint_tokens student_hidden"],
    **arguments: Any,
) -> Float[Tensor, "1 joint_tokens student_hidden"]:
    """Run a decoder block whose output is read at these rows only; at them it is the block's own."""
    feed_forward = getattr(block, "mlp", None)
    # what experts receive decides how a batch is split among them, so they get it whole
    if not isinstance(feed_forward, nn.Module) or hasattr(feed_forward, "experts"):
        return block(hidden_states, **arguments)
    with _at_rows(feed_forward, rows, num_rows=hidden_states.shape[1]):
        return block(hidden_states, **arguments)


@contextmanager
def _at_rows(module: nn.Module, rows: Tensor, *, num_rows: int) -> Iterator[None]:
    def select(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].index_select(1, rows),)

    def spread(_: nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
        return output.new_zeros(1, num_rows, output.shape[-1]).index_copy(1, rows, output)

    hooks = [module.register_forward_pre_hook(select), module.register_forward_hook(spread)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
