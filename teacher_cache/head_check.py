"""Checks that a teacher's hidden rows, put through its stored output head, give what its engine said of them."""

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from teacher_cache.errors import TeacherError
from teacher_cache.schema import Span, TeacherHead, TeacherTargets, predicting_rows

HEAD_TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Largest difference between an engine's log-probabilities and those of its hidden rows through the stored head."""
HEAD_CHECK_ROWS: Final = 256
"""Of a whole shard."""
HEAD_CHECK_VOCAB = 512
"""Words whose weights are in float32 at a time, in one piece of memory: about what a processor's cache holds."""

_BLOCK_ROWS: Final = 32
"""Fewer would have the head read too often, with more there is much left to do behind the last sample."""
_GOLDEN_RATIO: Final = (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True)
class ScoredRows:
    """Some predicting rows of one sample, with what the engine said of them."""

    sample_id: str
    rows: Float[Tensor, "rows hidden"]
    target_ids: Int[Tensor, " rows"]
    target_logprobs: Float[Tensor, " rows"]

    @classmethod
    def of(cls, targets: TeacherTargets, *, count: int, phase: float = 0.5) -> "ScoredRows":
        """Return at most ``count`` rows, one of each of equal parts of the answers.

        Args:
            targets: Of the sample.
            count: How many.
            phase: Which row of its part: from 0, the first, to less than 1, the last.
        """
        assert targets.target_logprobs is not None
        predicting = predicting_rows(targets.spans)
        count = min(count, len(predicting))
        chosen = ((np.arange(count) + phase) * len(predicting) / max(count, 1)).astype(np.int64)
        return cls(
            sample_id=targets.sample_id,
            rows=targets.hidden_states[_predicting_in_tier_a(targets.spans)[chosen]],
            target_ids=targets.token_ids[predicting[chosen] + 1].long(),
            target_logprobs=targets.target_logprobs[chosen],
        )


class HeadCheck:
    """The check of one shard, in a thread that works while later samples are computed. To be used as a context manager.

    It takes HEAD_CHECK_ROWS rows or, where the answers have fewer, all of them, spread evenly over the samples.
    """

    def __init__(self, head: TeacherHead, *, num_samples: int) -> None:
        """Begin the check of a shard for which ``num_samples`` are planned."""
        self._head = head
        self._num_samples = num_samples
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="head-check")
        self._checking: deque[Future[float]] = deque()
        self._waiting: list[ScoredRows] = []
        self._num_waiting = self._num_taken = 0
        self._difference = 0.0

    def add(self, targets: TeacherTargets, *, place: int) -> None:
        """Take rows of the sample at this place of the shard, where it is its turn; places ascend.

        Raises:
            TeacherError: Those of an earlier sample disagree.
        """
        # what samples that are skipped or short do not give comes from those behind them
        count = -(-HEAD_CHECK_ROWS * (place + 1) // self._num_samples) - self._num_taken
        if count > 0:
            # one row of each sample must not always be its first
            rows = ScoredRows.of(targets, count=count, phase=_GOLDEN_RATIO * self._num_taken % 1)
            self._waiting.append(rows)
            self._num_taken += len(rows.rows)
            self._num_waiting += len(rows.rows)
        if self._num_waiting >= _BLOCK_ROWS:
            self._submit()
        while self._checking and self._checking[0].done():
            self._take_in()

    def result(self) -> float:
        """Return the largest difference in nats once all rows are checked; 0 without rows.

        Raises:
            TeacherError: Some disagree.
        """
        self._submit()
        while self._checking:
            self._take_in()
        return self._difference

    def __enter__(self) -> "HeadCheck":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        self._checking.append(self._thread.submit(check_head_agrees, self._waiting, head=self._head))
        self._waiting, self._num_waiting = [], 0

    def _take_in(self) -> None:
        self._difference = max(self._difference, self._checking.popleft().result())


def check_head_agrees(parts: Sequence[ScoredRows], *, head: TeacherHead) -> float:
    """Compare hidden rows, put through the stored head, with the engine's own log-probabilities.

    A tap at another layer, rows off by one or another head show at once.

    Returns:
        The largest difference in nats; 0 without rows.

    Raises:
        TeacherError: It exceeds HEAD_TOLERANCE_NATS.
    """
    if not parts:
        return 0.0
    rows = torch.cat([part.rows for part in parts])
    found = head_logprobs(rows, target_ids=torch.cat([part.target_ids for part in parts]), head=head)
    differences = (found - torch.cat([part.target_logprobs for part in parts])).abs()
    difference, tolerance = float(differences.max()), HEAD_TOLERANCE_NATS[rows.dtype]
    if not difference <= tolerance:
        samples = np.repeat([part.sample_id for part in parts], [len(part.rows) for part in parts])
        raise TeacherError(
            f"the engine's log-probabilities and its hidden rows through the teacher's output head differ by "
            f"{difference:.3g} nats in sample {samples[int(differences.nan_to_num(torch.inf).argmax())]}; expected at "
            f"most {tolerance:g}: the head read from the checkpoint is not the one that the engine uses"
        )
    return difference


def head_logprobs(
    rows: Float[Tensor, "rows hidden"], *, target_ids: Int[Tensor, " rows"], head: TeacherHead
) -> Float[Tensor, " rows"]:
    """Return the log-probability of one token per row, in float32, a slice of the vocabulary at a time."""
    rows = rows.float()
    parts, targets = [], torch.empty(len(rows))
    # a new tensor for each slice would cost more than all of the arithmetic
    memory = torch.empty(HEAD_CHECK_VOCAB, rows.shape[1])
    for start in range(0, len(head.weight), HEAD_CHECK_VOCAB):
        stored = head.weight[start : start + HEAD_CHECK_VOCAB]
        weight = memory[: len(stored)].copy_(stored)
        logits = rows @ weight.T
        if head.bias is not None:
            logits += head.bias[start : start + HEAD_CHECK_VOCAB].float()
        logits *= head.logit_scale
        if head.logit_softcap is not None:
            logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
        inside = (target_ids >= start) & (target_ids < start + len(weight))
        targets[inside] = logits[inside, target_ids[inside] - start]
        parts.append(logits.logsumexp(dim=-1))
    return targets - torch.stack(parts).logsumexp(dim=0)


def _predicting_in_tier_a(spans: Iterable[Span]) -> Int[np.ndarray, " answer_tokens"]:
    starts = np.cumsum([0, *(span.stop - span.start + 1 for span in spans)])
    return np.concatenate([np.arange(first, end - 1) for first, end in itertools.pairwise(starts)])
