"""The teacher: what every engine must offer, the checks on what it returns, and the plain transformers reference."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor

from teacher_cache.answer_scores import AnswerScores, score_logits, stored_rows
from teacher_cache.config import TeacherConfig
from teacher_cache.errors import ConfigError, SampleError, TeacherError
from teacher_cache.schema import (
    EncodedConversation,
    Span,
    TeacherHead,
    TeacherTargets,
    predicting_rows,
    tier_a_rows,
)
from teacher_cache.teacher_checkpoint import (
    attention_options,
    checkpoint_directory,
    load_teacher_head,
    processing_identity,
    teacher_identity,
    torch_dtype,
)

__all__ = [
    "Teacher",
    "TransformersTeacher",
    "check_head_agrees",
    "load_teacher_head",
    "make_targets",
    "processing_identity",
    "teacher_identity",
]

HEAD_TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Largest difference between an engine's log-probabilities and those of its hidden rows through the stored head."""
HEAD_CHECK_ROWS = 256
HEAD_CHECK_VOCAB = 16_384


class Teacher(Protocol):
    """An engine that runs the teacher, teacher-forced, over encoded conversations."""

    hidden_size: int
    vocab_size: int
    provenance: dict[str, str]

    def compute(
        self, conversations: Sequence[EncodedConversation], *, topk: int, question_rows: Sequence[bool]
    ) -> list[TeacherTargets]:
        """Return the targets in order; ``question_rows`` says for which conversations tier Q is wanted.

        Raises:
            SampleError: One conversation cannot be computed.
            TeacherError: The engine failed, or what it returned fails the checks.
        """
        ...

    def close(self) -> None:
        """Free the engine."""
        ...


class TransformersTeacher:
    """The reference: one conversation at a time through the model's own forward in transformers.

    The head runs in float32 on the model's hidden rows, as vLLM's pooling runner does; scale and soft-cap are
    the model's own.
    """

    def __init__(self, config: TeacherConfig) -> None:
        directory = checkpoint_directory(config)
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        model_config = transformers.AutoConfig.from_pretrained(directory, **options)
        auto: Any = (
            transformers.AutoModelForCausalLM
            if model_config.get_text_config() is model_config
            else transformers.AutoModelForImageTextToText
        )
        self.dtype = torch_dtype(config)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        options |= attention_options(model_config)
        model, loading = auto.from_pretrained(directory, dtype=self.dtype, output_loading_info=True, **options)
        if missing := sorted(loading["missing_keys"]):
            raise TeacherError(f"the weights in {directory} lack {len(missing)} tensor(s): {', '.join(missing[:5])}")
        self.model: Any = model.to(self.device).eval()
        self.hidden_size: int = model_config.get_text_config().hidden_size
        self.vocab_size: int = model_config.get_text_config().vocab_size
        self.provenance = {"engine": "transformers", "engine_version": transformers.__version__}

    def compute(
        self, conversations: Sequence[EncodedConversation], *, topk: int, question_rows: Sequence[bool]
    ) -> list[TeacherTargets]:
        """Return the targets in order."""
        check_topk(topk, vocab_size=self.vocab_size)
        return [
            self._compute_one(conversation, topk=topk, with_question=wanted)
            for conversation, wanted in zip(conversations, question_rows, strict=True)
        ]

    def close(self) -> None:
        """Free the model."""
        del self.model

    @torch.inference_mode()
    def _compute_one(self, conversation: EncodedConversation, *, topk: int, with_question: bool) -> TeacherTargets:
        token_ids = torch.from_numpy(conversation.token_ids).long()
        inputs = {name: self._to_device(tensor) for name, tensor in conversation.model_inputs.items()}
        predicting = torch.from_numpy(predicting_rows(conversation.spans))
        hidden, logits = self._forward(token_ids[None].to(self.device), inputs, predicting.to(self.device))
        scores = score_logits(logits, target_ids=token_ids[predicting + 1].to(self.device), topk=topk)
        stored = stored_rows(conversation.spans, num_tokens=len(token_ids), with_question=with_question)
        rows = hidden[torch.from_numpy(stored).to(self.device)]
        return make_targets(conversation, rows=rows, scores=scores, with_question=with_question)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _forward(self, input_ids: Tensor, inputs: dict[str, Tensor], predicting: Tensor) -> tuple[Tensor, Tensor]:
        """Return every row that enters the head, and the logits of the predicting rows."""
        head = self.model.get_output_embeddings()
        captured: list[Tensor] = []

        def keep_rows(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            captured.append(args[0][0])
            return (args[0][:, predicting],)

        def in_float32(module: Any, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
            bias = None if module.bias is None else module.bias.float()
            return torch.nn.functional.linear(args[0].float(), module.weight.float(), bias)

        handles = [head.register_forward_pre_hook(keep_rows), head.register_forward_hook(in_float32)]
        try:
            logits = self.model(input_ids=input_ids, **inputs, use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return captured[0], logits


def make_targets(
    conversation: EncodedConversation, *, rows: Tensor, scores: AnswerScores, with_question: bool
) -> TeacherTargets:
    """Sort stored rows and scores into the record, on the CPU, and check them.

    Raises:
        TeacherError: A shape is not what the conversation asks for.
        SampleError: A value is not finite (``not-finite``).
    """
    num_tier_a = len(tier_a_rows(conversation.spans))
    num_rows = len(stored_rows(conversation.spans, num_tokens=len(conversation.token_ids), with_question=with_question))
    num_answers = len(predicting_rows(conversation.spans))
    if len(rows) != num_rows or len(scores.target_logprobs) != num_answers:
        raise TeacherError(
            f"sample {conversation.sample_id}: expected {num_rows} hidden rows and scores of {num_answers} answer "
            f"tokens, found {len(rows)} and {len(scores.target_logprobs)}"
        )
    for name, values in (("hidden states", rows), ("log-probabilities", scores.target_logprobs)):
        if not bool(values.isfinite().all()):
            raise SampleError(
                f"the teacher's {name} of sample {conversation.sample_id} are not finite",
                sample_id=conversation.sample_id,
                reason="not-finite",
            )
    rows = rows.cpu()
    return TeacherTargets(
        sample_id=conversation.sample_id,
        token_ids=torch.from_numpy(conversation.token_ids.astype(np.int32)),
        spans=conversation.spans,
        hidden_states=rows[:num_tier_a],
        question_hidden_states=rows[num_tier_a:] if with_question else None,
        topk_ids=scores.topk_ids.cpu(),
        topk_logprobs=scores.topk_logprobs.cpu(),
        logsumexp=scores.logsumexp.cpu(),
        target_logprobs=scores.target_logprobs.cpu(),
        answer_byte_ends=torch.from_numpy(conversation.answer_byte_ends),
    )


def check_topk(topk: int, *, vocab_size: int) -> None:
    """Raise ConfigError when more logits are asked for than there are."""
    if topk > vocab_size:
        raise ConfigError(f"`targets.topk` is {topk}, but the teacher's vocabulary has {vocab_size} entries")


def check_head_agrees(targets: Sequence[TeacherTargets], *, head: TeacherHead) -> float:
    """Compare the stored rows, put through the stored head, with the engine's own log-probabilities.

    A tap at another layer, rows off by one or another head show at once. At most HEAD_CHECK_ROWS rows,
    evenly spread over all answers, are compared.

    Returns:
        The largest difference in nats.

    Raises:
        TeacherError: It exceeds HEAD_TOLERANCE_NATS.
    """
    rows = torch.cat([target.hidden_states[_predicting_in_tier_a(target.spans)] for target in targets])
    ids = torch.cat([target.token_ids[predicting_rows(target.spans) + 1] for target in targets]).long()
    expected = torch.cat([target.target_logprobs for target in targets if target.target_logprobs is not None])
    chosen = torch.linspace(0, len(rows) - 1, min(len(rows), HEAD_CHECK_ROWS)).round().long()
    found = head_logprobs(rows[chosen], target_ids=ids[chosen], head=head)
    difference = float((found - expected[chosen]).abs().max())
    tolerance = HEAD_TOLERANCE_NATS[rows.dtype]
    if not difference <= tolerance:
        raise TeacherError(
            f"the engine's log-probabilities and its hidden rows through the teacher's output head differ by "
            f"{difference:.3g} nats in samples {targets[0].sample_id} ... {targets[-1].sample_id}; expected at most "
            f"{tolerance:g}: the head read from the checkpoint is not the one that the engine uses"
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
