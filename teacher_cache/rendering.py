"""Conversation -> text by a model's chat template, and where its answers stand in that text.

The template itself says where: the conversation is rendered a second time with a mark before and behind each text of
the assistant and each name of a called tool. The marks are private-use characters that no data has; where the template
has put them, the texts begin and end. Nothing is searched for by what it says, so an answer that also occurs in the
question, or a question that imitates the template, does not matter. Thinking that a template leaves out in earlier
turns, as templates of thinking models do, is left out of the span; anything else that it leaves out is an error.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import jinja2
import transformers

from teacher_cache.errors import SampleError
from teacher_cache.schema import THINKING_START, THINKING_STOP, Message, Sample

Processor = Any
"""A transformers processor, or a tokenizer for a text-only model: transformers has no common base."""
_FIRST_MARK: Final = 0xF5E00
_MARKS: Final = 0x8000
"""Characters of a plane for private use; more than any conversation needs."""
_MARK: Final = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + _MARKS - 1)}]")


@dataclass(frozen=True, kw_only=True)
class RenderedAnswer:
    """Where one answer stands in a rendered conversation, in characters."""

    start: int
    """Where the header of the turn ends."""
    text_start: int
    """Where the text begins, behind the thinking; where there is no text, where the turn's tool calls begin."""
    text: str
    """The assistant's message without thinking and white space around it."""
    body_stop: int
    """Where text and tool calls end; with tool calls, the end of turn is among them."""
    turn_stop: int
    """Where everything ends that the template appends to the turn."""


def render_prompt(processor: Processor, sample: Sample) -> str:
    """Render everything before the last answer, ending with the header that opens the answer."""
    last = max(index for index, message in enumerate(sample.messages) if message.role == "assistant")
    return _Template(processor, sample).render(sample.messages[:last], add_generation_prompt=True)


def render_conversation(processor: Processor, sample: Sample) -> tuple[str, list[RenderedAnswer]]:
    """Render a conversation and locate its answers, one per assistant turn.

    Raises:
        SampleError: ``not-rendered``: the chat template refuses the conversation, or leaves out or changes an answer,
            a tool call or the result of one.
    """
    template = _Template(processor, sample)
    text = template.render(sample.messages)
    marked = template.render_marked(sample.messages)
    if marked.text != text:
        raise template.error("renders other text around an answer when that is marked: its answers cannot be located")
    header = template.generation_header()
    answers = []
    for index, message in enumerate(sample.messages):
        if message.role == "assistant":
            is_last = index == len(sample.messages) - 1
            whole = marked if is_last else template.render_marked(sample.messages[: index + 1])
            answers.append(_locate(template, index, marked=marked, as_last=whole, header=header))
        elif message.role == "tool" and message.text.strip():
            template.require_whole(marked, index, "text", message.text.strip())
    if any(left.turn_stop > right.start for left, right in itertools.pairwise(answers)):
        raise template.error("does not render the answers in their order")
    return text, answers


@dataclass(frozen=True, kw_only=True)
class _Marked:
    """A rendering, and where what was marked in it begins and ends: by message, then by what it is."""

    text: str
    places: dict[int, dict[str, tuple[int, int]]]


@dataclass(kw_only=True)
class _Marks:
    """Marks texts, and remembers which mark means what."""

    meanings: list[tuple[int, str]] = field(default_factory=list)

    def around(self, text: str, *, message: int, what: str) -> str:
        """Put marks around a text, inside of the white space around it."""
        stripped = text.strip()
        if not stripped:
            return text
        self.meanings.append((message, what))
        mark = chr(_FIRST_MARK + len(self.meanings) - 1)
        before, _, behind = text.partition(stripped)
        return f"{before}{mark}{stripped}{mark}{behind}"

    def take_out(self, rendered: str) -> _Marked:
        """Return the rendering without marks, and their places; what is not there twice has none."""
        found: dict[str, list[int]] = {}
        for number, mark in enumerate(_MARK.finditer(rendered)):
            found.setdefault(mark.group(), []).append(mark.start() - number)
        places: dict[int, dict[str, tuple[int, int]]] = {}
        for number, (message, what) in enumerate(self.meanings):
            at = found.get(chr(_FIRST_MARK + number), [])
            if len(at) == 2:
                places.setdefault(message, {})[what] = (at[0], at[1])
        return _Marked(text=_MARK.sub("", rendered), places=places)


class _Template:
    """The chat template of a processor, for one sample."""

    def __init__(self, processor: Processor, sample: Sample) -> None:
        self._processor = processor
        self._sample = sample
        self._is_typed = isinstance(processor, transformers.ProcessorMixin)
        self._has_reasoning_field = "reasoning_content" in str(processor.chat_template)
        self._options: dict[str, Any] = {"tools": json.loads(sample.tools)} if sample.tools else {}

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Render messages as they are.

        Raises:
            SampleError: The template refuses them.
        """
        rendered = self._apply([self._row(message) for message in messages], add_generation_prompt)
        if _MARK.search(rendered):
            raise self.error(
                "renders characters that mark answers here (U+F5E00 to U+FDDFF); take them out of the data"
            )
        return rendered

    def render_marked(self, messages: Sequence[Message]) -> _Marked:
        """Render messages with marks, and take these out."""
        marks = _Marks()
        rows = [self._row(message, marks=marks, index=index) for index, message in enumerate(messages)]
        if len(marks.meanings) > _MARKS:
            raise self.error(f"would have to mark {len(marks.meanings)} texts; at most {_MARKS} can be")
        return marks.take_out(self._apply(rows, add_generation_prompt=False))

    def generation_header(self) -> str:
        """Return what opens an answer."""
        messages = self._sample.messages
        first = next(index for index, message in enumerate(messages) if message.role == "assistant")
        before = self.render(messages[:first])
        opened = self.render(messages[:first], add_generation_prompt=True)
        return opened[_shared(before, opened) :]

    def end_of(self, count: int, text: str) -> int | None:
        """Return where so many messages end in a rendering of more, None where they are rendered otherwise there."""
        before = self.render(self._sample.messages[:count])
        return len(before) if text.startswith(before) else None

    def require_whole(self, marked: _Marked, index: int, what: str, text: str) -> tuple[int, int]:
        """Return where a marked text stands.

        Raises:
            SampleError: The template has left it out, repeated or changed it.
        """
        place = marked.places.get(index, {}).get(what)
        if place is None:
            name = "the text" if what == "text" else f"the {what}"
            raise self.error(f"does not render {name} of message {index} ({self._sample.messages[index].role}) once")
        if marked.text[place[0] : place[1]] != text:
            raise self.error(f"changes the {what} of message {index}")
        return place

    def error(self, what: str) -> SampleError:
        """Return the error of a template that does not do with this sample."""
        return SampleError(
            f"sample {self._sample.sample_id}: the chat template {what}",
            sample_id=self._sample.sample_id,
            reason="not-rendered",
        )

    def _apply(self, rows: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return self._processor.apply_chat_template(
                rows, tokenize=False, add_generation_prompt=add_generation_prompt, **self._options
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            # a template is a program, and one that meets a conversation of a kind that it was not written for
            raise self.error(f"refuses the conversation: {type(error).__name__}: {error}") from error

    def _row(self, message: Message, *, marks: _Marks | None = None, index: int = 0) -> dict[str, Any]:
        """Return a message as chat templates take it; with marks where these are given."""
        if message.role not in ("assistant", "tool"):
            return {"role": message.role, "content": self._content(message.content)}

        def around(text: str, what: str) -> str:
            return text if marks is None else marks.around(text, message=index, what=what)

        thinking, closed, text = message.text.rpartition(THINKING_STOP)
        row: dict[str, Any] = {"role": message.role}
        if message.reasoning and self._has_reasoning_field:
            row["reasoning_content"] = around(message.reasoning, "thinking")
        elif message.reasoning:
            thinking, closed = f"{THINKING_START}\n{message.reasoning.strip()}\n", THINKING_STOP
            text = f"\n\n{message.text.lstrip()}"
        if closed:
            opened, start, inner = thinking.rpartition(THINKING_START)
            thinking = f"{opened}{start}{around(inner, 'thinking')}"
        row["content"] = self._content((thinking + closed + around(text, "text"),))
        if message.tool_calls:
            row["tool_calls"] = [
                {
                    "type": "function",
                    "function": {
                        "name": around(call.name, f"tool call {number}"),
                        "arguments": json.loads(call.arguments),
                    },
                }
                for number, call in enumerate(message.tool_calls)
            ]
        return row

    def _content(self, content: Sequence[str | None]) -> str | list[dict[str, str]]:
        if not self._is_typed:
            return "".join(part for part in content if part is not None)
        return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]


def _locate(template: _Template, index: int, *, marked: _Marked, as_last: _Marked, header: str) -> RenderedAnswer:
    message = template._sample.messages[index]
    places = marked.places.get(index, {})
    text = places.get("text")
    if message.answer:
        text = template.require_whole(marked, index, "text", message.answer)
    calls = [
        template.require_whole(marked, index, f"tool call {number}", call.name)
        for number, call in enumerate(message.tool_calls)
    ]
    first = min(place[0] for place in places.values())
    last = max(place[1] for place in places.values())
    start = _header_end(marked.text, before=first, header=header) if header else template.end_of(index, marked.text)
    if start is None:
        raise template.error(f"does not begin message {index} as it begins an answer that is to be written, {header!r}")
    appended = as_last.text[max(place[1] for place in as_last.places[index].values()) :]
    turn_stop = last + _shared(marked.text[last:], appended)
    body_stop = len(marked.text[:turn_stop].rstrip()) if calls else last
    return RenderedAnswer(
        start=start,
        text_start=text[0] if text else calls[0][0],
        text=message.answer,
        body_stop=body_stop,
        turn_stop=turn_stop,
    )


def _header_end(text: str, *, before: int, header: str) -> int | None:
    """Return where the header of the turn ends whose first marked text begins at ``before``.

    A template may open the thinking in its header, and leave that away where it leaves the thinking away.
    """
    ends = [
        place + len(opening)
        for opening in (header, header.partition(THINKING_START)[0])
        if (place := text.rfind(opening, 0, before)) >= 0
    ]
    return max(ends, default=None)


def _shared(left: str, right: str) -> int:
    """Return how many characters two texts begin with in common."""
    for count, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return count
    return min(len(left), len(right))
