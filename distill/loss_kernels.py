"""Triton kernels of `distill.gpu_blocks`: one program per token and chunk of the vocabulary, which stays in registers.

Importing this needs Triton, which comes with torch for CUDA.
"""

from typing import Final

import triton
import triton.language as tl

CHUNK: Final = 4096
"""Vocabulary entries per program."""
KINDS: Final = {"forward_kl": 1, "reverse_kl": 2, "jensen_shannon": 3}
"""Divergences by their number in the kernel; 0 is none."""
BUCKET: Final = 4
"""Stands there for the bucket of a teacher of whom the top-k are known."""


@triton.jit
def normalizer_kernel(logits, peaks, masses, tokens, vocab_size, temperature, chunk_size: tl.constexpr):
    """Write the peak of ``logits / temperature`` and the mass beside it, per chunk and token."""
    chunk, token = tl.program_id(0), tl.program_id(1)
    entries = chunk * chunk_size + tl.arange(0, chunk_size)
    at = token.to(tl.int64) * vocab_size + entries
    values = tl.load(logits + at, mask=entries < vocab_size, other=-float("inf")) / temperature
    peak = tl.maximum(tl.max(values, 0), -3.4028234e38)
    tl.store(peaks + chunk * tokens + token, peak)
    tl.store(masses + chunk * tokens + token, tl.sum(tl.exp(values - peak), 0))


@triton.jit
def terms_kernel(
    student,
    teacher,
    gradient,
    sums,
    labels,
    plain_peak,
    plain_mass,
    q_peak,
    q_mass,
    p_peak,
    p_mass,
    ce_weight,
    divergence_weight,
    mean,
    tokens,
    vocab_size,
    temperature,
    beta,
    logit_scale,
    logit_softcap,
    kind: tl.constexpr,
    with_ce: tl.constexpr,
    with_softcap: tl.constexpr,
    writes: tl.constexpr,
    chunk_size: tl.constexpr,
):
    """Write the chunk's share in the divergence and its mean to ``sums[2, chunks, tokens]``, and its gradient.

    Normalizers are logarithms, as in `distill.teacher_terms.Normalizer`; the formulas are those of
    `distill.divergences`. Sums are not written beside a gradient that needs the mean. Of the bucket's entries only the
    gradient is written: ``q`` normalizes them among themselves, and their weight is that of the bucket's logit.
    """
    chunk, token = tl.program_id(0), tl.program_id(1)
    entries = chunk * chunk_size + tl.arange(0, chunk_size)
    inside = entries < vocab_size
    at = token.to(tl.int64) * vocab_size + entries
    s = tl.load(student + at, mask=inside, other=0.0)
    slope = tl.zeros([chunk_size], tl.float32)
    if kind == 4:
        slope = tl.exp(s - tl.load(q_peak + token) - tl.load(q_mass + token)) * tl.load(divergence_weight + token)
    elif kind > 0:
        t = tl.load(teacher + at, mask=inside, other=0.0)
        log_q = s / temperature - tl.load(q_peak + token) - tl.load(q_mass + token)
        log_p = t / temperature - tl.load(p_peak + token) - tl.load(p_mass + token)
        q = tl.exp(log_q)
        p = tl.exp(log_p)
        if kind == 1:
            value = p * (log_p - log_q)
            expected = value
            slope = q - p
        elif kind == 2:
            value = q * (log_q - log_p)
            expected = value
            if writes:
                slope = q * (log_q - log_p - tl.load(mean + token))
        else:
            teachers = log_p + tl.log(beta)
            students = log_q + tl.log(1 - beta)
            higher = tl.maximum(teachers, students)
            log_m = higher + tl.log(tl.exp(teachers - higher) + tl.exp(students - higher))
            expected = q * (log_q - log_m)
            value = beta * p * (log_p - log_m) + (1 - beta) * expected
            if writes:
                slope = q * (log_q - log_m - tl.load(mean + token)) * (1 - beta)
        if kind == 1 or not writes:
            place = chunk * tokens + token
            tl.store(sums + place, tl.sum(tl.where(inside, value, 0.0), 0))
            tl.store(sums + tl.num_programs(0) * tokens + place, tl.sum(tl.where(inside, expected, 0.0), 0))
        if writes:
            slope = slope / temperature * tl.load(divergence_weight + token)
    if writes:
        if with_ce:
            probability = tl.exp(s - tl.load(plain_peak + token) - tl.load(plain_mass + token))
            is_label = entries == tl.load(labels + token)
            slope += tl.load(ce_weight + token) * tl.where(is_label, probability - 1, probability)
        slope = slope * logit_scale
        if with_softcap:
            # at least -1: top-k that are taken out are -inf
            capped = tl.maximum(s / logit_softcap, -1.0)
            slope = slope * (1 - capped * capped)
        tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=inside)
