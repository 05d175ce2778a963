"""Records that travel between the parts, and the index conventions, stated here once.

Rows and tokens. ``token_ids[t]`` is token t as the teacher saw it, image tokens expanded. Row t is
the teacher's final hidden state at token t, after the final norm: ``logits[t] = head(row t)``
predicts token t + 1.

Spans. An answer span ``(start, stop)`` is half-open and covers one assistant turn: its text and its
end-of-turn token. The header of the turn belongs to the question. ``start >= 1`` always holds.

Tiers, per turn with n = stop - start answer tokens:
  A  rows ``start - 1 .. stop - 1`` (n + 1 rows): the boundary row, then the answer rows.
  L  predictions of tokens ``start .. stop - 1`` (n rows), made by rows ``start - 1 .. stop - 2``, and where those
     tokens end in the answer's text.
  Q  every row that is in no turn's tier A, in order; absent for samples outside the fraction.
The rows of several turns follow each other in order.

Bytes. The text of an answer is the assistant's message without its thinking and without white space around it, in
UTF-8: the same for every tokenizer and template. A token ends at the number of its bytes that the tokens of the turn
cover so far, 0 before the text (in its thinking) and all of them behind it (in its tool calls, at its end of turn);
one that ends inside a character counts all of that character. Two tokenizations of one sample therefore align where
their ends are equal, turn by turn.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


Tier = Literal["A", "Q", "L"]
TIERS: tuple[Tier, ...] = ("A", "Q", "L")


class Span(NamedTuple):
    """Half-open range of token positions."""

    start: int
    stop: int


THINKING_START, THINKING_STOP = "<think>", "</think>"
"""Stand around the thinking of a message that holds it in its text."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call of a tool, made by the assistant."""

    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. ``content`` is a sequence of text parts (str) and image placeholders (None), in order."""

    role: str
    content: tuple[str | None, ...]
    reasoning: str = ""
    """What the assistant thought before it answered, where the data keeps it apart from the text."""
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.content if part is not None)

    @property
    def answer(self) -> str:
        """The text without thinking and without white space around it."""
        return self.text.rpartition(THINKING_STOP)[2].strip()

    @property
    def thinking(self) -> str:
        """What was thought, wherever the data keeps it, without white space around it."""
        inline = self.text.rpartition(THINKING_STOP)[0].strip().removeprefix(THINKING_START)
        return (self.reasoning or inline).strip()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation with its images still encoded (PNG, JPEG, WebP bytes)."""

    sample_id: str
    messages: tuple[Message, ...]
    images: tuple[bytes, ...]
    digest: str
    """SHA-256 (hex) over roles, text parts, thinking, tool calls, tools and image bytes: never over paths or the id."""
    tools: str = ""
    """JSON list with the schemas of the tools that the assistant may call; empty where there are none."""

    @property
    def has_images(self) -> bool:
        """Whether any image belongs to it."""
        return bool(self.images)


@dataclass(frozen=True, kw_only=True)
class EncodedConversation:
    """One sample through one model's template, tokenizer and image processor."""

    sample_id: str
    token_ids: Int[np.ndarray, " tokens"]
    """Image tokens expanded, as the model's forward takes them."""
    prompt_token_ids: tuple[int, ...]
    """The same before image expansion: one placeholder per image, as vLLM takes them."""
    spans: tuple[Span, ...]
    """Answer spans in ``token_ids``, one per assistant turn, in order."""
    answer_byte_ends: Int[np.ndarray, " answer_tokens"]
    """Where each answer token ends in the text of its answer, turns one after the other."""
    num_thinking: tuple[int, ...]
    """Tokens of each answer before the end of its thinking, 0 where the template renders none."""
    answer_bytes: int
    """UTF-8 length of all answers and tool calls, without thinking and end-of-turn tokens."""
    images: "tuple[Image, ...]"
    """Decoded RGB images."""
    model_inputs: "dict[str, Tensor]"
    """What the processor returned beside the ids (pixel_values, image_grid_thw, ...), for this sample alone."""


@dataclass(frozen=True, kw_only=True)
class TeacherTargets:
    """What the cache holds for one sample. Tensors are on the CPU; a tier that was not asked for is None.

    ``hidden_states`` and ``question_hidden_states`` have the teacher's dtype.
    """

    sample_id: str
    token_ids: "Int[Tensor, ' teacher_tokens']"
    spans: tuple[Span, ...]
    hidden_states: "Float[Tensor, 'tier_a_rows teacher_hidden']"
    question_hidden_states: "Float[Tensor, 'tier_q_rows teacher_hidden'] | None"
    topk_ids: "Int[Tensor, 'answer_tokens k'] | None"
    topk_logprobs: "Float[Tensor, 'answer_tokens k'] | None"
    """Natural-log probabilities under the full softmax, highest first, float32."""
    logsumexp: "Float[Tensor, ' answer_tokens'] | None"
    """Of the engine's own logits, after soft-cap and scale, float32."""
    target_logprobs: "Float[Tensor, ' answer_tokens'] | None"
    """Log-probability of the token that really follows, float32."""
    answer_byte_ends: "Int[Tensor, ' answer_tokens'] | None"
    """Where each answer token ends in the text of its answer: aligns other tokenizers without the teacher."""


@dataclass(frozen=True, kw_only=True)
class TeacherHead:
    """The teacher's output projection: ``logits = softcap(scale * (rows @ weight.T + bias))``."""

    weight: "Float[Tensor, 'teacher_vocab teacher_hidden']"
    bias: "Float[Tensor, ' teacher_vocab'] | None" = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    """``softcap * tanh(logits / softcap)`` when set."""


@dataclass(frozen=True, kw_only=True)
class SkippedSample:
    """A bad sample that the config allowed to leave out."""

    sample_id: str
    reason: str
    """Stable word. Read from the data: bad-row, missing-image, corrupt-image, no-answer, empty-answer. Met by the
    teacher: too-long, not-rendered (by the chat template), not-encodable, engine-refused, not-finite."""
    message: str


def tier_a_rows(spans: tuple[Span, ...]) -> Int[np.ndarray, " tier_a_rows"]:
    """Return the token positions whose rows form tier A."""
    parts = [np.arange(span.start - 1, span.stop) for span in spans]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def predicting_rows(spans: tuple[Span, ...]) -> Int[np.ndarray, " answer_tokens"]:
    """Return the token positions whose rows predict the answer tokens (tier L), boundary rows first in each turn."""
    parts = [np.arange(span.start - 1, span.stop - 1) for span in spans]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def question_row_mask(spans: tuple[Span, ...], *, num_tokens: int) -> Bool[np.ndarray, " tokens"]:
    """Return True at the token positions whose rows form tier Q."""
    mask = np.ones(num_tokens, dtype=bool)
    mask[tier_a_rows(spans)] = False
    return mask
