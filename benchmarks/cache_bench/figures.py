"""Figures, each with the bar it is held against, and the table that shows them."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number."""

    section: str
    name: str
    value: float | None
    """None where it could not be measured; ``note`` says why."""
    unit: str = "x"
    """``x``: the speed of the other side, measured in the same pairs, is 1."""
    bar: float | None = None
    at_most: bool = False
    """The bar is an upper limit."""
    low: float | None = None
    """Lower quartile of the pairs."""
    high: float | None = None
    """Upper quartile of the pairs."""
    pairs: int = 0
    note: str = ""
    json_name: str = ""
    """Its name in the JSON object, where that is not its key."""

    @property
    def key(self) -> str:
        """Its name among the figures of all sections."""
        return f"{self.section}: {self.name}"

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without a bar or a value."""
        if self.bar is None or self.value is None:
            return None
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def ratio_figure(
    section: str,
    name: str,
    *,
    base_s: Sequence[float],
    own_s: Sequence[float],
    bar: float | None = None,
    note: str = "",
    json_name: str = "",
) -> Figure:
    """Return the median speed against the base, pair by pair, and its quartiles."""
    ratios = [base / own for base, own in zip(base_s, own_s, strict=True)]
    low, middle, high = quartiles(ratios)
    return Figure(
        section=section,
        name=name,
        value=middle,
        bar=bar,
        low=low,
        high=high,
        pairs=len(ratios),
        note=note,
        json_name=json_name,
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile; one value stands for all three."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| figure | measured | quartiles | bar | met | |", "|---|---|---|---|---|---|"]
    for figure in figures:
        spread = "" if figure.low is None else f"{_number(figure.low)} - {_number(figure.high)} of {figure.pairs}"
        value = "-" if figure.value is None else f"**{_number(figure.value)}** {figure.unit}"
        sign = "at most" if figure.at_most else "at least"
        bar = "" if figure.bar is None else f"{sign} {_number(figure.bar)}"
        met = {None: "", True: "yes", False: "**no**"}[figure.met]
        lines.append(f"| {figure.key} | {value} | {spread} | {bar} | {met} | {figure.note} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value == int(value):
        return f"{int(value):,}"
    if abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
