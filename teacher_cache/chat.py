"""Conversation -> token ids and answer spans, for any model's template, tokenizer and image splitting.

Teacher and students go through the same function with their own processors. The chat template says
where the answers stand in the text; the tokenizer's character offsets give their spans, which are then
carried over to the ids in which the processor has expanded every image placeholder into its image tokens.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import transformers
from jaxtyping import Int

from teacher_cache.errors import ConfigError, SampleError
from teacher_cache.model_files import refuse_own_code
from teacher_cache.rendering import Processor, RenderedAnswer, render_conversation, render_prompt
from teacher_cache.samples import decode_image
from teacher_cache.schema import THINKING_STOP, EncodedConversation, Message, Sample, Span

__all__ = [
    "Processor",
    "encode_conversation",
    "end_of_turn",
    "expanded_positions",
    "image_token_id",
    "load_processor",
    "render_conversation",
    "render_prompt",
    "tokenizer_of",
]


def load_processor(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Processor:
    """Load a model's processor, or its tokenizer where the model takes text only.

    Raises:
        ConfigError: The tokenizer has no chat template, or cannot report character offsets, or the model brings code
            of its own that is not trusted.
    """
    refuse_own_code(Path(model), trusted=trust_remote_code)
    processor = transformers.AutoProcessor.from_pretrained(
        model, revision=revision, trust_remote_code=trust_remote_code
    )
    if not tokenizer_of(processor).is_fast:
        raise ConfigError(f"the tokenizer of {model} reports no character offsets; a fast (tokenizers) one is needed")
    if processor.chat_template is None:
        raise ConfigError(f"{model} has no chat template; add chat_template.jinja beside its tokenizer")
    return processor


def tokenizer_of(processor: Processor) -> transformers.PreTrainedTokenizerBase:
    """Return the tokenizer inside a processor, or the tokenizer itself."""
    if isinstance(processor, transformers.ProcessorMixin):
        return processor.tokenizer
    return processor


def encode_conversation(processor: Processor, sample: Sample, *, max_length: int) -> EncodedConversation:
    """Tokenise one sample and find its answer spans.

    Raises:
        SampleError: ``too-long`` beyond ``max_length`` tokens, ``corrupt-image``, ``not-rendered`` when the chat
            template leaves out or changes an answer, or ``bad-row`` when the text itself contains the image
            placeholder.
        ConfigError: The model takes no images, or its processor changes the text around them.
    """
    text, answers = render_conversation(processor, sample)
    tokenizer = tokenizer_of(processor)
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    plain_ids, offsets, special = plain["input_ids"], plain["offset_mapping"], set(tokenizer.all_special_ids)
    plain_spans = [_answer_span(plain_ids, offsets, answer=answer, special=special) for answer in answers]
    byte_ends = [
        _byte_ends(offsets[span.start : span.stop], answer=answer)
        for span, answer in zip(plain_spans, answers, strict=True)
    ]
    images = tuple(decode_image(image, sample_id=sample.sample_id) for image in sample.images)
    ids, model_inputs = plain_ids, {}
    if images:
        _check_placeholders(processor, plain_ids, sample=sample)
        model_inputs = dict(processor(text=[text], images=list(images), add_special_tokens=False, return_tensors="pt"))
        ids = model_inputs.pop("input_ids")[0].tolist()
        del model_inputs["attention_mask"]
    if len(ids) > max_length:
        raise SampleError(
            f"{len(ids)} tokens, image tokens included, where max_length is {max_length}",
            sample_id=sample.sample_id,
            reason="too-long",
        )
    positions = expanded_positions(plain_ids, ids, placeholder=image_token_id(processor) if images else None)
    return EncodedConversation(
        sample_id=sample.sample_id,
        token_ids=np.asarray(ids, dtype=np.int32),
        prompt_token_ids=tuple(plain_ids),
        spans=tuple(Span(int(positions[span.start]), int(positions[span.stop])) for span in plain_spans),
        answer_byte_ends=np.concatenate(byte_ends),
        num_thinking=tuple(
            _num_thinking(offsets[span.start : span.stop], text, answer=answer)
            for span, answer in zip(plain_spans, answers, strict=True)
        ),
        answer_bytes=sum(_num_bytes(message) for message in sample.messages if message.role == "assistant"),
        images=images,
        model_inputs=model_inputs,
    )


def expanded_positions(
    plain: Sequence[int], expanded: Sequence[int], *, placeholder: int | None
) -> Int[np.ndarray, " plain_tokens_and_end"]:
    """Return where each token of ``plain`` stands in ``expanded``, and the end as one more entry.

    ``expanded`` equals ``plain`` except that each run of image placeholders became a longer run of image
    tokens: ids that occur in ``expanded`` only, or the placeholder itself.

    Raises:
        ConfigError: The processor changed something else than the placeholders.
    """
    positions = np.zeros(len(plain) + 1, dtype=np.int64)
    image_ids = set(expanded) - set(plain) | {placeholder}
    at = 0
    for index, token in enumerate(plain):
        if token == placeholder and index > 0 and plain[index - 1] == placeholder:
            positions[index] = positions[index - 1]
            continue
        positions[index] = at
        if token == placeholder:
            while at < len(expanded) and expanded[at] in image_ids:
                at += 1
        elif at < len(expanded) and expanded[at] == token:
            at += 1
        else:
            raise ConfigError(f"the processor tokenises text differently with images: at token {index}, id {token}")
    if at != len(expanded):
        raise ConfigError(f"the processor appended {len(expanded) - at} token(s) after the conversation")
    positions[-1] = at
    return positions


def end_of_turn(processor: Processor) -> int | None:
    """Return the special token that the chat template puts at the end of an answer; None where it puts none."""
    messages = (Message(role="user", content=("a",)), Message(role="assistant", content=("b",)))
    sample = Sample(sample_id="end-of-turn", messages=messages, images=(), digest="")
    try:
        encoded = encode_conversation(processor, sample, max_length=sys.maxsize)
    except SampleError:  # a template that asks for more than this
        return None
    last = int(encoded.token_ids[encoded.spans[-1].stop - 1])
    return last if last in tokenizer_of(processor).all_special_ids else None


def image_token_id(processor: Processor) -> int:
    """Return the id that stands for one image before expansion.

    Raises:
        ConfigError: The model takes no images.
    """
    if tokenizer_of(processor) is processor:
        raise ConfigError(f"{type(processor).__name__} takes no images, but the data has some")
    return int(processor.image_token_id)


def _answer_span(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], *, answer: RenderedAnswer, special: set[int]
) -> Span:
    start = next(index for index, (_, stop) in enumerate(offsets) if stop > answer.start)
    stop = start
    while stop < len(ids) and offsets[stop][0] < answer.body_stop:
        stop += 1
    # the end-of-turn token belongs to the answer; what a template puts behind it (a line break) does not
    for index in range(stop, len(ids)):
        if offsets[index][0] >= answer.turn_stop:
            break
        if ids[index] in special:
            return Span(start, index + 1)
    return Span(start, stop)


def _byte_ends(offsets: Sequence[tuple[int, int]], *, answer: RenderedAnswer) -> Int[np.ndarray, " tokens"]:
    bytes_before = np.cumsum([0, *(len(character.encode()) for character in answer.text)])
    characters = np.array([stop for _, stop in offsets]) - answer.text_start
    return bytes_before[np.maximum.accumulate(characters.clip(0, len(answer.text)))].astype(np.int32)


def _num_thinking(offsets: Sequence[tuple[int, int]], text: str, *, answer: RenderedAnswer) -> int:
    if THINKING_STOP not in text[answer.start : answer.text_start]:
        return 0
    return sum(stop <= answer.text_start for _, stop in offsets)


def _num_bytes(message: Message) -> int:
    return sum(len(text.encode()) for text in (message.answer, *(c.name + c.arguments for c in message.tool_calls)))


def _check_placeholders(processor: Processor, ids: Sequence[int], *, sample: Sample) -> None:
    found = list(ids).count(image_token_id(processor))
    if found != len(sample.images):
        raise SampleError(
            f"{found} image placeholder(s) after tokenisation for {len(sample.images)} image(s): "
            "the text contains the model's own image token",
            sample_id=sample.sample_id,
            reason="bad-row",
        )
