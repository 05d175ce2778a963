"""Whether a written answer says what the original one says: pure functions over texts."""

import re
import unicodedata
from decimal import Decimal, InvalidOperation
from typing import Final

from teacher_cache.answers_config import Acceptance

_SURROUNDING: Final = " \t\n.,;:!?\"'`*_$()[]{}"
_STATED: Final = re.compile(r"\banswer(?:\s+is)?\s*[*_]*\s*[:\uff1a]", re.IGNORECASE)
_BOXED: Final = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_OPTION: Final = re.compile(r"\(?([a-z])[).:]\s")
_GROUPED: Final = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def accepts(written: str, *, original: str, accept: Acceptance) -> bool:
    """Tell whether a written answer holds the original one where it must."""
    if accept == "anywhere":
        return _holds(normalized(written), normalized(original), at_end=False)
    final = final_answer(written)
    if accept == "ending":
        return _holds(normalized(final), normalized(original), at_end=True)
    return is_same(final, original)


def final_answer(text: str) -> str:
    """Return what a text gives as its final answer."""
    stated = [(match.end(), _first_line(text[match.end() :])) for match in _STATED.finditer(text)]
    boxed = [(match.end(), match.group(1)) for match in _BOXED.finditer(text)]
    found = [(place, answer) for place, answer in (*stated, *boxed) if normalized(answer)]
    if not found:
        return text.strip().rpartition("\n")[2]
    answer = max(found)[1]
    inner = _BOXED.search(answer)
    return answer if inner is None else inner.group(1)


def is_same(left: str, right: str) -> bool:
    """Tell whether two short answers are equal but for case, punctuation, the form of a number or an option's text."""
    a, b = normalized(left), normalized(right)
    if a == b:
        return bool(a)
    if (number := _number(a)) is not None:
        return number == _number(b)
    option = _OPTION.match(f"{_folded(left)} ")
    return len(b) == 1 and option is not None and option.group(1) == b


def normalized(text: str) -> str:
    """Return a text in one case and Unicode form, without repeated white space and surrounding punctuation."""
    return _folded(text).strip(_SURROUNDING)


def _folded(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _holds(text: str, answer: str, *, at_end: bool) -> bool:
    """Tell whether an answer stands in a text as words of its own."""
    return bool(answer) and re.search(rf"(?<!\w){re.escape(answer)}(?!\w){'$' if at_end else ''}", text) is not None


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", "") if _GROUPED.fullmatch(text) else text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
