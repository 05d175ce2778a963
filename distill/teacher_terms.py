"""What the logits of a block of rows are held against: the targets, and the terms that a teacher contributes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.divergences import Divergence, block_gradient, block_sums
from distill.linear_head import LinearHead, slices

NO_LOGPROB = -1e4
"""Floor of the log-probability of a bucket: its exponential is 0 in any precision, and differences stay finite."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the rows are held against: labels, a teacher, or both."""

    labels: Int[Tensor, " tokens"] | None = None
    divergence: Divergence | None = None
    """From the teacher: `teacher_rows` through `teacher_head`, or `topk_ids` with `topk_logprobs`."""
    teacher_rows: Float[Tensor, "tokens teacher_hidden"] | None = None
    teacher_head: LinearHead | None = None
    """None where both sides share the head."""
    topk_ids: Int[Tensor, "tokens k"] | None = None
    topk_logprobs: Float[Tensor, "tokens k"] | None = None

    @property
    def temperature(self) -> float:
        """Of the divergence; 1 without one."""
        return 1.0 if self.divergence is None else self.divergence.temperature

    def take(self, tokens: slice | Tensor) -> Self:
        """Return the targets of some tokens."""
        per_token = ("labels", "teacher_rows", "topk_ids", "topk_logprobs")
        given = {name: getattr(self, name) for name in per_token if getattr(self, name) is not None}
        return replace(self, **{name: value[tokens] for name, value in given.items()})


class TermWeights(NamedTuple):
    """What each token's terms weigh in the gradient."""

    ce: Float[Tensor, " tokens"]
    divergence: Float[Tensor, " tokens"]

    def take(self, tokens: slice) -> "TermWeights":
        """Return the weights of some tokens."""
        return TermWeights(self.ce[tokens], self.divergence[tokens])


class Normalizer(NamedTuple):
    """What turns logits into log-probabilities: log-sum-exp as ``peak + log_mass``.

    In one float32 the log-sum-exp of large logits would be off by more than the probabilities may be.
    """

    peak: Tensor
    log_mass: Tensor

    def log_probabilities(self, logits: Float[Tensor, "entries tokens"]) -> Float[Tensor, "entries tokens"]:
        """Return ``logits - logsumexp``."""
        return (logits - self.peak).sub_(self.log_mass)

    def take(self, tokens: slice) -> "Normalizer":
        """Return the normalizers of some rows."""
        return Normalizer(self.peak[tokens], self.log_mass[tokens])


class OnlineSoftmax:
    """Collects a normalizer from slices of the vocabulary; however many they are, the sum is rounded once.

    Its memory is there from the start: small tensors that stay, made between large ones that go, scatter the heap.
    """

    def __init__(self, logits: Float[Tensor, "vocab tokens"], chunk: int) -> None:
        self._sums = logits.new_empty(2, -(-logits.shape[0] // chunk), logits.shape[1])
        self._count = 0

    def add(self, logits: Float[Tensor, "entries tokens"]) -> None:
        """Take in the next slice."""
        peak, mass = self._sums[:, self._count]
        torch.amax(logits, 0, out=peak)
        peak.clamp_(min=torch.finfo(peak.dtype).min)
        torch.sum((logits - peak).exp_(), 0, out=mass)
        self._count += 1

    def normalizer(self) -> Normalizer:
        """Return the normalizer of all slices."""
        return join_normalizers(*self._sums)


def chunked_normalizer(logits: Float[Tensor, "vocab tokens"], chunk: int) -> Normalizer:
    """Return the normalizer of logits that are all there."""
    collected = OnlineSoftmax(logits, chunk)
    for vocab in slices(logits.shape[0], chunk):
        collected.add(logits[vocab])
    return collected.normalizer()


def join_normalizers(peaks: Float[Tensor, "slices tokens"], masses: Float[Tensor, "slices tokens"]) -> Normalizer:
    """Return the normalizer of all slices from each one's peak and its mass beside it; the sum is rounded once."""
    peak = peaks.amax(0)
    mass = (masses.double() * (peaks - peak).double().exp()).sum(0)
    return Normalizer(peak, mass.to(peak.dtype).clamp_(min=torch.finfo(peak.dtype).tiny).log_())


class Projection(NamedTuple):
    """Logits of some rows, and their normalizers as they are and at the temperature."""

    logits: Tensor
    plain: Normalizer
    tempered: Normalizer

    def take(self, tokens: slice) -> "Projection":
        """Return the projections of some rows."""
        return Projection(self.logits[:, tokens], self.plain.take(tokens), self.tempered.take(tokens))


class TeacherTerm:
    """The divergence from a teacher whose logits are all there."""

    def __init__(self, student: Projection, teacher: Projection, targets: Targets, chunk: int) -> None:
        assert targets.divergence is not None
        self._divergence = targets.divergence
        self._student, self._teacher, self._chunk = student, teacher, chunk
        self._value: Tensor | None = None
        self._mean: Tensor | float = 0.0
        if self._divergence.gradient_needs_mean:
            self._sum_up()

    def value(self) -> Tensor:
        """Return the divergence of each token. What rounding leaves below zero is noise."""
        if self._value is None:
            self._sum_up()
        assert self._value is not None
        return self._value.clamp(min=0).to(self._student.logits.dtype)

    def gradient(self, vocab: slice) -> Tensor:
        """Return the derivative by the logits of a slice; where it needs no sum beforehand, the value is summed too."""
        log_q, log_p = self._log_probabilities(vocab)
        if not self._divergence.gradient_needs_mean:
            self._add(*block_sums(self._divergence, log_q, log_p))
        gradient = block_gradient(self._divergence, log_q, log_p, self._mean)
        return gradient if self._divergence.temperature == 1 else gradient.div_(self._divergence.temperature)

    def _sum_up(self) -> None:
        for vocab in slices(self._student.logits.shape[0], self._chunk):
            self._add(*block_sums(self._divergence, *self._log_probabilities(vocab)))

    def _add(self, value: Tensor, mean: Tensor | float) -> None:
        # in float64, so that many small chunks round no more than few large ones
        if self._value is None:
            self._value = value.to(torch.float64, copy=True)
            self._mean = mean.to(torch.float64, copy=True) if isinstance(mean, Tensor) else mean
        else:
            self._value += value
            self._mean += mean

    def _log_probabilities(self, vocab: slice) -> tuple[Tensor, Tensor]:
        temperature = self._divergence.temperature
        student, teacher = (
            side.tempered.log_probabilities(
                side.logits[vocab] if temperature == 1 else side.logits[vocab] / temperature
            )
            for side in (self._student, self._teacher)
        )
        return student, teacher


class TopkTerm:
    """The divergence from a teacher of whom the top-k are known: k entries, and all others as one bucket.

    The temperature acts on those ``k + 1`` masses, since the teacher's tail has no finer form. The logits at the top-k
    are taken out (-inf) until the gradient is written there.
    """

    def __init__(self, student: Projection, targets: Targets, normalize: Callable[[Tensor], Normalizer]) -> None:
        assert targets.divergence is not None
        assert targets.topk_ids is not None
        assert targets.topk_logprobs is not None
        logits = student.logits
        self._student = student
        self._ids = targets.topk_ids.T.long().clamp(0, logits.shape[0] - 1)
        self._topk = logits.gather(0, self._ids)
        logits.scatter_(0, self._ids, -torch.inf)
        self.rest = normalize(logits)
        temperature = targets.divergence.temperature
        buckets = torch.cat([self._topk, (self.rest.peak + self.rest.log_mass)[None]])
        log_q = (buckets / temperature).log_softmax(0).clamp(min=NO_LOGPROB)
        log_p = (_teacher_buckets(targets.topk_logprobs.T, logits.shape[0]) / temperature).log_softmax(0)
        log_p = log_p.to(logits.dtype).clamp_(min=NO_LOGPROB)
        sums = block_sums(targets.divergence, log_q, log_p)
        self._value = sums.value.clamp(min=0)
        self._slopes = block_gradient(targets.divergence, log_q, log_p, sums.mean).div_(temperature)

    @property
    def rest_slope(self) -> Float[Tensor, " tokens"]:
        """Derivative by the logit of the bucket; each of its entries gets its share."""
        return self._slopes[-1]

    def value(self) -> Tensor:
        """Return the divergence of each token."""
        return self._value

    def gradient(self, vocab: slice) -> Tensor:
        """Return the derivative by the logits of a slice, zero at the top-k."""
        return self.rest.log_probabilities(self._student.logits[vocab]).exp_().mul_(self.rest_slope)

    def write_topk(
        self, gradient: Tensor, weights: TermWeights, *, with_ce: bool, head: LinearHead, labels: Tensor | None = None
    ) -> None:
        """Write the gradient at the top-k; where labels are given, with what the cross-entropy has there besides."""
        at_topk = self._slopes[:-1] * weights.divergence
        if with_ce:
            at_topk += self._student.plain.log_probabilities(self._topk).exp_().mul_(weights.ce)
        if labels is not None:
            at_topk -= (self._ids == labels) * weights.ce
        gradient.scatter_(0, self._ids, (at_topk * head.slope(self._topk)).to(gradient.dtype))


def _teacher_buckets(topk_logprobs: Float[Tensor, "k tokens"], vocab_size: int) -> Float[Tensor, "buckets tokens"]:
    """Append what the top-k leave: ``log(1 - sum p_i)``."""
    topk_logprobs = topk_logprobs.double()
    rest = (1 - topk_logprobs.exp().sum(0, keepdim=True)).clamp_(min=0).log_()
    if len(topk_logprobs) == vocab_size:
        rest.fill_(-torch.inf)
    return torch.cat([topk_logprobs, rest])
