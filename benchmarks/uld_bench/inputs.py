"""One answer as two tokenizers might cut it, with random logits."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SPLIT_SHARE = 0.3
"""Words that a tokenizer cuts in two."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """The answer tokens of one model; row t of the logits predicts token t."""

    logits: Tensor
    ids: Tensor
    ends: np.ndarray
    """Byte of the text where each token ends; the last token is the end of the turn."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One text on both sides."""

    student: Side
    teacher: Side


def make_answer(tokens: int, *, student_vocab: int, teacher_vocab: int, seed: int = 0) -> Answer:
    """Make an answer of about so many student tokens: words of 2 to 7 bytes, each side cutting some of them in two."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 8, size=round(tokens / (1 + SPLIT_SHARE)))
    return Answer(
        student=_side(lengths, vocab=student_vocab, rng=rng), teacher=_side(lengths, vocab=teacher_vocab, rng=rng)
    )


def _side(lengths: np.ndarray, *, vocab: int, rng: np.random.Generator) -> Side:
    ends = np.cumsum(lengths)
    cut = rng.random(len(lengths)) < SPLIT_SHARE
    inside = ends[cut] - rng.integers(1, lengths[cut])
    ends = np.concatenate([np.sort(np.concatenate([ends, inside])), ends[-1:]])
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    return Side(
        logits=3 * torch.randn(len(ends), vocab, generator=generator),
        ids=torch.randint(vocab, (len(ends),), generator=generator),
        ends=ends,
    )
