"""What commands print: aligned lines for people, one JSON object for machines."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 10
"""Entries of a list that are printed for people; JSON holds all."""


def print_json(value: Any) -> None:
    """Print a record as indented JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    print(json.dumps(value, indent=2, default=str))


def print_facts(facts: Mapping[str, str | Sequence[str]]) -> None:
    """Print names and values in two columns; a value of several lines stays in its column, an empty one is left out."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        lines = value.splitlines() if isinstance(value, str) else [line for item in value for line in item.splitlines()]
        for number, line in enumerate(lines):
            print(f"{'' if number else name:<{width}}  {line}")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def first_of(items: Sequence[str], *, shown: int = SHOWN) -> list[str]:
    """Return the first items, and how many more there are."""
    more = len(items) - shown
    return [*items[:shown], *([f"... and {more:,} more; --json lists all"] if more > 0 else [])]


def names_in_line(names: Sequence[str], *, shown: int = 5) -> str:
    """Return the first names as one line, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f", ... {more:,} more" if more > 0 else "")


def count_of(count: int, noun: str) -> str:
    """Return a number with its noun: ``1 shard``, ``2,048 shards``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: float) -> str:
    """Return a byte count with a binary unit and three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 999.5 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def format_tiers(tier_bytes: Mapping[str, int]) -> str:
    """Return the stored bytes, in total and per tier."""
    tiers = ", ".join(f"{tier} {format_bytes(size)}" for tier, size in tier_bytes.items())
    return f"{format_bytes(sum(tier_bytes.values()))} ({tiers})"
