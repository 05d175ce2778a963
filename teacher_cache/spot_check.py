"""Spot checks: before a build, plain transformers computes a few samples whose targets are compared as they come.

Nothing is committed that lies beyond the tolerance, and the largest differences stand in the commit records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from teacher_cache.config import Dtype
from teacher_cache.errors import SpotCheckMismatch
from teacher_cache.schema import Span, TeacherTargets

TOLERANCE: dict[Dtype, float] = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest relative L2 difference of a sample's hidden states. Two engines that round to bfloat16 in every layer differ
by about 3e-2; another layer, another row or another preprocessing of an image differs by more than 3e-1."""
REFERENCE_ROWS: Final = 64
_DIGITS = slice(13, 26)


@dataclass(frozen=True, kw_only=True)
class ReferenceRows:
    """What the reference says of one sample: its tokens, and some of its answer rows."""

    sample_id: str
    token_ids: Int[Tensor, " tokens"]
    spans: tuple[Span, ...]
    places: Int[np.ndarray, " rows"]
    """Of the rows in tier A."""
    rows: Float[Tensor, "rows hidden"]
    target_logprobs: Float[Tensor, " answer_tokens"]

    @classmethod
    def of(cls, targets: TeacherTargets) -> "ReferenceRows":
        """Return at most REFERENCE_ROWS rows, evenly spread over tier A, the first and the last among them."""
        assert targets.target_logprobs is not None
        count = len(targets.hidden_states)
        places = np.linspace(0, count - 1, min(count, REFERENCE_ROWS)).round().astype(np.int64)
        return cls(
            sample_id=targets.sample_id,
            token_ids=targets.token_ids,
            spans=targets.spans,
            places=places,
            rows=targets.hidden_states[places].clone(),
            target_logprobs=targets.target_logprobs,
        )


@dataclass(frozen=True, kw_only=True)
class SpotCheck:
    """What the spot checks of one or more samples have found."""

    samples: int = 0
    hidden_relative_l2: float = 0.0
    """Largest over the samples."""
    logprob_difference_nats: float = 0.0
    """Largest over the answer tokens."""

    @classmethod
    def merged(cls, parts: "Sequence[SpotCheck]") -> "SpotCheck":
        """Return the checks of all parts together."""
        return cls(
            samples=sum(part.samples for part in parts),
            hidden_relative_l2=max((part.hidden_relative_l2 for part in parts), default=0.0),
            logprob_difference_nats=max((part.logprob_difference_nats for part in parts), default=0.0),
        )


def is_spot_checked(digest: str, *, every: int) -> bool:
    """Tell whether a sample is computed twice: a fixed choice by its content, one in ``every``; 0 chooses none."""
    return every > 0 and int(digest[_DIGITS], 16) % every == 0


def compare_with_reference(found: TeacherTargets, reference: ReferenceRows, *, tolerance: float) -> SpotCheck:
    """Compare a sample's targets with those of the reference.

    Raises:
        SpotCheckMismatch: Their tokens differ, or their hidden states by more than ``tolerance`` (relative L2).
    """
    where = f"spot check of sample {found.sample_id}"
    if found.spans != reference.spans or not torch.equal(found.token_ids.long(), reference.token_ids.long()):
        raise SpotCheckMismatch(f"{where}: the engine saw other tokens or answer spans than plain transformers does")
    expected = reference.rows.double()
    distance = float((found.hidden_states[reference.places].double() - expected).norm() / expected.norm())
    if not distance <= tolerance:
        raise SpotCheckMismatch(
            f"{where}: its hidden states differ from those of plain transformers by {distance:.3g} (relative L2), "
            f"expected at most {tolerance:g}; compare the versions of the engine and of transformers, the dtype and "
            "the image processing, or raise `cache.build.spot_check_tolerance` if the difference is understood"
        )
    assert found.target_logprobs is not None
    difference = float((found.target_logprobs - reference.target_logprobs).abs().max())
    return SpotCheck(samples=1, hidden_relative_l2=distance, logprob_difference_nats=difference)
