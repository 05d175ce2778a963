"""Checks of what goes into the losses through a head. Errors name shapes, the row and its sample.

Shapes are compared on the host. Values (labels and ids within the vocabulary, finite rows) cost one pass over the rows,
next to nothing beside a product with the vocabulary. On a GPU their verdict is copied to the host ahead of the loss's
own kernels and read when those are queued, so that the device never waits for the check.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.linear_head import LinearHead
from distill.refusals import all_finite

NAMED_SAMPLES = 3


class BadRows(ValueError):
    """Values that no loss can be made of: rows that are not finite, labels or ids outside the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class RowInputs:
    """The tensors with one entry per token."""

    rows: Tensor
    labels: Tensor | None
    teacher_rows: Tensor | None
    topk_ids: Tensor | None
    topk_logprobs: Tensor | None
    sample_ids: Sequence[str] | None
    """The sample of each row; read only where an error names it."""


def check_shapes(inputs: RowInputs, *, head: LinearHead, teacher_head: LinearHead) -> None:
    """Compare lengths and widths.

    Raises:
        ValueError: They do not fit, or something is given that must not be.
    """
    named = {name: value for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in named.items())
    shapes += f", weight {list(head.weight.shape)}" + _samples(inputs.sample_ids)
    tokens = inputs.rows.shape[0]
    for name, value in named.items():
        if value.shape[0] != tokens:
            raise ValueError(
                f"{name} and rows differ in length: expected {tokens} tokens as in rows, found {value.shape[0]} "
                f"({shapes}). Select the same supervised tokens on both sides"
            )
    if inputs.sample_ids is not None and len(inputs.sample_ids) != tokens:
        raise ValueError(f"sample_ids must name the sample of each row: expected {tokens}, found {shapes}")
    for name, given, read_by in (("rows", inputs.rows, head), ("teacher_rows", inputs.teacher_rows, teacher_head)):
        if given is not None and given.shape[1] != read_by.weight.shape[1]:
            raise ValueError(
                f"the head is of another width than {name}: its weight {list(read_by.weight.shape)} expects "
                f"{read_by.weight.shape[1]} columns, found {given.shape[1]} ({shapes}). Check that rows and "
                "head belong to one model"
            )
    if inputs.teacher_rows is not None and teacher_head.vocab_size != head.vocab_size:
        raise ValueError(
            f"a divergence needs one vocabulary: the head has {head.vocab_size} entries, the teacher's "
            f"{teacher_head.vocab_size} ({shapes})"
        )
    if (inputs.topk_ids is None) != (inputs.topk_logprobs is None) or (
        inputs.topk_ids is not None
        and inputs.topk_logprobs is not None
        and inputs.topk_ids.shape != inputs.topk_logprobs.shape
    ):
        raise ValueError(f"topk_ids and topk_logprobs belong together and have one shape: found {shapes}")


class ValueCheck:
    """Looks for rows with bad values; the verdict can be read later."""

    def __init__(self, inputs: RowInputs, *, vocab_size: int) -> None:
        self._inputs = inputs
        self._vocab_size = vocab_size
        rows = [rows for rows in (inputs.rows, inputs.teacher_rows) if rows is not None]
        self._any_bad = torch.stack(
            [*(~all_finite(one) for one in rows), *(bad.any() for bad in self._bad_ids().values())]
        ).any()
        self._on_host, self._copied = self._any_bad, None
        if self._any_bad.is_cuda:
            self._on_host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(self._any_bad, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def is_ready(self) -> bool:
        """Whether reading the verdict waits for nothing."""
        return self._copied is None

    def raise_if_bad(self) -> None:
        """Read the verdict.

        Raises:
            BadRows: The first bad row, its sample and its values.
        """
        if self._copied is not None:
            self._copied.synchronize()
        if not self._on_host:
            return
        for problem, bad in self._bad_rows().items():
            if bad.any():
                row = int(bad.nonzero()[0, 0])
                raise BadRows(self._message(problem, row=row, count=int(bad.sum())))

    def _bad_rows(self) -> dict[str, Tensor]:
        """Return, per problem, which rows have it."""
        named = {"rows": self._inputs.rows, "teacher_rows": self._inputs.teacher_rows}
        return {
            **{name: ~rows.isfinite().all(1) for name, rows in named.items() if rows is not None},
            **self._bad_ids(),
        }

    def _bad_ids(self) -> dict[str, Tensor]:
        """Return the same for what is cheap to look at one by one: labels and the teacher's top-k."""
        inputs, found = self._inputs, {}
        if inputs.labels is not None:
            found["labels"] = (inputs.labels < 0) | (inputs.labels >= self._vocab_size)
        if inputs.topk_ids is not None and inputs.topk_logprobs is not None:
            found["topk_ids"] = ((inputs.topk_ids < 0) | (inputs.topk_ids >= self._vocab_size)).any(1)
            found["topk_logprobs"] = ~(inputs.topk_logprobs <= 1e-3).all(1)
        return found

    def _message(self, problem: str, *, row: int, count: int) -> str:
        inputs = self._inputs
        value = getattr(inputs, problem).detach()
        where = f"row {row} of {list(value.shape)}"
        if inputs.sample_ids is not None:
            where += f", sample {inputs.sample_ids[row]}"
        where += f"; {count} such row{'s' if count > 1 else ''}"
        last = self._vocab_size - 1
        if problem == "labels":
            return (
                f"labels outside the head's vocabulary: expected 0..{last}, found {int(value[row])} ({where}). Select "
                "the supervised rows first; check that head and token ids come from one model"
            )
        if problem == "topk_ids":
            return f"topk_ids outside the head's vocabulary: expected 0..{last}, found {value[row].tolist()} ({where})"
        if problem == "topk_logprobs":
            return f"topk_logprobs must be log-probabilities: expected at most 0, found {value[row].tolist()} ({where})"
        bad = value[row][~value[row].isfinite()]
        return (
            f"{problem} not finite: expected finite numbers, found {float(bad[0])} in {bad.numel()} of "
            f"{value.shape[1]} columns ({where}). Look for what produced that row before it reached the loss"
        )


def _samples(sample_ids: Sequence[str] | None) -> str:
    if not sample_ids:
        return ""
    names = list(dict.fromkeys(sample_ids))
    more = f" and {len(names) - NAMED_SAMPLES} more" if len(names) > NAMED_SAMPLES else ""
    return f"; samples {', '.join(names[:NAMED_SAMPLES])}{more}"
