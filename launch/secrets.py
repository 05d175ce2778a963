"""Keep secrets out of what is written and shown: passwords in URLs, well-known tokens, values of secret variables."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
LEAST_LENGTH = 8
"""Shorter values of variables are words rather than secrets, and would hide parts of other words."""
VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|KEY|KEY_ID|CREDENTIAL|CREDENTIALS)$", re.IGNORECASE)
"""Names of environment variables that hold secrets."""
_URL_PASSWORD = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_NAMED = re.compile(
    r"((?:token|secret|password|passwd|api_?key|access_?key|signature)['\"]?\s*[=:]\s*['\"]?)([^\s'\"&,;]{8,})", re.I
)
_WELL_KNOWN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|sk-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|glpat-[\w-]{16,})"
)


def redact(text: str, *, environment: Mapping[str, str] | None = None) -> str:
    """Return a text with everything that looks like a secret, or is the value of a secret variable, hidden."""
    for value in sorted(secret_values(os.environ if environment is None else environment), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = _URL_PASSWORD.sub(HIDDEN, text)
    text = _WELL_KNOWN.sub(HIDDEN, text)
    return _NAMED.sub(rf"\1{HIDDEN}", text)


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """Return the values of variables that hold secrets by their name; paths of files are none."""
    return [
        value
        for name, value in environment.items()
        if VARIABLE.search(name) and len(value) >= LEAST_LENGTH and not value.startswith(("/", "~"))
    ]


def secret_fields(values: Any, *, path: str = "") -> Iterator[str]:
    """Yield the dotted names of the fields of a configuration that hold a secret."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from secret_fields(value, path=f"{path}.{name}" if path else str(name))
    elif isinstance(values, (list, tuple)):
        for place, value in enumerate(values):
            yield from secret_fields(value, path=f"{path}.{place}")
    elif isinstance(values, str) and redact(values) != values:
        yield path
