"""Which samples form which step, whose they are, and how they are cut into micro-batches. Pure functions."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from distill.config import STAGES, Stage
from teacher_cache.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """Which samples form which global batch: a pure function of the seed, the stage and the step.

    Every epoch is a permutation of its own, and the epochs form one endless stream. Step p takes its positions
    ``[p * global_batch_size, (p + 1) * global_batch_size)``, so that a batch may hold the end of one epoch and the
    begin of the next, and every sample comes exactly once in each epoch.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    stage: Stage

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch_size:
            raise ConfigError(
                f"stage {self.stage} has {self.num_samples} samples, fewer than its global_batch_size of "
                f"{self.global_batch_size}: lower it or bring more data"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every sample has come at least once."""
        return -(-self.num_samples // self.global_batch_size)

    def step(self, step: int) -> Int[np.ndarray, " global_batch_size"]:
        """Return the sample indices of one global batch, in order."""
        epoch, start = divmod(step * self.global_batch_size, self.num_samples)
        indices = self._epoch(epoch)[start : start + self.global_batch_size]
        rest = self.global_batch_size - len(indices)
        return np.concatenate([indices, self._epoch(epoch + 1)[:rest]]) if rest else indices

    def _epoch(self, epoch: int) -> Int[np.ndarray, " num_samples"]:
        return _permutation((self.seed, STAGES.index(self.stage), epoch), self.num_samples)


def deal(
    lengths: Int[np.ndarray, " samples"], *, num_ranks: int, even_samples: bool
) -> list[Int[np.ndarray, " share"]]:
    """Share a global batch out: positions in it per process, in order.

    Longest first, each sample goes to the process that has the fewest tokens so far. The tokens of two shares then
    differ by at most the longest sample.

    Args:
        lengths: Tokens of each sample.
        num_ranks: Processes.
        even_samples: Deal in rounds in which every process gets one, so that shares differ by at most one sample, and
            what processes do at the same time is about as long. Tokens are more even without it.
    """
    tokens, owner = lengths.tolist(), np.zeros(len(lengths), dtype=np.int64)
    lightest_first = [(0, rank) for rank in range(num_ranks)]
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    dealt_at_once = num_ranks if even_samples else 1
    for start in range(0, len(tokens), dealt_at_once):
        dealt = longest_first[start : start + dealt_at_once]
        takers = [heapq.heappop(lightest_first) for _ in dealt]
        for index, (held, rank) in zip(dealt, takers, strict=True):
            owner[index] = rank
            heapq.heappush(lightest_first, (held + tokens[index], rank))
    return [np.flatnonzero(owner == rank) for rank in range(num_ranks)]


def split(num_samples: int, *, most_samples: int, fits: Callable[[int, int], bool]) -> list[range]:
    """Cut a share into micro-batches: as many samples as may be, at least one.

    Args:
        num_samples: Samples in the share.
        most_samples: Samples in a micro-batch, at most.
        fits: Whether the samples from a first up to, but without, a last one keep to the other limits together.
    """
    cuts = [0]
    for stop in range(1, num_samples):
        if stop - cuts[-1] == most_samples or not fits(cuts[-1], stop + 1):
            cuts.append(stop)
    return [range(start, stop) for start, stop in zip(cuts, [*cuts[1:], num_samples], strict=True) if stop > start]


@lru_cache(maxsize=2)
def _permutation(seed: tuple[int, ...], num_samples: int) -> Int[np.ndarray, " num_samples"]:
    # a batch that holds the end of an epoch needs two of them
    permutation = np.random.default_rng(seed).permutation(num_samples)
    permutation.flags.writeable = False
    return permutation
