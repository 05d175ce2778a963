"""Updates that are not made: losses and gradients that are not finite, or far from those before.

What is looked at is the same on every process, and so is the verdict.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TextIO, TypeVar

import torch

from distill.config import FaultConfig
from distill.metrics import keep_steps
from distill.processes import Processes
from teacher_cache.errors import GenrecalError

T = TypeVar("T")

MAD_TO_SIGMA = 1.4826
"""Turns a median absolute deviation into a standard deviation, for normal values."""
LEAST_SPREAD = 0.25
"""Share of the median: values that hardly vary make no spike of a small step."""
NAMED_SAMPLES = 8
"""In the log; the file names all."""


@dataclass(frozen=True, kw_only=True)
class FaultState:
    """What the verdict on the next update depends on, and how many were skipped."""

    losses: tuple[float, ...] = ()
    """Of the last updates that were made."""
    grad_norms: tuple[float, ...] = ()
    skipped_updates: int = 0
    consecutive_skips: int = 0

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "FaultState":
        """Return what `asdict` and JSON made of a state."""
        return cls(**body | {name: tuple(body[name]) for name in ("losses", "grad_norms")})

    def made(self, loss: float, grad_norm: float, *, window: int) -> "FaultState":
        """Return the state after an update."""
        return replace(
            self,
            losses=(*self.losses, loss)[-window:],
            grad_norms=(*self.grad_norms, grad_norm)[-window:],
            consecutive_skips=0,
        )

    def skipped(self) -> "FaultState":
        """Return the state after an update that was not made; its values are no measure for others."""
        return replace(self, skipped_updates=self.skipped_updates + 1, consecutive_skips=self.consecutive_skips + 1)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process had in an update."""

    rank: int
    sample_ids: tuple[str, ...]
    reasons: tuple[str, ...] = ()
    """Why losses refused their rows."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One update that was not made."""

    global_step: int
    kind: str
    loss: float | None
    """None unless finite."""
    grad_norm: float | None
    limit: float | None
    """What a spike exceeded."""
    shares: tuple[Share, ...]
    """Of the processes whose losses are not finite; of all where that says nothing."""

    def __str__(self) -> str:
        parts = []
        for share in self.shares:
            names = ", ".join(share.sample_ids[:NAMED_SAMPLES])
            more = len(share.sample_ids) - NAMED_SAMPLES
            parts.append(f"rank {share.rank} had samples {names}" + (f" and {more} more" if more > 0 else ""))
            parts += [f"rank {share.rank}: {reason}" for reason in share.reasons[:1]]
        limit = "" if self.limit is None else f", limit {self.limit:.4g}"
        return f"{self.kind} (loss {self.loss}, gradient norm {self.grad_norm}{limit}); " + "; ".join(parts)


def find_fault(state: FaultState, *, loss: float, grad_norm: float, config: FaultConfig) -> tuple[str, float | None]:
    """Return what is wrong with an update and the limit that it exceeds; an empty word when nothing is."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            return f"{name} not finite", None
    for name, value, history in (("loss", loss, state.losses), ("gradient norm", grad_norm, state.grad_norms)):
        limit = spike_limit(history, config=config)
        if value > limit:
            return f"{name} spike", limit
    return "", None


def spike_limit(history: Sequence[float], *, config: FaultConfig) -> float:
    """Return the largest value that is no spike: the median and ``spike_factor`` times the spread above it.

    The spread is the median absolute deviation as a standard deviation, at least a quarter of the median. A few wild
    values among many move neither.
    """
    if config.spike_factor == 0 or len(history) < config.spike_min_steps:
        return math.inf
    middle = median(history)
    spread = MAD_TO_SIGMA * median(abs(value - middle) for value in history)
    return middle + config.spike_factor * max(spread, LEAST_SPREAD * abs(middle))


def gather(value: T, processes: Processes) -> tuple[T, ...]:
    """Return what each process gives; every process calls this."""
    if processes.world_size == 1:
        return (value,)
    values: list[Any] = [None] * processes.world_size
    torch.distributed.all_gather_object(values, value)
    return tuple(values)


def too_many_skips(state: FaultState, fault: Fault, *, label: str) -> GenrecalError:
    """Return the error that ends a run whose updates cannot be made."""
    return GenrecalError(
        f"{label}: {state.consecutive_skips} updates in a row were not made, more than "
        f"train.faults.max_consecutive_skips; the last, step {fault.global_step}: {fault}. A checkpoint from before "
        "the first of them is kept: look at these samples, raise train.faults.max_consecutive_skips or spike_factor, "
        "and start again; or begin the stage anew with a lower learning rate."
    )


class FaultsFile:
    """Append-only faults.jsonl of one stage, one JSON object per update that was not made; without a path, nothing."""

    def __init__(self, path: Path | None, *, start_step: int) -> None:
        self._file: TextIO | None = None
        if path is not None:
            keep_steps(path, until=start_step)
            self._file = path.open("a")

    def write(self, fault: Fault) -> None:
        """Append one fault."""
        if self._file is not None:
            self._file.write(json.dumps(asdict(fault)) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def finite(value: float) -> float | None:
    """Return a value, or None where JSON has none for it."""
    return value if math.isfinite(value) else None
