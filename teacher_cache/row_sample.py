"""Rows of a data file for planning: their number, what all of them tell without images, and an evenly spread part."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet
from jaxtyping import Float

from teacher_cache.errors import DataError, SampleError
from teacher_cache.messages import parse_message
from teacher_cache.samples import read_rows

FACTS: Final = ("constant", "turns", "question_characters", "answer_characters", "images")

_BATCH_ROWS = 64


def count_rows(path: Path) -> int:
    """Return the number of rows of a data file without parsing them.

    Raises:
        DataError: There is no such file, or one of another kind.
    """
    if path.suffix == ".parquet" and path.is_file():
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.metadata.num_rows
    if path.suffix == ".jsonl" and path.is_file():
        with path.open("rb") as lines:
            return sum(1 for _ in lines)
    return sum(1 for _ in read_rows(path))  # which says what is wrong with it


def evenly_spread(rows: int, *, at_most: int) -> list[int]:
    """Return the numbers of up to ``at_most`` rows, the same for every call, in the middle of equal parts."""
    if rows <= at_most:
        return list(range(rows))
    return [int((place + 0.5) * rows / at_most) for place in range(at_most)]


def read_chosen(path: Path, numbers: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield some rows with their numbers, which ascend; of a Parquet file only the row groups that hold them."""
    wanted = set(numbers)
    if path.suffix != ".parquet":
        yield from ((number, row) for number, (_, row) in enumerate(read_rows(path)) if number in wanted)
        return
    with pyarrow.parquet.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            following = first + file.metadata.row_group(group).num_rows
            if wanted.intersection(range(first, following)):
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group]):
                    places = [place for place in range(len(batch)) if first + place in wanted]
                    yield from ((first + place, batch.slice(place, 1).to_pylist()[0]) for place in places)
                    first += len(batch)
            first = following


def read_facts(path: Path, *, rows: int) -> Float[np.ndarray, "rows facts"]:
    """Return what the first rows of a file tell at the cost of reading their text, one column per entry of ``FACTS``.

    A row that is no conversation has zeros beside the constant.
    """
    facts = np.zeros((rows, len(FACTS)))
    for number, row in enumerate(_rows_without_images(path)):
        if number == rows:
            break
        facts[number] = _facts(row)
    facts[:, 0] = 1.0
    return facts


def _rows_without_images(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix != ".parquet":
        yield from (row for _, row in read_rows(path))
        return
    with pyarrow.parquet.ParquetFile(path) as file:
        if "messages" not in file.schema_arrow.names:
            raise DataError(f"no column `messages` in {path}: its rows are no conversations")
        for batch in file.iter_batches(columns=["messages"]):
            yield from batch.to_pylist()


def _facts(row: Mapping[str, Any]) -> list[float]:
    try:
        messages = [parse_message(message) for message in row["messages"]]
    except (SampleError, KeyError, TypeError, AttributeError):
        return [0.0] * len(FACTS)
    answers = [message for message in messages if message.role == "assistant"]
    answer_characters = sum(len(message.text) for message in answers)
    characters = sum(len(message.text) for message in messages)
    images = sum(message.content.count(None) for message in messages)
    return [1.0, len(answers), characters - answer_characters, answer_characters, images]
