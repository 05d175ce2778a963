"""Evaluate any Hugging Face model directory, student or teacher, on held-out conversations.

Answers come from batched greedy generation. Bits per byte are teacher-forced: the nats of all answer
tokens over ln 2 and over the UTF-8 bytes of the answer text, so that models with different tokenizers
compare. The nats of the end-of-turn token count, so that a model pays for where it expects the end.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from jaxtyping import Int
from PIL.Image import Image
from torch import Tensor

from distill.batch import Batch, collate
from distill.joined_sample import JoinedSample
from distill.records import to_device
from distill.scoring import (
    EvaluationResult,
    Scorer,
    accuracy_by_family,
    agreement,
    bits_per_byte_of,
    exact_match,
    read_sample_rows,
    reference_answer,
    write_result,
)
from distill.student import load_student, resolve_model
from teacher_cache.chat import (
    Processor,
    encode_conversation,
    end_of_turn,
    load_processor,
    render_prompt,
    tokenizer_of,
)
from teacher_cache.config import DataConfig, Dtype
from teacher_cache.progress import progress
from teacher_cache.samples import decode_image, read_samples
from teacher_cache.schema import THINKING_STOP, EncodedConversation, Sample

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How a model is run: none of it changes the result beyond rounding, but ``max_new_tokens`` cuts answers."""

    batch_size: int
    max_new_tokens: int
    dtype: Dtype = "float32"
    """Element type in which the model computes: float32 loses nothing of any checkpoint."""
    device: str | None = None
    """Torch device; by default the GPU where there is one."""
    revision: str | None = None
    """Commit of the repository; not used for a directory."""
    trust_remote_code: bool = False
    """Run Python code that ships with the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ChatModel:
    """A model ready to answer, with its processor."""

    model: transformers.PreTrainedModel
    processor: Processor


def evaluate_model(
    model: str | Path,
    *,
    name: str,
    data: DataConfig,
    settings: EvaluationSettings,
    output_path: Path | None = None,
    scorer: Scorer = exact_match,
    teacher_answers: Mapping[str, str] | None = None,
) -> EvaluationResult:
    """Answer and score every sample of ``data``; write the result to ``output_path``.

    Args:
        model: Directory, or repository id, of a student or teacher.
        name: Name of the model in the result.
        data: Held-out conversations; the last answer of each is what the model is asked for.
        settings: How to run the model.
        output_path: JSON file to write.
        scorer: Judges one answer; see ``Scorer``.
        teacher_answers: ``answers`` of the teacher's own result, for the agreement with it.
    """
    chat = load_chat_model(model, settings=settings)
    samples = read_samples(data).samples
    rows = read_sample_rows(data, samples=samples)
    answers = generate_answers(chat, samples=samples, settings=settings)
    scores = {row.sample_id: float(scorer(row, answers[row.sample_id])) for row in rows}
    result = EvaluationResult(
        name=name,
        num_samples=len(samples),
        accuracy=sum(scores.values()) / len(scores),
        accuracy_by_family=accuracy_by_family(rows, scores=scores),
        bits_per_byte=bits_per_byte(chat, samples=samples, max_length=data.max_length, settings=settings),
        teacher_agreement=None if teacher_answers is None else agreement(answers, teacher_answers=teacher_answers),
        answers=answers,
        scores=scores,
    )
    if output_path is not None:
        write_result(result, output_path)
    return result


def load_chat_model(model: str | Path, *, settings: EvaluationSettings) -> ChatModel:
    """Load a model, with all its weights, and its processor for greedy decoding.

    Raises:
        ConfigError: The checkpoint lacks weights, or its tokenizer has no chat template.
    """
    path = resolve_model(str(model), revision=settings.revision)
    processor = load_processor(str(path), trust_remote_code=settings.trust_remote_code)
    padding_tokenizer(processor)
    loaded = load_student(path, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
    loaded.generation_config = greedy(loaded.generation_config, processor=processor)
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return ChatModel(model=loaded.to(device).eval(), processor=processor)  # type: ignore[arg-type]


def padding_tokenizer(processor: Processor) -> Any:
    """Return the processor's tokenizer, with a token to pad prompts with."""
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def greedy(own: transformers.GenerationConfig, *, processor: Processor) -> transformers.GenerationConfig:
    """Return a checkpoint's settings for greedy decoding, which ends where an answer of the chat template ends too.

    They are replaced whole: its sampling settings (temperature, repetition penalty) fill what a call leaves open.
    """
    tokenizer = tokenizer_of(processor)
    ends = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    known = [ends] if isinstance(ends, int) else list(ends or ())
    return transformers.GenerationConfig(
        do_sample=False,
        eos_token_id=list(dict.fromkeys(end for end in (*known, end_of_turn(processor)) if end is not None)) or None,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.inference_mode()
def generate_answers(chat: ChatModel, *, samples: Sequence[Sample], settings: EvaluationSettings) -> dict[str, str]:
    """Answer the last question of each sample greedily; return the answers by sample id, in the samples' order."""
    answers: dict[str, str] = {}
    tokenizer = tokenizer_of(chat.processor)
    ordered = by_answer_length(samples)
    with progress(total=len(samples), unit="sample", description="answer") as bar:
        for batch in batches_of(ordered, size=settings.batch_size):
            inputs = to_device(prompt_inputs(chat.processor, batch), chat.model.device)
            tokens = chat.model.generate(**inputs, max_new_tokens=settings.max_new_tokens)  # type: ignore[operator]
            texts = answer_texts(tokenizer, tokens, prompt_length=inputs["input_ids"].shape[1])
            answers |= {sample.sample_id: text for sample, text in zip(batch, texts, strict=True)}
            bar.update(len(batch))
    return {sample.sample_id: answers[sample.sample_id] for sample in samples}


@torch.inference_mode()
def bits_per_byte(
    chat: ChatModel, *, samples: Sequence[Sample], max_length: int, settings: EvaluationSettings
) -> float:
    """Return the bits that the model needs per UTF-8 byte of all reference answers.

    Raises:
        SampleError: A sample does not fit in ``max_length`` tokens of this model.
    """
    total_nats, total_bytes = 0.0, 0
    ordered = by_prompt_length(samples, processor=chat.processor)
    with progress(total=len(samples), unit="sample", description="bits per byte") as bar:
        for batch in batches_of(ordered, size=settings.batch_size):
            encoded = [encode_conversation(chat.processor, sample, max_length=max_length) for sample in batch]
            total_nats += _answer_nats(chat, encoded)
            total_bytes += sum(conversation.answer_bytes for conversation in encoded)
            bar.update(len(batch))
    return bits_per_byte_of(total_nats, num_bytes=total_bytes)


def _answer_nats(chat: ChatModel, conversations: Sequence[EncodedConversation]) -> float:
    """Return the summed cross-entropy of the answers, their thinking left out, in nats."""
    joined = [JoinedSample(encoded=conversation, targets=None) for conversation in conversations]
    student = to_device(answer_batch(joined).student, chat.model.device)
    width = student.input_ids.shape[1]
    # the head runs only at positions where some sample of the batch has an answer
    kept, kept_index = (student.predicting_rows % width).unique(return_inverse=True)
    logits = chat.model(
        input_ids=student.input_ids,
        attention_mask=student.attention_mask,
        **student.model_inputs,
        logits_to_keep=kept,
        use_cache=False,
    ).logits
    rows = logits[student.predicting_rows // width, kept_index].float()
    nats = torch.nn.functional.cross_entropy(rows, student.labels, reduction="none").double()
    return float((nats * student.weights).sum())


def answer_batch(samples: Sequence[JoinedSample]) -> Batch:
    """Return the batch in which a model's own answers are predicted; tokens of thinking weigh nothing."""
    batch = collate(
        samples,
        with_answers=True,
        with_recalibrator=False,
        with_regularization=False,
        include_boundary_row=True,
    )
    weights = batch.student.weights.clone()
    start = 0
    for encoded in (sample.encoded for sample in samples):
        for span, thinking in zip(encoded.spans, encoded.num_thinking, strict=True):
            weights[start : start + thinking] = 0.0
            start += span.stop - span.start
    return replace(batch, student=replace(batch.student, weights=weights))


def prompt_inputs(processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Encode prompts for generation: padded on the left, so that every row goes on at the same position."""
    texts = [render_prompt(processor, sample) for sample in samples]
    images = [decode_image(image, sample_id=sample.sample_id) for sample in samples for image in sample.images]
    return encode_prompts(processor, texts, images=images)


def encode_prompts(processor: Processor, texts: Sequence[str], *, images: Sequence[Image]) -> dict[str, Tensor]:
    """Encode rendered prompts, with the images of all of them in their order."""
    encoded = processor(
        text=list(texts),
        **({"images": list(images)} if images else {}),
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return dict(encoded)


def answer_texts(tokenizer: Any, tokens: Int[Tensor, "batch tokens"], *, prompt_length: int) -> list[str]:
    """Return what was generated behind prompts of one length, as text without thinking."""
    texts = tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
    return [text.rpartition(THINKING_STOP)[2].strip() for text in texts]


def by_answer_length(samples: Sequence[Sample]) -> list[Sample]:
    """Put answers of like length together: a batch generates until its longest answer ends."""
    return sorted(samples, key=lambda sample: (len(reference_answer(sample)), sample.sample_id))


def by_prompt_length(samples: Sequence[Sample], *, processor: Processor) -> list[Sample]:
    """Put prompts of like length together: a batch is padded to its longest."""
    return sorted(samples, key=lambda sample: (len(render_prompt(processor, sample)), sample.sample_id))


def batches_of(items: Sequence[Item], *, size: int) -> Iterator[Sequence[Item]]:
    """Cut a sequence into batches."""
    return (items[start : start + size] for start in range(0, len(items), size))
