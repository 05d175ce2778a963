"""Score a model as the study does: what it answers, how sure it is, and how far it is from its teacher.

Models with different tokenizers are compared byte by byte. Where an answer token begins, the model's distribution over
its next token gives one over the next byte of the text, by the first byte of each token; at the places where tokens
of both models begin, the two have read the same text and their distributions have the same 258 classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.evaluate import (
    ChatModel,
    EvaluationSettings,
    answer_batch,
    answer_texts,
    batches_of,
    by_answer_length,
    by_prompt_length,
    load_chat_model,
    prompt_inputs,
)
from distill.joined_sample import JoinedSample
from distill.losses import jensen_shannon
from distill.scoring import agreement, bits_per_byte_of, read_sample_rows
from distill.student import last_hidden_state
from launch.demo.digits import score
from launch.study.config import StudyEvaluation
from launch.study.records import Places, Scores, TeacherScores
from teacher_cache.chat import encode_conversation, tokenizer_of
from teacher_cache.config import DataConfig
from teacher_cache.samples import read_samples
from teacher_cache.schema import EncodedConversation, Sample

END_OF_TURN, NO_TEXT = 256, 257
BYTE_CLASSES = 258
"""First bytes, the end of the turn, and tokens that stand for no text."""
CALIBRATION_BINS = 10
PROBABILITY_FLOOR = 1e-12


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says, and the probability that it gives to saying just that."""

    text: str
    confidence: float


@torch.inference_mode()
def score_model(
    model: str | Path, *, data: DataConfig, evaluation: StudyEvaluation, teacher: TeacherScores | None
) -> tuple[Scores, TeacherScores]:
    """Return a model's scores, and what would be the teacher's side of others'."""
    settings = EvaluationSettings(
        batch_size=evaluation.batch_size, max_new_tokens=evaluation.max_new_tokens, device="cpu"
    )
    chat = load_chat_model(model, settings=settings)
    samples = read_samples(data).samples
    answers = confident_answers(chat, samples=samples, settings=settings)
    rows = read_sample_rows(data, samples=samples)
    rights = [score(row.columns["family"], row.columns["facts"], answers[row.sample_id].text) for row in rows]
    confidences = [answers[row.sample_id].confidence for row in rows]
    wrong = [sure for right, sure in zip(rights, confidences, strict=True) if right == 0]
    bits, places = read_answers(chat, samples=samples, max_length=data.max_length, settings=settings)
    own = TeacherScores(answers={key: answer.text for key, answer in answers.items()}, places=places)
    scores = Scores(
        accuracy=fmean(rights),
        bits_per_byte=bits,
        calibration_error=calibration_error(np.array(confidences), np.array(rights)),
        confidence_when_wrong=fmean(wrong) if wrong else None,
        teacher_agreement=None if teacher is None else agreement(own.answers, teacher_answers=teacher.answers),
        teacher_divergence=None if teacher is None else mean_divergence(places, teacher.places),
    )
    return scores, own


def confident_answers(chat: ChatModel, *, samples: Sequence[Sample], settings: EvaluationSettings) -> dict[str, Answer]:
    """Answer the last question of each sample greedily."""
    answers: dict[str, Answer] = {}
    tokenizer, model = tokenizer_of(chat.processor), chat.model
    for batch in batches_of(by_answer_length(samples), size=settings.batch_size):
        inputs = prompt_inputs(chat.processor, batch)
        generated = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=settings.max_new_tokens, return_dict_in_generate=True, output_logits=True
        )
        length = inputs["input_ids"].shape[1]
        tokens = generated.sequences[:, length:]
        logprobs = torch.stack(generated.logits, dim=1).float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        said = until_end(tokens, end=model.generation_config.eos_token_id)
        confidences = logprobs.masked_fill(~said, 0.0).sum(-1).exp().tolist()
        texts = answer_texts(tokenizer, generated.sequences, prompt_length=length)
        for sample, text, confidence in zip(batch, texts, confidences, strict=True):
            answers[sample.sample_id] = Answer(text=text, confidence=confidence)
    return {sample.sample_id: answers[sample.sample_id] for sample in samples}


def until_end(tokens: Int[Tensor, "batch tokens"], *, end: int | Sequence[int]) -> Tensor:
    """Return True up to the first end of turn, itself included."""
    ends = torch.isin(tokens, torch.tensor([end] if isinstance(end, int) else list(end)))
    return ends.int().cumsum(-1) - ends.int() == 0


def calibration_error(confidences: Float[np.ndarray, " answers"], rights: Float[np.ndarray, " answers"]) -> float:
    """Return the expected calibration error over bins of equal width.

    Formula: ``sum_b n_b / n |mean confidence - mean score|`` over the answers of bin b.
    Why: 0 where a model is right as often as it is sure.
    Source: arXiv 1706.04599.
    """
    bins = np.minimum((confidences * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [abs((confidences[bins == b] - rights[bins == b]).sum()) for b in np.unique(bins)]
    return float(sum(gaps) / len(confidences))


def read_answers(
    chat: ChatModel, *, samples: Sequence[Sample], max_length: int, settings: EvaluationSettings
) -> tuple[float, Places]:
    """Return bits per byte of the reference answers, and the next-byte distributions along them."""
    classes = byte_classes(tokenizer_of(chat.processor), vocab_size=_head(chat).weight.shape[0])
    nats, num_bytes = 0.0, 0
    places: Places = {}
    for batch in batches_of(by_prompt_length(samples, processor=chat.processor), size=settings.batch_size):
        encoded = [encode_conversation(chat.processor, sample, max_length=max_length) for sample in batch]
        logits, labels, weights = _answer_logits(chat, encoded)
        logprobs = logits.log_softmax(-1)
        nats -= float((logprobs.gather(-1, labels[:, None])[:, 0].double() * weights).sum())
        num_bytes += sum(conversation.answer_bytes for conversation in encoded)
        by_byte = torch.zeros(len(labels), BYTE_CLASSES).index_add_(1, classes, logprobs.exp())
        starts = [start for conversation in encoded for start in token_starts(conversation)]
        for start, distribution in zip(starts, by_byte.numpy(), strict=True):
            places.setdefault(start, distribution)
    return bits_per_byte_of(nats, num_bytes=num_bytes), places


def _answer_logits(chat: ChatModel, encoded: Sequence[EncodedConversation]) -> tuple[Tensor, Tensor, Tensor]:
    batch = answer_batch([JoinedSample(encoded=conversation, targets=None) for conversation in encoded]).student
    hidden = last_hidden_state(
        chat.model, batch.input_ids, attention_mask=batch.attention_mask, model_inputs=batch.model_inputs
    )
    return _head(chat)(hidden.flatten(0, 1)[batch.predicting_rows]).float(), batch.labels, batch.weights


def _head(chat: ChatModel) -> Any:
    return chat.model.get_output_embeddings()


def token_starts(encoded: EncodedConversation) -> list[tuple[str, int, int]]:
    """Return where each answer token begins: sample, turn, and bytes of the answer before it."""
    starts, first = [], 0
    for turn, span in enumerate(encoded.spans):
        ends = encoded.answer_byte_ends[first : first + span.stop - span.start].tolist()
        starts += [(encoded.sample_id, turn, byte) for byte in (0, *ends[:-1])]
        first += len(ends)
    return starts


def byte_classes(tokenizer: Any, *, vocab_size: int) -> Int[Tensor, " vocab"]:
    """Return the class of each token: its first byte, the end of the turn, or no text."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = len(tokenizer.decode(anchor))
    special = set(tokenizer.all_special_ids)
    classes = torch.full((vocab_size,), NO_TEXT)
    for token in range(min(vocab_size, len(tokenizer))):
        # behind another token, for some decoders drop a space at the beginning
        text = "" if token in special else tokenizer.decode([*anchor, token])[before:]
        if text:
            classes[token] = text.encode()[0]
    classes[tokenizer.eos_token_id] = END_OF_TURN
    return classes


def mean_divergence(own: Places, teacher: Places) -> float:
    """Return the mean Jensen-Shannon divergence over the places that both have, in nats."""
    shared = sorted(own.keys() & teacher.keys())
    if not shared:
        return math.nan
    both = [torch.from_numpy(np.stack([side[key] for key in shared])).double() for side in (own, teacher)]
    student, other = (probabilities.clamp(min=PROBABILITY_FLOOR).log() for probabilities in both)
    return float(jensen_shannon(student, other).mean())
