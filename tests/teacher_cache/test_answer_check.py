"""Which written answers say what the original ones say."""

import pytest

from teacher_cache.answer_check import accepts, final_answer, is_same

REASONED = "Seven and five make twelve.\n\nAnswer: "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{REASONED}12", "12"),
        ("First I thought the answer: 7. No.\n**Final answer:** 12\n", "** 12"),
        ("It is\nAnswer:\n12\nas said", "12"),
        (r"So $\boxed{\frac{1}{2}}$ it is", r"\frac{1}{2}"),
        (r"The answer: $\boxed{12}$.", "12"),
        (r"\boxed{7} was wrong. The answer is: 12", "12"),
        ("Seven and five.\nThe sum is twelve.", "The sum is twelve."),
        ("Answer: 12\nAnswer: ", "12"),
    ],
)
def test_the_final_answer_is_what_is_stated_last(text: str, expected: str) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Yes.", "yes"),
        ("**12**", "12"),
        ("12.0", "12"),
        ("1,200", "1200"),
        ("\uff11\uff12", "12"),
        ("(A)", "a"),
        ("A. the cat", "A"),
        ("(b) 42 cm", "B"),
        ("two  words", "Two words"),
        ("-3", "-3.00"),
    ],
)
def test_forms_of_one_answer_are_the_same(left: str, right: str) -> None:
    assert is_same(left, right)


@pytest.mark.parametrize(
    ("left", "right"),
    [("12", "13"), ("no", "yes"), ("A", "B"), ("A. the cat", "B"), ("a cat", "A"), ("12 cm", "12"), ("", ""),
     ("-3", "3"), ("1,20", "120"), ("nan", "1"), ("Answer", "A"), ("not seven", "seven"), ("!", "?")],
)  # fmt: skip
def test_other_answers_are_not(left: str, right: str) -> None:
    assert not is_same(left, right)


def test_each_acceptance_is_looser_than_the_one_before() -> None:
    texts = {
        f"{REASONED}twelve.": (True, True, True),
        "Seven and five. The sum is twelve.": (False, True, True),
        f"It could be twelve.\n{REASONED}thirteen": (False, False, True),
        f"{REASONED}not twelve": (False, True, True),
        "It is twelvefold.": (False, False, False),
        "": (False, False, False),
    }
    for text, expected in texts.items():
        found = tuple(accepts(text, original="Twelve", accept=accept) for accept in ("final", "ending", "anywhere"))
        assert found == expected, text
    assert not accepts("anything", original="!", accept="anywhere")
