"""Runs a student inside lmms-eval: any model that transformers loads, prompted as in `genrecal eval`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import transformers
from lmms_eval.api.model import lmms
from tqdm import tqdm

from distill.evaluate import EvaluationSettings, answer_texts, batches_of, encode_prompts, greedy, load_chat_model
from distill.records import to_device
from teacher_cache.chat import tokenizer_of
from teacher_cache.config import Dtype
from teacher_cache.rendering import render_prompt
from teacher_cache.schema import Message, Sample

MAX_NEW_TOKENS = 4096
"""Of tasks that set no limit; what the models of lmms-eval itself take."""


class StudentModel(lmms):
    """A student that answers questions about images.

    Stop strings of a task (`until`) are left to the end of turn, as the chat models of lmms-eval do: they were
    written for models without a chat template, and would cut reasoning short.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: Dtype,
        trust_remote_code: bool = False,
        batch_size: str | int = 1,
        device: str | None = None,
        **rest: Any,
    ) -> None:
        """Load the student.

        Args:
            pretrained: Its directory.
            dtype: Element type in which it computes.
            trust_remote_code: Run Python code that ships with it.
            batch_size: Questions that are answered together.
            device: Torch device; by default the GPU where there is one.
            rest: What lmms-eval passes to every model.
        """
        super().__init__()
        self.batch_size = int(batch_size)
        settings = EvaluationSettings(
            batch_size=self.batch_size,
            max_new_tokens=MAX_NEW_TOKENS,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        self._chat = load_chat_model(Path(pretrained).resolve(), settings=settings)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return 1

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests, those of like length together; return the answers in the order of the requests."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(place)
        with tqdm(total=len(requests), desc="answers") as bar:
            for places in groups.values():
                ordered = sorted(places, key=lambda place: (len(requests[place].args[0]), place))
                for batch in batches_of(ordered, size=self.batch_size):
                    texts = self._answer([requests[place] for place in batch])
                    answers |= dict(zip(batch, texts, strict=True))
                    bar.update(len(batch))
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: tasks that compare likelihoods are refused before they start."""
        raise NotImplementedError("students answer in words; a task that compares likelihoods needs another model")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: as above."""
        raise NotImplementedError("students answer one question; a task of several rounds needs another model")

    @torch.inference_mode()
    def _answer(self, requests: Sequence[Any]) -> list[str]:
        processor, model = self._chat.processor, self._chat.model
        prompts = [prompt_of(processor, self._messages(request)) for request in requests]
        inputs = to_device(
            encode_prompts(
                processor,
                [text for text, _ in prompts],
                images=[image for _, images in prompts for image in images],
            ),
            model.device,
        )
        config = generation_config(self._chat.model.generation_config, requests[0].args[2], processor=processor)
        tokens = model.generate(**inputs, generation_config=config)  # type: ignore[operator]
        return answer_texts(tokenizer_of(processor), tokens, prompt_length=inputs["input_ids"].shape[1])

    def _messages(self, request: Any) -> list[dict[str, Any]]:
        _, messages_of, _, doc_id, task, split = request.args
        return messages_of(self.task_dict[task][split][doc_id])


def prompt_of(processor: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[PIL.Image.Image]]:
    """Return the text of a prompt, which ends where the answer begins, and its images.

    Raises:
        ValueError: A message holds something else than text and images.
    """
    placeholder = getattr(processor, "image_token", None)
    images: list[PIL.Image.Image] = []
    turns = []
    for message in messages:
        parts: list[str | None] = []
        for part in _parts_of(message):
            if part["type"] == "text":
                # some tasks write the placeholder of one model into their questions, beside the image itself
                parts.append(part["text"].replace(placeholder, "") if placeholder else part["text"])
            elif part["type"] == "image" and isinstance(part["url"], PIL.Image.Image):
                parts.append(None)
                images.append(part["url"].convert("RGB"))
            else:
                raise ValueError(f"a question holds {part['type']}; students take text and images")
        turns.append(Message(role=message["role"], content=tuple(parts)))
    sample = Sample(
        sample_id="question", messages=(*turns, Message(role="assistant", content=("",))), images=(), digest=""
    )
    return render_prompt(processor, sample), images


def _parts_of(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def generation_config(
    own: transformers.GenerationConfig, settings: Mapping[str, Any], *, processor: Any
) -> transformers.GenerationConfig:
    """Return how an answer is generated: greedily, unless the task asks for samples."""
    config = greedy(own, processor=processor)
    config.max_new_tokens = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
    config.num_beams = int(settings.get("num_beams") or 1)
    temperature = float(settings.get("temperature") or 0.0)
    if temperature > 0 and settings.get("do_sample", True):
        config.do_sample, config.temperature = True, temperature
        config.top_p = float(settings.get("top_p") or 1.0)
    return config
