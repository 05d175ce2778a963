from pathlib import Path

import pytest

from teacher_cache.chat import encode_conversation, expanded_positions, load_processor, render_prompt, tokenizer_of
from teacher_cache.errors import ConfigError, SampleError
from teacher_cache.samples import content_digest
from teacher_cache.schema import Message, Sample
from tests.teacher_cache.test_samples import png

FAMILIES = ["tiny_qwen2_vl", "tiny_internvl", "tiny_llava", "tiny_qwen2"]


def conversation(*turns: tuple[str, str], images: int = 1, size: int = 16) -> Sample:
    messages = []
    for index, (question, answer) in enumerate(turns):
        places: tuple[str | None, ...] = (None,) * images if index == 0 else ()
        messages.append(Message(role="user", content=(*places, question)))
        messages.append(Message(role="assistant", content=(answer,)))
    data = tuple(png(size, size, shade=index) for index in range(images))
    return Sample(sample_id="s", messages=tuple(messages), images=data, digest=content_digest(messages, data))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [1, 2])
def test_spans_cover_exactly_the_answers_and_their_end_of_turn(
    family: str, images: int, request: pytest.FixtureRequest
) -> None:
    processor = load_processor(str(request.getfixturevalue(family)))
    tokenizer = tokenizer_of(processor)
    with_images = 0 if family == "tiny_qwen2" else images
    sample = conversation(("What is the sum?", "The sum is twelve."), ("And?", "seven"), images=with_images)
    encoded = encode_conversation(processor, sample, max_length=500)
    answers = [tokenizer.decode(encoded.token_ids[span.start : span.stop]) for span in encoded.spans]
    end = tokenizer.eos_token
    assert [answer.strip() for answer in answers] == [f"The sum is twelve.{end}", f"seven{end}"]
    assert encoded.answer_bytes == len("The sum is twelve.") + len("seven")
    assert len(encoded.prompt_token_ids) < len(encoded.token_ids) or not with_images


TEXTS = ("The sum is twelve.", "  zw\u00f6lf, \u6f22\u5b57 \U0001f3b2!  ", "seven")


@pytest.mark.parametrize("family", FAMILIES)
def test_byte_ends_say_where_each_token_ends_in_its_answer(family: str, request: pytest.FixtureRequest) -> None:
    processor = load_processor(str(request.getfixturevalue(family)))
    tokenizer = tokenizer_of(processor)
    encoded = encode_conversation(
        processor, conversation(*(("And?", text) for text in TEXTS), images=0), max_length=900
    )
    start = 0
    for span, text in zip(encoded.spans, TEXTS, strict=True):
        ends = encoded.answer_byte_ends[start : start + span.stop - span.start].tolist()
        start += len(ends)
        answer = text.strip().encode()
        assert ends == sorted(ends)
        assert ends[-2:] == [len(answer)] * 2, "the last token of the text, and the end of the turn"
        assert {0, len(answer)} < {0, *ends}, "tokens end inside the answer too"
        for end, stop in zip(ends, range(span.start + 1, span.stop), strict=False):
            whole = answer[:end].decode()  # never cuts a character
            if text.isascii():
                assert tokenizer.decode(encoded.token_ids[span.start : stop]).strip() == whole.strip()
    assert start == len(encoded.answer_byte_ends)


def test_answers_align_across_tokenizers(tiny_qwen2_vl: Path, tiny_internvl: Path) -> None:
    sample = conversation(("Sum?", "The sum is twelve."), images=0)
    ends = [
        set(encode_conversation(load_processor(str(path)), sample, max_length=500).answer_byte_ends.tolist())
        for path in (tiny_qwen2_vl, tiny_internvl)
    ]
    assert ends[0] != ends[1]
    assert {len("The sum is"), len("The sum is twelve.")} <= ends[0] & ends[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_prompt_is_the_question_part_of_the_conversation(
    family: str, request: pytest.FixtureRequest
) -> None:
    processor = load_processor(str(request.getfixturevalue(family)))
    sample = conversation(("Which digit is the largest?", "seven"), images=0)
    encoded = encode_conversation(processor, sample, max_length=500)
    prompt = tokenizer_of(processor)(render_prompt(processor, sample), add_special_tokens=False)["input_ids"]
    assert encoded.token_ids[: encoded.spans[0].start].tolist() == prompt


def test_image_tokens_are_counted_for_larger_images(tiny_qwen2_vl: Path) -> None:
    processor = load_processor(str(tiny_qwen2_vl))
    small = encode_conversation(processor, conversation(("Sum?", "seven"), size=16), max_length=500)
    large = encode_conversation(processor, conversation(("Sum?", "seven"), size=24), max_length=500)
    assert len(large.token_ids) - len(small.token_ids) == 9 - 4
    assert large.prompt_token_ids == small.prompt_token_ids


def test_too_long_and_injected_image_tokens_are_sample_errors(tiny_qwen2_vl: Path) -> None:
    processor = load_processor(str(tiny_qwen2_vl))
    with pytest.raises(SampleError, match="max_length is 10") as caught:
        encode_conversation(processor, conversation(("Sum?", "seven")), max_length=10)
    assert caught.value.reason == "too-long"
    with pytest.raises(SampleError, match="own image token"):
        encode_conversation(processor, conversation(("<|image_pad|> Sum?", "seven")), max_length=500)


def test_text_only_model_refuses_images(tiny_qwen2: Path) -> None:
    with pytest.raises(ConfigError, match="takes no images"):
        encode_conversation(load_processor(str(tiny_qwen2)), conversation(("Sum?", "seven")), max_length=500)


def test_expanded_positions_map_text_around_adjacent_images() -> None:
    positions = expanded_positions([1, 9, 9, 2, 9, 3], [1, 7, 9, 9, 8, 7, 9, 8, 2, 7, 9, 8, 3], placeholder=9)
    assert positions.tolist() == [0, 1, 1, 8, 9, 12, 13]


def test_expanded_positions_refuse_changed_text() -> None:
    with pytest.raises(ConfigError, match="differently"):
        expanded_positions([1, 9, 2], [1, 9, 9, 3], placeholder=9)
