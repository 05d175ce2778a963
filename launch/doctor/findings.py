"""What the doctor finds: one fact per check, and the remedy where something is wrong."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check."""

    check: str
    """What was looked at, in a few words."""
    status: Status
    """`warning` is worth reading, `problem` makes some command fail or is a danger."""
    found: str
    remedy: str = ""
    """What to do; empty where nothing is wrong."""


def ok(check: str, found: str) -> Finding:
    """Return that nothing is wrong."""
    return Finding(check=check, status="ok", found=found)


def warning(check: str, found: str, *, remedy: str) -> Finding:
    """Return what may be meant that way."""
    return Finding(check=check, status="warning", found=found, remedy=remedy)


def problem(check: str, found: str, *, remedy: str) -> Finding:
    """Return what has to be mended."""
    return Finding(check=check, status="problem", found=found, remedy=remedy)


def has_problem(findings: Iterable[Finding]) -> bool:
    """Tell whether anything has to be mended."""
    return any(finding.status == "problem" for finding in findings)
