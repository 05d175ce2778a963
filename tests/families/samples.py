"""Conversations that every family must encode: both image sizes, two images, several turns, no image."""

from collections.abc import Sequence
from pathlib import Path

from teacher_cache.chat import encode_conversation, load_processor
from teacher_cache.samples import content_digest
from teacher_cache.schema import EncodedConversation, Message, Sample
from tests.families.models import LARGE, SMALL, Family, Size
from tests.teacher_cache.test_samples import png

MAX_LENGTH = 512
TURNS = (("What is the sum?", "The sum is twelve."), ("And the largest digit?", "seven"))


def make_sample(sample_id: str, sizes: Sequence[Size], *, turns: int = 1) -> Sample:
    """One conversation that begins with images of the given sizes."""
    messages = []
    for index, (question, answer) in enumerate(TURNS[:turns]):
        places = (None,) * len(sizes) if index == 0 else ()
        messages.append(Message(role="user", content=(*places, question)))
        messages.append(Message(role="assistant", content=(answer,)))
    images = tuple(png(*size, shade=index) for index, size in enumerate(sizes))
    return Sample(sample_id=sample_id, messages=tuple(messages), images=images, digest=content_digest(messages, images))


def samples_of(family: Family) -> list[Sample]:
    """The conversations of one family."""
    text = [make_sample("text", (), turns=1), make_sample("text-turns", (), turns=2)]
    if not family.has_images:
        return text
    return [
        make_sample("small", (SMALL,)),
        make_sample("large", (LARGE,), turns=2),
        make_sample("both", (SMALL, LARGE), turns=2),
        make_sample("wide-first", (LARGE, SMALL)),
        *text,
    ]


def encode(path: Path, samples: Sequence[Sample]) -> list[EncodedConversation]:
    """Put samples through a model's processor."""
    processor = load_processor(str(path))
    return [encode_conversation(processor, sample, max_length=MAX_LENGTH) for sample in samples]
