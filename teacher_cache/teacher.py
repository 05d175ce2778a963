"""The teacher: what every engine must offer, the checks on what it returns, and the plain transformers reference."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor

from teacher_cache.answer_scores import AnswerScores, score_logits, stored_rows
from teacher_cache.config import TeacherConfig
from teacher_cache.errors import ConfigError, SampleError, TeacherError
from teacher_cache.schema import EncodedConversation, TeacherTargets, predicting_rows, tier_a_rows
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
    "TeacherRequest",
    "TransformersTeacher",
    "compute_targets",
    "load_teacher_head",
    "make_targets",
    "processing_identity",
    "teacher_identity",
]


@dataclass(frozen=True, kw_only=True)
class TeacherRequest:
    """One conversation whose targets are wanted."""

    conversation: EncodedConversation
    question_rows: bool
    """Whether tier Q is wanted too."""


class Teacher(Protocol):
    """An engine that runs the teacher, teacher-forced, over encoded conversations."""

    hidden_size: int
    vocab_size: int
    provenance: dict[str, str]
    uses_model_inputs: bool
    """Whether it takes what the processor made of the images, not the images themselves."""

    def stream(self, requests: Iterable[TeacherRequest], *, topk: int) -> Iterator[TeacherTargets | SampleError]:
        """Yield the targets of each request as soon as they are there, in any order.

        Requests are pulled, from another thread perhaps, as the engine can take them. An error that is yielded costs
        the one sample that it names.

        Raises:
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

    uses_model_inputs = True

    def __init__(self, config: TeacherConfig, *, num_gpus: int | None = None) -> None:
        """Load the model onto one GPU, over several, or, with 0, onto the CPU; by default onto one where there is one.

        Raises:
            TeacherError: Its weights are not complete.
        """
        num_gpus = min(torch.cuda.device_count(), 1) if num_gpus is None else num_gpus
        directory = checkpoint_directory(config)
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        spread = {"device_map": "auto"} if num_gpus > 1 else {}
        model_config = transformers.AutoConfig.from_pretrained(directory, **options)
        auto: Any = (
            transformers.AutoModelForCausalLM
            if model_config.get_text_config() is model_config
            else transformers.AutoModelForImageTextToText
        )
        self.dtype = torch_dtype(config)
        self.device = torch.device("cuda" if num_gpus else "cpu")
        options |= attention_options(model_config)
        model, loading = auto.from_pretrained(
            directory, dtype=self.dtype, output_loading_info=True, **options, **spread
        )
        if missing := sorted(loading["missing_keys"]):
            raise TeacherError(f"the weights in {directory} lack {len(missing)} tensor(s): {', '.join(missing[:5])}")
        self.model: Any = (model if spread else model.to(self.device)).eval()
        self.hidden_size: int = model_config.get_text_config().hidden_size
        self.vocab_size: int = model_config.get_text_config().vocab_size
        self.provenance = {"engine": "transformers", "engine_version": transformers.__version__}

    def stream(self, requests: Iterable[TeacherRequest], *, topk: int) -> Iterator[TeacherTargets | SampleError]:
        """Yield the targets of each request, in order."""
        check_topk(topk, vocab_size=self.vocab_size)
        for request in requests:
            try:
                yield self._compute_one(request.conversation, topk=topk, with_question=request.question_rows)
            except SampleError as error:
                yield error

    def close(self) -> None:
        """Free the model."""
        del self.model

    @torch.inference_mode()
    def _compute_one(self, conversation: EncodedConversation, *, topk: int, with_question: bool) -> TeacherTargets:
        token_ids = torch.from_numpy(conversation.token_ids).long()
        inputs = {name: self._to_device(tensor) for name, tensor in conversation.model_inputs.items()}
        predicting = torch.from_numpy(predicting_rows(conversation.spans))
        hidden, logits = self._forward(token_ids[None].to(self.device), inputs, predicting)
        scores = score_logits(logits, target_ids=token_ids[predicting + 1].to(logits.device), topk=topk)
        stored = stored_rows(conversation.spans, num_tokens=len(token_ids), with_question=with_question)
        rows = hidden[torch.from_numpy(stored).to(hidden.device)]
        return make_targets(conversation, rows=rows, scores=scores, with_question=with_question)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _forward(self, input_ids: Tensor, inputs: dict[str, Tensor], predicting: Tensor) -> tuple[Tensor, Tensor]:
        """Return every row that enters the head, and the logits of the predicting rows.

        Of a model that is spread over GPUs, rows and head may lie on others than the inputs; its own hooks move what
        enters a module only after ours have seen it.
        """
        head = self.model.get_output_embeddings()
        captured: list[Tensor] = []

        def keep_rows(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            captured.append(args[0][0])
            return (args[0][:, predicting.to(args[0].device)],)

        def in_float32(module: Any, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
            rows = args[0].to(module.weight.device, torch.float32)
            bias = None if module.bias is None else module.bias.float()
            return torch.nn.functional.linear(rows, module.weight.float(), bias)

        handles = [head.register_forward_pre_hook(keep_rows), head.register_forward_hook(in_float32)]
        try:
            logits = self.model(input_ids=input_ids, **inputs, use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return captured[0], logits


def compute_targets(
    teacher: Teacher, conversations: Sequence[EncodedConversation], *, topk: int, question_rows: Sequence[bool]
) -> list[TeacherTargets]:
    """Return the targets of all conversations in their order.

    Raises:
        SampleError: One of them cannot be computed.
        TeacherError: The engine failed, or what it returned fails the checks.
    """
    requests = [
        TeacherRequest(conversation=conversation, question_rows=wanted)
        for conversation, wanted in zip(conversations, question_rows, strict=True)
    ]
    found: dict[str, TeacherTargets] = {}
    for targets in teacher.stream(requests, topk=topk):
        if isinstance(targets, SampleError):
            raise targets
        found[targets.sample_id] = targets
    return [found[conversation.sample_id] for conversation in conversations]


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
