"""Writes answers in the place of very short ones: the teacher generates, what does not hold the original is refused."""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, Protocol

from teacher_cache.answer_check import accepts
from teacher_cache.answers_config import AnswersConfig
from teacher_cache.chat import Processor, encode_conversation, render_prompt, tokenizer_of
from teacher_cache.errors import SampleError
from teacher_cache.messages import IMAGE_MARK
from teacher_cache.progress import PieceProgress
from teacher_cache.samples import decode_image
from teacher_cache.schema import Message, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

Outcome = Literal["kept", "replaced", "unverified"]
"""What became of an answer: kept because it is not very short, replaced, or kept because no attempt held it."""
IN_FLIGHT: Final = 256
"""Samples whose answers the engine writes at the same time."""


@dataclass(frozen=True, kw_only=True)
class AnswerRequest:
    """One answer that is to be written."""

    sample_id: str
    prompt_token_ids: tuple[int, ...]
    """One placeholder per image."""
    images: "tuple[Image, ...]"
    seed: int


@dataclass(frozen=True, kw_only=True)
class GeneratedAnswer:
    """What the engine wrote."""

    sample_id: str
    text: str
    num_tokens: int
    is_whole: bool
    """Whether the model ended it itself."""


class AnswerEngine(Protocol):
    """An engine that writes answers, several at a time."""

    @property
    def num_unfinished(self) -> int:
        """Requests whose answers are not there yet."""
        ...

    def submit(self, request: AnswerRequest) -> None:
        """Take a request.

        Raises:
            SampleError: The engine refuses it.
        """
        ...

    def step(self) -> list[GeneratedAnswer]:
        """Go on, and return the answers that are finished now."""
        ...

    def close(self) -> None:
        """Free the engine."""
        ...


@dataclass(frozen=True, kw_only=True)
class WrittenSample:
    """A sample with the answers that replace its own."""

    sample_id: str
    messages: tuple[Message, ...]
    original_answers: tuple[str, ...]
    """The text of every assistant message as it was."""
    outcomes: tuple[Outcome, ...]
    """One per assistant message."""


@dataclass(frozen=True, kw_only=True)
class WrittenPart:
    """Samples with their answers, in order."""

    samples: tuple[WrittenSample, ...]
    tokens: int
    """Generated, those of refused attempts included."""


@dataclass(kw_only=True)
class _Draft:
    """A sample on its way."""

    sample: Sample
    messages: list[Message]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    """By message."""
    due: list[int]
    """Messages whose answers are still to be written, the next one first."""
    attempt: int = 0

    def settle(self, outcome: Outcome) -> None:
        """Be done with the answer that is due."""
        self.outcomes[self.due.pop(0)] = outcome
        self.attempt = 0

    def written(self) -> WrittenSample:
        """Return the result."""
        answers = [index for index, message in enumerate(self.sample.messages) if message.role == "assistant"]
        return WrittenSample(
            sample_id=self.sample.sample_id,
            messages=tuple(self.messages),
            original_answers=tuple(self.sample.messages[index].text for index in answers),
            outcomes=tuple(self.outcomes.get(index, "kept") for index in answers),
        )


class AnswerWriter:
    """Writes the answers of samples with one engine; a later turn sees the answers written for the earlier ones."""

    def __init__(self, engine: AnswerEngine, *, processor: Processor, config: AnswersConfig, max_length: int) -> None:
        self._engine = engine
        self._processor = processor
        self._config = config
        self._max_length = max_length
        self._tokens = 0
        self._finished = 0

    def write(self, samples: Sequence[Sample]) -> Iterator[PieceProgress | WrittenPart]:
        """Yield signs of life, and the written samples at the end."""
        self._tokens = self._finished = 0
        drafts = {sample.sample_id: self._draft(sample) for sample in samples}
        waiting = deque(draft for draft in drafts.values() if draft.due)
        self._finished = len(drafts) - len(waiting)
        while waiting or self._engine.num_unfinished:
            while waiting and self._engine.num_unfinished < IN_FLIGHT:
                self._submit(waiting.popleft())
            for answer in self._engine.step():
                draft = drafts[answer.sample_id]
                self._take(draft, answer)
                if draft.due:
                    self._submit(draft)
            yield PieceProgress(samples=self._finished, tokens=self._tokens)
        yield WrittenPart(samples=tuple(draft.written() for draft in drafts.values()), tokens=self._tokens)

    def _draft(self, sample: Sample) -> _Draft:
        due = [index for index in range(1, len(sample.messages)) if self._is_due(sample.messages, index)]
        return _Draft(sample=sample, messages=list(sample.messages), due=due)

    def _is_due(self, messages: Sequence[Message], index: int) -> bool:
        """Tell whether an answer is very short and nothing but an answer to a question."""
        message = messages[index]
        is_plain = message.role == "assistant" and not message.thinking and not message.tool_calls
        return is_plain and len(message.answer) <= self._config.max_characters and messages[index - 1].role == "user"

    def _submit(self, draft: _Draft) -> None:
        """Hand the answer that is due to the engine; one that it cannot take stays as it is."""
        while draft.due:
            try:
                self._engine.submit(self._request(draft))
            except SampleError:
                draft.settle("unverified")
            else:
                return
        self._finished += 1

    def _request(self, draft: _Draft) -> AnswerRequest:
        sample, turn = draft.sample, draft.due[0]
        question = draft.messages[turn - 1]
        instruction = f"\n{self._config.instruction}" if self._config.instruction else ""
        asked = replace(question, content=(*question.content, instruction) if instruction else question.content)
        messages = (*draft.messages[: turn - 1], asked, draft.messages[turn])
        prompt = render_prompt(self._processor, replace(sample, messages=messages))
        images = sample.images[: sum(message.content.count(None) for message in messages)]
        return AnswerRequest(
            sample_id=sample.sample_id,
            prompt_token_ids=tuple(tokenizer_of(self._processor)(prompt, add_special_tokens=False)["input_ids"]),
            images=tuple(decode_image(image, sample_id=sample.sample_id) for image in images),
            seed=sampling_seed(sample, turn=turn, attempt=draft.attempt, seed=self._config.seed),
        )

    def _take(self, draft: _Draft, answer: GeneratedAnswer) -> None:
        self._tokens += answer.num_tokens
        turn = draft.due[0]
        message = Message(role="assistant", content=(answer.text,))
        message = replace(message, content=(message.answer,))
        if answer.is_whole and self._is_good(draft, turn=turn, message=message):
            draft.messages[turn] = message
            draft.settle("replaced")
        elif draft.attempt + 1 < self._config.attempts:
            draft.attempt += 1
        else:
            draft.settle("unverified")
        if not draft.due:
            self._finished += 1

    def _is_good(self, draft: _Draft, *, turn: int, message: Message) -> bool:
        """Tell whether an answer is reasoned, holds the original one, and leaves the sample fit for a build."""
        original = draft.sample.messages[turn].answer
        if len(message.answer) <= self._config.max_characters or IMAGE_MARK in message.answer:
            return False
        if not accepts(message.answer, original=original, accept=self._config.accept):
            return False
        messages = (*draft.messages[:turn], message, *draft.messages[turn + 1 :])
        try:
            encode_conversation(self._processor, replace(draft.sample, messages=messages), max_length=self._max_length)
        except SampleError:
            return False
        return True


def sampling_seed(sample: Sample, *, turn: int, attempt: int, seed: int) -> int:
    """Return what decides an attempt's sampling: the same in every run, whatever else is generated beside it."""
    return int(hashlib.sha256(f"{seed} {sample.digest} {turn} {attempt}".encode()).hexdigest()[:8], 16)
