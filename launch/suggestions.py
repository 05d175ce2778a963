"""What somebody who misspelt a name may have meant."""

import difflib
from collections.abc import Sequence


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the nearest known name, None where none is near."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return `, did you mean 'x'?` for the nearest known name, or nothing where none is near."""
    close = nearest(name, known)
    return "" if close is None else f", did you mean {close!r}?"
