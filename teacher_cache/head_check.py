"""Checks that a teacher's hidden rows, put through its stored output head, give what its engine said of them."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from teacher_cache.errors import TeacherError
from teacher_cache.schema import Span, TeacherHead, TeacherTargets, predicting_rows

HEAD_TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Largest difference between an engine's log-probabilities and those of its hidden rows through the stored head."""
HEAD_CHECK_ROWS = 256
HEAD_CHECK_VOCAB = 16_384


@dataclass(frozen=True, kw_only=True)
class ScoredRows:
    """Some predicting rows of one sample, with what the engine said of them."""

    sample_id: str
    rows: Float[Tensor, "rows hidden"]
    target_ids: Int[Tensor, " rows"]
    target_logprobs: Float[Tensor, " rows"]

    @classmethod
    def of(cls, targets: TeacherTargets, *, count: int) -> "ScoredRows":
        """Return at most ``count`` rows, evenly spread over the answers."""
        assert targets.target_logprobs is not None
        predicting = predicting_rows(targets.spans)
        chosen = np.linspace(0, len(predicting) - 1, min(len(predicting), count)).round().astype(np.int64)
        return cls(
            sample_id=targets.sample_id,
            rows=targets.hidden_states[_predicting_in_tier_a(targets.spans)[chosen]],
            target_ids=targets.token_ids[predicting[chosen] + 1].long(),
            target_logprobs=targets.target_logprobs[chosen],
        )


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
    for start in range(0, len(head.weight), HEAD_CHECK_VOCAB):
        weight = head.weight[start : start + HEAD_CHECK_VOCAB].float()
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
