"""Digit-grid VQA: questions about 2 x 2 grids of real handwritten digits, with answers that can be checked.

The digits are the 1,797 images of 8 x 8 pixels (UCI optdigits) that ship with scikit-learn. A grid holds four
of them in cells of 10 x 10 pixels parted by lines; at most one digit occurs more than once. The question says in
which form the answer is wanted (numeral, word or sentence), so that the reference answer is the only right one,
word by word.

``facts`` are what the answer says: numbers as numerals, "yes" and "no", in order.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int, UInt8

Family = Literal["position", "count", "sum", "largest", "repeat", "compare", "describe"]
Form = Literal["numeral", "word", "sentence"]

CORNERS = ("top left", "top right", "bottom left", "bottom right")
LINES = {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)}
NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)
FACT = re.compile(rf"\b(\d+|yes|no|{'|'.join(NUMBER_WORDS)})\b", re.IGNORECASE)
TEST_FRACTION = 0.2
CELL = 10
IMAGE_SHAPE = (2 * CELL, 2 * CELL)
LINE_BRIGHTNESS = 128
REQUESTS: dict[Form, tuple[str, ...]] = {
    "numeral": ("Answer with a numeral.", "Reply in numerals."),
    "word": ("Answer with one word.", "Reply in a word."),
    "sentence": ("Answer in a sentence.", "Reply with a full sentence."),
}


@dataclass(frozen=True, kw_only=True)
class DigitImages:
    """One side of the split of the handwritten digits."""

    pixels: UInt8[np.ndarray, "digits 8 8"]
    labels: Int[np.ndarray, " digits"]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question with its reference answer."""

    family: Family
    question: str
    answer: str

    @property
    def facts(self) -> list[str]:
        """What the reference answer says."""
        return answer_facts(self.answer)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A grid, its image and the turns about it."""

    digits: tuple[int, ...]
    """In reading order."""
    image: UInt8[np.ndarray, "height width"]
    turns: tuple[Turn, ...]


def generate_digit_vqa(out_dir: str | Path, *, num_train: int, num_test: int, seed: int, max_turns: int = 3) -> None:
    """Write ``train.parquet`` and ``test.parquet`` in the common chat form.

    A training row asks 1 to ``max_turns`` questions of different families about its image, a test row one.
    ``family`` and ``facts`` describe the last turn, whose family rotates.
    """
    train, test = split_digits(seed=seed)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, images, count, most_turns in (("train", train, num_train, max_turns), ("test", test, num_test, 1)):
        rng = np.random.default_rng([seed, *name.encode()])
        rows = []
        for index in range(count):
            last = FAMILIES[index % len(FAMILIES)]
            others = [family for family in shuffled(FAMILIES, rng=rng) if family != last]
            asked = (*others[: int(rng.integers(most_turns))], last)
            rows.append(_row(random_conversation(images, families=asked, rng=rng), f"{name}-{index:06d}"))
        partial = out_dir / f".{name}.parquet.partial"
        pq.write_table(pa.Table.from_pylist(rows), partial)
        partial.replace(out_dir / f"{name}.parquet")


def split_digits(*, seed: int) -> tuple[DigitImages, DigitImages]:
    """Return the training and the test digits: different handwritten images."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(pixels))
    cut = int(len(order) * TEST_FRACTION)
    parts = (order[cut:], order[:cut])
    train, test = (DigitImages(pixels=pixels[part], labels=bunch.target[part].astype(np.int64)) for part in parts)
    return train, test


def random_conversation(images: DigitImages, *, families: Sequence[Family], rng: np.random.Generator) -> Conversation:
    """Draw a grid and one question of each family about it, in the order given."""
    chosen, digits = _draw_grid(images, rng)
    while sum(digits.count(digit) > 1 for digit in set(digits)) > 1:
        chosen, digits = _draw_grid(images, rng)
    turns = tuple(QUESTIONS[family](digits, rng) for family in families)
    return Conversation(digits=digits, image=compose(images.pixels[chosen]), turns=turns)


def compose(digits: UInt8[np.ndarray, "4 8 8"]) -> UInt8[np.ndarray, "20 20"]:
    """Return the image of a grid."""
    margin = (CELL - digits.shape[-1]) // 2
    cells = np.pad(digits, ((0, 0), (margin, margin), (margin, margin)))
    image = cells.reshape(2, 2, CELL, CELL).swapaxes(1, 2).reshape(IMAGE_SHAPE)
    image[CELL - 1 : CELL + 1] = image[:, CELL - 1 : CELL + 1] = LINE_BRIGHTNESS
    return image


def shuffled(families: Sequence[Family], *, rng: np.random.Generator) -> list[Family]:
    """Return the families in random order."""
    return [families[index] for index in rng.permutation(len(families))]


def answer_facts(answer: str) -> list[str]:
    """Return the numbers (as numerals), "yes" and "no" that a text says, in order."""
    found = (match.lower() for match in FACT.findall(answer))
    return [str(NUMBER_WORDS.index(fact)) if fact in NUMBER_WORDS else fact.lstrip("0") or "0" for fact in found]


def score(family: str, facts: Sequence[str], answer: str) -> float:
    """Return how right an answer is, 0 to 1: all facts and no others; for "describe" the fraction of facts right."""
    found = answer_facts(answer)
    if family != "describe":
        return float(found == list(facts))
    right = sum(said == fact for said, fact in zip(found, facts, strict=False))
    return right / max(len(facts), len(found))


def encode_png(image: UInt8[np.ndarray, "height width"]) -> bytes:
    """Return the image as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _row(conversation: Conversation, sample_id: str) -> dict[str, object]:
    messages = []
    for number, turn in enumerate(conversation.turns):
        mark = "<image>" if number == 0 else ""
        messages.append({"role": "user", "content": mark + turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    return {
        "id": sample_id,
        "messages": messages,
        "images": [{"bytes": encode_png(conversation.image), "path": f"{sample_id}.png"}],
        "family": conversation.turns[-1].family,
        "facts": conversation.turns[-1].facts,
        "digits": list(conversation.digits),
    }


def _draw_grid(images: DigitImages, rng: np.random.Generator) -> tuple[Int[np.ndarray, "4"], tuple[int, ...]]:
    chosen = rng.integers(len(images.labels), size=4)
    return chosen, tuple(images.labels[chosen].tolist())


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _ask(
    family: Family, *, digits_answer: int, sentence: str, phrasings: Sequence[str], rng: np.random.Generator
) -> Turn:
    """Make a turn whose answer is a number, in a form drawn at random; ``sentence`` has a gap for the number."""
    form: Form = ("numeral", "word", "sentence")[int(rng.integers(3))]
    question = f"{_choose(rng, phrasings)} {_choose(rng, REQUESTS[form])}"
    word = NUMBER_WORDS[digits_answer]
    answers = {"numeral": str(digits_answer), "word": word, "sentence": sentence.format(word)}
    return Turn(family=family, question=question, answer=answers[form])


def _ask_position(digits: tuple[int, ...], rng: np.random.Generator) -> Turn:
    corner = int(rng.integers(4))
    place = CORNERS[corner]
    return _ask(
        "position",
        digits_answer=digits[corner],
        sentence=f"The {place} digit is {{}}.",
        phrasings=(f"Which digit is in the {place}?", f"What is the {place} digit?", f"Read the {place} digit."),
        rng=rng,
    )


def _ask_count(digits: tuple[int, ...], rng: np.random.Generator) -> Turn:
    limit = int(rng.integers(2, 8))
    return _ask(
        "count",
        digits_answer=sum(digit > limit for digit in digits),
        sentence="The number of such digits is {}.",
        phrasings=(
            f"How many digits are greater than {limit}?",
            f"How many digits are greater than {NUMBER_WORDS[limit]}?",
            f"Count the digits above {limit}.",
        ),
        rng=rng,
    )


def _ask_sum(digits: tuple[int, ...], rng: np.random.Generator) -> Turn:
    line = _choose(rng, tuple(LINES))
    first, second = (digits[index] for index in LINES[line])
    return _ask(
        "sum",
        digits_answer=first + second,
        sentence=f"{NUMBER_WORDS[first]} plus {NUMBER_WORDS[second]} is {{}}.".capitalize(),
        phrasings=(f"What is the sum of the {line}?", f"Add the digits in the {line}."),
        rng=rng,
    )


def _ask_largest(digits: tuple[int, ...], rng: np.random.Generator) -> Turn:
    return _ask(
        "largest",
        digits_answer=max(digits),
        sentence="The largest digit is {}.",
        phrasings=("Which digit is the largest?", "What is the largest digit?", "Find the highest digit."),
        rng=rng,
    )


def _ask_repeat(digits: tuple[int, ...], rng: np.random.Generator) -> Turn:
    repeated = _repeated(digits)
    word, sentence = "no", "No, all digits are different."
    if repeated is not None:
        word, sentence = "yes", f"Yes, the digit {NUMBER_WORDS[repeated]} occurs more than once."
    phrasings = ("Is any digit repeated?", "Does a digit occur more than once?", "Are there equal digits?")
    return _ask_yes_no("repeat", word=word, sentence=sentence, phrasings=phrasings, rng=rng)


def _ask_compare(digits: tuple[int, ...], rng: np.random.Generator) -> Turn:
    first, second = (int(corner) for corner in rng.choice(4, size=2, replace=False))
    larger = digits[first] > digits[second]
    left, right = NUMBER_WORDS[digits[first]], NUMBER_WORDS[digits[second]]
    sentence = f"Yes, {left} is larger than {right}." if larger else f"No, {left} is not larger than {right}."
    phrasings = (
        f"Is the {CORNERS[first]} digit larger than the {CORNERS[second]} digit?",
        f"Does the {CORNERS[first]} digit exceed the {CORNERS[second]} digit?",
    )
    return _ask_yes_no("compare", word="yes" if larger else "no", sentence=sentence, phrasings=phrasings, rng=rng)


def _ask_yes_no(
    family: Family, *, word: str, sentence: str, phrasings: Sequence[str], rng: np.random.Generator
) -> Turn:
    form: Form = ("word", "sentence")[int(rng.integers(2))]
    question = f"{_choose(rng, phrasings)} {_choose(rng, REQUESTS[form])}"
    return Turn(family=family, question=question, answer=word if form == "word" else sentence)


def _ask_describe(digits: tuple[int, ...], rng: np.random.Generator) -> Turn:
    in_words = bool(rng.integers(2))
    said = [NUMBER_WORDS[digit] if in_words else str(digit) for digit in digits]
    repeated = _repeated(digits)
    repetition = "no digit is repeated" if repeated is None else f"{said[digits.index(repeated)]} is repeated"
    answer = (
        f"The top row shows {said[0]} and {said[1]}, the bottom row shows {said[2]} and {said[3]}. "
        f"The largest digit is {said[digits.index(max(digits))]}, and {repetition}."
    )
    opening = _choose(rng, ("Describe the image", "Describe the grid", "Say what you see"))
    return Turn(family="describe", question=f"{opening} in {'words' if in_words else 'numerals'}.", answer=answer)


def _repeated(digits: tuple[int, ...]) -> int | None:
    return next((digit for digit in digits if digits.count(digit) > 1), None)


QUESTIONS: dict[Family, Callable[[tuple[int, ...], np.random.Generator], Turn]] = {
    "position": _ask_position,
    "count": _ask_count,
    "sum": _ask_sum,
    "largest": _ask_largest,
    "repeat": _ask_repeat,
    "compare": _ask_compare,
    "describe": _ask_describe,
}
FAMILIES = tuple(QUESTIONS)
