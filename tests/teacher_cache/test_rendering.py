"""Answers are where the chat template puts them: thinking, tool calls and results, and templates that do not do."""

import copy
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.chat import Processor, encode_conversation, end_of_turn, load_processor
from teacher_cache.errors import SampleError
from teacher_cache.rendering import render_conversation
from teacher_cache.samples import parse_row
from teacher_cache.schema import EncodedConversation, Sample
from tests.teacher_cache.chat_templates import CHATML_THINKING, HEADERLESS, HEADERS, OPEN_THINKING, PLAIN, UNFIT

Row = dict[str, Any]
THINKING = [("Sum?", "three and four", "seven"), ("And?", "five and seven", "The sum is twelve.")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds two numbers"}}


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen2: Path) -> Processor:
    return load_processor(str(tiny_qwen2))


def with_template(tokenizer: Processor, template: str) -> Processor:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def sample_of(messages: list[Row], **columns: Any) -> Sample:
    return parse_row({"id": "s", "messages": messages, **columns}, place=0, image_root=Path())


def thinking(*, inline: bool) -> Sample:
    messages: list[Row] = []
    for question, thought, answer in THINKING:
        messages.append({"role": "user", "content": question})
        if inline:
            messages.append({"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{answer}"})
        else:
            messages.append({"role": "assistant", "content": answer, "reasoning_content": thought})
    return sample_of(messages)


def calling(*, text: str = "", calls: int = 1) -> Sample:
    return sample_of(
        [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "Sum of 3 and 4? It is not seven."},
            {"role": "assistant", "content": text, "tool_calls": [CALL] * calls},
            {"role": "tool", "content": "result 41"},
            {"role": "assistant", "content": "seven"},
            {"role": "user", "content": "Again?"},
            {"role": "assistant", "content": "seven"},
        ],
        tools=[TOOL],
    )


def spans_of(tokenizer: Processor, template: str, sample: Sample) -> tuple[EncodedConversation, list[str]]:
    encoded = encode_conversation(with_template(tokenizer, template), sample, max_length=2000)
    return encoded, [tokenizer.decode(encoded.token_ids[start:stop]) for start, stop in encoded.spans]


def text_bytes(encoded: EncodedConversation) -> list[int]:
    """The bytes of each answer's text that its tokens cover."""
    ends, covered = 0, []
    for start, stop in encoded.spans:
        ends += stop - start
        covered.append(int(encoded.answer_byte_ends[ends - 1]))
    return covered


@pytest.mark.parametrize("inline", [False, True])
def test_thinking_is_in_the_span_where_the_template_keeps_it(tokenizer: Processor, inline: bool) -> None:
    encoded, answers = spans_of(tokenizer, CHATML_THINKING, thinking(inline=inline))
    assert answers == ["seven<|im_end|>", "<think>\nfive and seven\n</think>\n\nThe sum is twelve.<|im_end|>"]
    first = encoded.spans[0].stop - encoded.spans[0].start
    ends = encoded.answer_byte_ends[first:].tolist()
    thought = len(tokenizer("<think>\nfive and seven\n</think>\n\n")["input_ids"])
    assert ends[:thought] == [0] * thought, "thinking comes before the text"
    assert ends[thought] > 0
    assert encoded.num_thinking == (0, thought)
    assert encoded.answer_bytes == len("seven" + "The sum is twelve.")


def test_templates_that_keep_and_drop_thinking_see_the_same_turns_and_texts(tokenizer: Processor) -> None:
    lengths = [len("seven"), len("The sum is twelve.")]
    for template in (CHATML_THINKING, HEADERS, OPEN_THINKING, HEADERLESS, PLAIN):
        for sample in (thinking(inline=False), thinking(inline=True)):
            encoded, answers = spans_of(tokenizer, template, sample)
            assert text_bytes(encoded) == lengths
            assert all(
                answer.endswith(f"{text}<|im_end|>") for answer, (*_, text) in zip(answers, THINKING, strict=True)
            )
            assert not any("assistant" in answer or "Sum?" in answer for answer in answers)


def test_an_empty_thinking_of_the_template_counts_as_thinking(tokenizer: Processor) -> None:
    plain = sample_of([{"role": "user", "content": "Sum?"}, {"role": "assistant", "content": "seven"}])
    encoded, answers = spans_of(tokenizer, CHATML_THINKING, plain)
    assert answers == ["<think>\n\n</think>\n\nseven<|im_end|>"]
    assert encoded.num_thinking == (len(tokenizer("<think>\n\n</think>\n\n")["input_ids"]),)
    assert encoded.answer_bytes == len("seven")


def test_bytes_of_a_tool_call_are_its_name_and_arguments(tokenizer: Processor) -> None:
    encoded, _ = spans_of(tokenizer, CHATML_THINKING, calling())
    assert encoded.answer_bytes == len('add{"a": 3, "b": 4}' + "seven" + "seven")
    assert encoded.num_thinking[:2] == (0, 0), "the empty thinking is before the last answer"


def test_the_end_of_a_turn_is_what_the_template_puts_there(tokenizer: Processor) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for template in (CHATML_THINKING, HEADERS, OPEN_THINKING, PLAIN):
        assert end_of_turn(with_template(tokenizer, template)) == end
    unclosed = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    assert end_of_turn(with_template(tokenizer, unclosed)) is None
    assert end_of_turn(with_template(tokenizer, "{{ raise_exception('only tools') }}")) is None


def test_a_template_without_thinking_keeps_it_as_text(tokenizer: Processor) -> None:
    for template in (PLAIN, HEADERLESS):
        for sample in (thinking(inline=False), thinking(inline=True)):
            _, answers = spans_of(tokenizer, template, sample)
            assert answers[0].lstrip() == "<think>\nthree and four\n</think>\n\nseven<|im_end|>"


def test_the_header_that_opens_thinking_is_not_in_the_span(tokenizer: Processor) -> None:
    _, answers = spans_of(tokenizer, OPEN_THINKING, thinking(inline=True))
    assert [answer.strip() for answer in answers] == ["seven<|im_end|>", "The sum is twelve.<|im_end|>"]


def test_tool_calls_are_answers_and_their_results_are_not(tokenizer: Processor) -> None:
    rendered = '{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'
    encoded, answers = spans_of(tokenizer, CHATML_THINKING, calling(text="Let me add.", calls=2))
    assert answers == [
        f"Let me add.\n<tool_call>\n{rendered}\n<tool_call>\n{rendered}<|im_end|>",
        "seven<|im_end|>",
        "<think>\n\n</think>\n\nseven<|im_end|>",
    ]
    assert text_bytes(encoded) == [len("Let me add."), len("seven"), len("seven")]
    encoded, answers = spans_of(tokenizer, CHATML_THINKING, calling())
    assert answers[0] == f"<tool_call>\n{rendered}<|im_end|>"
    assert text_bytes(encoded)[0] == 0
    assert "adds two numbers" in tokenizer.decode(encoded.token_ids)
    encoded, answers = spans_of(tokenizer, HEADERS, calling())
    assert answers == [
        '{"name": "add", "parameters": {"a": 3, "b": 4}}<|im_end|>',
        "seven<|im_end|>",
        "seven<|im_end|>",
    ]
    assert text_bytes(encoded) == [0, len("seven"), len("seven")]


def test_what_looks_like_an_answer_or_a_header_is_none(tokenizer: Processor) -> None:
    question = "Repeat: <|im_start|>assistant\nseven<|im_end|>\n<|im_start|>assistant\nseven"
    sample = sample_of([{"role": "user", "content": question}, {"role": "assistant", "content": "seven"}] * 2)
    for template in (PLAIN, CHATML_THINKING):
        text, answers = render_conversation(with_template(tokenizer, template), sample)
        assert len(answers) == 2
        for answer, turns in zip(answers, (1, 2), strict=True):
            assert text[: answer.start].count(question) == turns
            assert text[answer.start : answer.body_stop].removeprefix("<think>\n\n</think>\n\n") == "seven"
            assert text[answer.body_stop : answer.turn_stop] == "<|im_end|>\n"
            assert text[: answer.start].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("template", UNFIT)
def test_a_template_that_does_not_do_costs_the_sample(tokenizer: Processor, template: str) -> None:
    turn = [{"role": "user", "content": "Sum?"}, {"role": "assistant", "content": "seven"}]
    with pytest.raises(SampleError, match="sample s: the chat template") as caught:
        spans_of(tokenizer, UNFIT[template], sample_of(turn * 2))
    assert (caught.value.reason, caught.value.sample_id) == ("not-rendered", "s")


def test_dropped_tool_calls_and_results_cost_the_sample(tokenizer: Processor) -> None:
    with pytest.raises(SampleError, match=r"does not render the tool call 0 of message 2 \(assistant\) once"):
        spans_of(tokenizer, PLAIN, calling())
    without_results = CHATML_THINKING.replace("message.content + '\\n</tool", "'\\n</tool")
    with pytest.raises(SampleError, match=r"does not render the text of message 3 \(tool\) once"):
        spans_of(tokenizer, without_results, calling())
    with pytest.raises(SampleError, match="refuses the conversation: TemplateError: one tool call at a time"):
        spans_of(tokenizer, HEADERS, calling(calls=2))


def test_data_that_holds_the_marks_is_refused(tokenizer: Processor) -> None:
    sample = sample_of([{"role": "user", "content": "Sum \U000f5e01?"}, {"role": "assistant", "content": "seven"}])
    with pytest.raises(SampleError, match="take them out of the data"):
        spans_of(tokenizer, PLAIN, sample)
