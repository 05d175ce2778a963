"""Conversations for the engine tests."""

from pathlib import Path

from teacher_cache.chat import encode_conversation, load_processor
from teacher_cache.config import DataConfig
from teacher_cache.samples import content_digest, read_samples
from teacher_cache.schema import EncodedConversation, Message, Sample

MAX_LENGTH = 512


def text_samples(*, count: int = 6) -> list[Sample]:
    """Conversations without images; every second one has two turns."""
    samples = []
    for index in range(count):
        turns = [("Which digit is the largest?", "seven"), ("Is any digit repeated?", "Yes, the digit five.")]
        messages = tuple(
            message
            for question, answer in turns[: 1 + index % 2]
            for message in (
                Message(role="user", content=(f"{question} {index}",)),
                Message(role="assistant", content=(answer,)),
            )
        )
        digest = content_digest(messages, ())
        samples.append(Sample(sample_id=f"text-{index}", messages=messages, images=(), digest=digest))
    return samples


def encode_all(model: Path, samples: list[Sample]) -> list[EncodedConversation]:
    """Put samples through a model's processor."""
    processor = load_processor(str(model))
    return [encode_conversation(processor, sample, max_length=MAX_LENGTH) for sample in samples]


def encode_digits(model: Path, data: Path, *, count: int = 6) -> list[EncodedConversation]:
    """The first conversations of a data file."""
    return encode_all(model, list(read_samples(DataConfig(path=str(data), max_samples=count)).samples))
