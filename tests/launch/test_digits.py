import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.demo.digits import (
    CELL,
    CORNERS,
    FAMILIES,
    LINES,
    NUMBER_WORDS,
    Turn,
    answer_facts,
    generate_digit_vqa,
    random_conversation,
    score,
    split_digits,
)
from teacher_cache.config import DataConfig
from teacher_cache.samples import read_samples


def rows(folder: Path, *, seed: int = 3, name: str = "train") -> list[dict[str, Any]]:
    generate_digit_vqa(folder, num_train=70, num_test=35, seed=seed)
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def test_the_same_seed_writes_the_same_data_and_another_seed_other_data(tmp_path: Path) -> None:
    first = rows(tmp_path / "a")
    assert first == rows(tmp_path / "b")
    assert first != rows(tmp_path / "c", seed=4)


def test_train_and_test_share_no_handwritten_digit() -> None:
    train, test = split_digits(seed=3)
    assert len(train.labels) + len(test.labels) == 1797
    seen = {image.tobytes() for image in train.pixels}
    shared = sum(image.tobytes() in seen for image in test.pixels)
    assert shared == 0


def test_images_show_the_digits_of_their_side(tmp_path: Path) -> None:
    """Every cell of a test image is one of the test digits, so no training digit leaks into the test."""
    _, test = split_digits(seed=3)
    known = {image.tobytes(): int(label) for image, label in zip(test.pixels, test.labels, strict=True)}
    margin = (CELL - 8) // 2
    for row in rows(tmp_path, name="test"):
        image = np.asarray(PIL.Image.open(io.BytesIO(row["images"][0]["bytes"])))
        for index, digit in enumerate(row["digits"]):
            top, left = (CELL * part + margin for part in divmod(index, 2))
            assert known[image[top : top + 8, left : left + 8].tobytes()] == digit


def test_data_is_in_the_common_chat_form_and_covers_every_family(tmp_path: Path) -> None:
    generated = rows(tmp_path)
    assert len(read_samples(DataConfig(path=str(tmp_path / "train.parquet"))).samples) == len(generated)
    assert {row["family"] for row in generated} == set(FAMILIES)
    assert {len(row["messages"]) // 2 for row in generated} == {1, 2, 3}


def expected_facts(turn: Turn, digits: tuple[int, ...]) -> list[str] | None:
    """Work out the facts of an answer from the grid alone; None where the form leaves several."""
    question = turn.question
    if turn.family == "position":
        return [str(digits[CORNERS.index(next(corner for corner in CORNERS if corner in question))])]
    if turn.family == "count":
        (limit,) = answer_facts(re.sub(r"(Answer|Reply).*", "", question))
        return [str(sum(digit > int(limit) for digit in digits))]
    if turn.family == "largest":
        return [str(max(digits))]
    if turn.family == "sum":
        line = next(line for line in LINES if line in question)
        return [str(sum(digits[index] for index in LINES[line]))]
    return None


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), family=st.sampled_from(FAMILIES))
def test_answers_agree_with_the_grid(seed: int, family: str) -> None:
    rng = np.random.default_rng(seed)
    images, _ = split_digits(seed=3)
    conversation = random_conversation(images, families=[family], rng=rng)  # type: ignore[list-item]
    (turn,) = conversation.turns
    digits = conversation.digits
    facts = expected_facts(turn, digits)
    if facts is not None:
        assert turn.facts[-1:] == facts
    elif family == "repeat":
        assert turn.facts[0] == ("yes" if len(set(digits)) < 4 else "no")
    elif family == "compare":
        first, second = sorted((c for c in CORNERS if c in turn.question), key=turn.question.index)
        assert turn.facts[0] == ("yes" if digits[CORNERS.index(first)] > digits[CORNERS.index(second)] else "no")
    else:
        assert turn.facts[:4] == [str(digit) for digit in digits]
        assert turn.facts[4] == str(max(digits))
    assert score(family, turn.facts, turn.answer) == 1.0


@pytest.mark.parametrize(
    ("family", "facts", "answer", "expected"),
    [
        ("position", ["7"], "It is Seven.", 1.0),
        ("position", ["7"], "7", 1.0),
        ("position", ["7"], "seven or eight", 0.0),
        ("position", ["7"], "", 0.0),
        ("compare", ["yes", "7", "3"], "Yes, seven is larger than three.", 1.0),
        ("describe", ["1", "2", "3", "4"], "one, two, five and four", 0.75),
        ("describe", ["1", "2"], "one two three four", 0.5),
    ],
)
def test_scores(family: str, facts: list[str], answer: str, expected: float) -> None:
    assert score(family, facts, answer) == expected


def test_facts_read_words_and_numerals_alike() -> None:
    assert answer_facts("There are three 3s, not thirteen") == ["3", "13"]
    assert answer_facts(" ".join(NUMBER_WORDS)) == [str(number) for number in range(19)]
