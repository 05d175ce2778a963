"""Scores the student on held-out conversations while it trains, without any effect on its training.

Batches are cut once, whatever the number of processes; process r takes batches r, r + n, ... of n processes. Each
batch's sum is kept apart and all are added in one order, so the result does not depend on n. Under ZeRO-3 every
process must make the same calls: those with fewer batches repeat one, a batch without an image gets a sample with one
that counts for nothing, and answers are generated until the longest of all processes ends.
"""

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distill.batch import Batch
from distill.config import StudentConfig, ValidationConfig
from distill.engine import Engine
from distill.evaluate import (
    answer_batch,
    answer_texts,
    batches_of,
    by_answer_length,
    by_prompt_length,
    greedy,
    padding_tokenizer,
    prompt_inputs,
)
from distill.joined_sample import JoinedSample
from distill.processes import Processes
from distill.records import to_device
from distill.scoring import SampleRow, bits_per_byte_of, exact_match, reference_answer
from teacher_cache.chat import Processor, encode_conversation, load_processor
from teacher_cache.config import DataConfig
from teacher_cache.errors import DataError, SampleError
from teacher_cache.prefetch import Prefetch
from teacher_cache.samples import check_skip_budget, usable_rows
from teacher_cache.schema import EncodedConversation, Sample, SkippedSample

logger = logging.getLogger(__name__)

BITS_METRIC = "validation/bits_per_byte"
ACCURACY_METRIC = "validation/accuracy"


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Held-out samples, and the processor that encodes them: not the one that training uses in its own thread."""

    config: ValidationConfig
    samples: tuple[Sample, ...]
    processor: Processor
    max_length: int

    @property
    def filler(self) -> Sample | None:
        """A sample with an image, for batches without; None where no sample has one."""
        return next((sample for sample in self.samples if sample.images), None)

    def is_due(self, step: int, *, max_steps: int) -> bool:
        """Whether the student is scored after so many steps."""
        return step in (0, max_steps) or step % self.config.interval_steps == 0


def open_validation(config: ValidationConfig, *, student: StudentConfig, base: Path) -> Validation:
    """Read the held-out samples; ``base`` is the untouched student's directory.

    Raises:
        DataError: A sample cannot be read.
    """
    data, skipped = DataConfig(path=config.data), list[SkippedSample]()
    rows = itertools.islice(usable_rows(data, skipped=skipped), config.max_samples)
    samples = tuple(sample for _, sample in rows)
    check_skip_budget(skipped, allowed=0, source=config.data)
    processor = load_processor(str(base), trust_remote_code=student.trust_remote_code)
    padding_tokenizer(processor)
    return Validation(config=config, samples=samples, processor=processor, max_length=student.max_length)


def validate(validation: Validation, engine: Engine, *, processes: Processes, label: str) -> dict[str, float]:
    """Return the student's scores; every process calls this, and all get the same.

    Raises:
        DataError: A sample does not fit in the student's ``max_length``.
    """
    began = time.perf_counter()
    engine.model.eval()
    # not inference mode: parameters that ZeRO-3 gathers in it could not be trained afterwards
    with torch.no_grad():
        metrics = {BITS_METRIC: _bits_per_byte(validation, engine, processes=processes)}
        if validation.config.generate:
            metrics[ACCURACY_METRIC] = _accuracy(validation, engine, processes=processes)
    if processes.rank == 0:
        told = ", ".join(f"{name.partition('/')[2]} {value:.4f}" for name, value in metrics.items())
        logger.info("%s validation: %s over %d samples", label, told, len(validation.samples))
    return {**metrics, "time/validation_s": time.perf_counter() - began}


def _bits_per_byte(validation: Validation, engine: Engine, *, processes: Processes) -> float:
    ordered = by_prompt_length(validation.samples, processor=validation.processor)
    batches = list(batches_of(ordered, size=validation.config.batch_size))
    share = _share(batches, processes=processes)
    nats, num_bytes = [0.0] * len(batches), [0.0] * len(batches)
    with Prefetch(_encoded(validation, batch) for _, batch in share) as prepared:
        for (index, _), (batch, answer_bytes) in zip(share, prepared, strict=True):
            own = engine.forward(batch=to_device(batch, processes.device), task="answer_nats")
            if index is not None:
                nats[index], num_bytes[index] = float(own), float(answer_bytes)
    # one process alone has each batch, so that these sums add nothing but zeros
    totals = processes.sum([*nats, *num_bytes])
    return bits_per_byte_of(math.fsum(totals[: len(batches)]), num_bytes=int(sum(totals[len(batches) :])))


def _encoded(validation: Validation, samples: Sequence[Sample]) -> tuple[Batch, int]:
    """Return a batch, filled up for ZeRO-3, and the bytes of its answers."""
    encoded = [_encode(validation, sample) for sample in samples]
    joined = [JoinedSample(encoded=conversation, targets=None) for conversation in encoded]
    filler = validation.filler
    if filler is not None and not any(sample.images for sample in samples):
        joined.append(JoinedSample(encoded=_encode(validation, filler), targets=None, weight=0.0))
    return answer_batch(joined), sum(conversation.answer_bytes for conversation in encoded)


def _encode(validation: Validation, sample: Sample) -> EncodedConversation:
    try:
        encoded = encode_conversation(validation.processor, sample, max_length=validation.max_length)
    except SampleError as error:
        raise DataError(
            f"held-out sample {sample.sample_id} of {validation.config.data}: {error}. Raise the student's max_length, "
            "or take the sample out"
        ) from error
    return replace(encoded, images=())


def _accuracy(validation: Validation, engine: Engine, *, processes: Processes) -> float:
    tokenizer, filler = padding_tokenizer(validation.processor), validation.filler
    batches = list(batches_of(by_answer_length(validation.samples), size=validation.config.batch_size))
    right = 0.0
    with _decoding_greedily(engine, processor=validation.processor):
        for index, batch in _share(batches, processes=processes):
            lacks_image = filler is not None and not any(sample.images for sample in batch)
            asked = [*batch, filler] if filler is not None and lacks_image else batch
            inputs = to_device(prompt_inputs(validation.processor, asked), processes.device)
            tokens = engine.forward(task="generate", prompts={**inputs, **_generation(validation, processes)})
            texts = answer_texts(tokenizer, tokens, prompt_length=inputs["input_ids"].shape[1])
            if index is not None:
                right += sum(_score(sample, text) for sample, text in zip(batch, texts, strict=False))
    return processes.sum([right])[0] / len(validation.samples)


def _generation(validation: Validation, processes: Processes) -> dict[str, Any]:
    return {"max_new_tokens": validation.config.max_new_tokens, "synced_gpus": processes.world_size > 1}


def _score(sample: Sample, answer: str) -> float:
    row = SampleRow(sample_id=sample.sample_id, reference=reference_answer(sample), columns={})
    return exact_match(row, answer)


@contextmanager
def _decoding_greedily(engine: Engine, *, processor: Processor) -> Iterator[None]:
    """Put the student's own generation settings aside, and bring them back for its export."""
    student = engine.model.student
    own = student.generation_config
    student.generation_config = greedy(own, processor=processor)
    try:
        yield
    finally:
        student.generation_config = own


def _share(batches: Sequence[Sequence[Sample]], *, processes: Processes) -> list[tuple[int | None, Sequence[Sample]]]:
    """Return this process's batches with their places; all processes get as many, with None for a repeated one."""
    rounds = math.ceil(len(batches) / processes.world_size)
    mine = [turn * processes.world_size + processes.rank for turn in range(rounds)]
    return [(index, batches[index]) if index < len(batches) else (None, batches[-1]) for index in mine]
