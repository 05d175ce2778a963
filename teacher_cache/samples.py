"""Read conversations that users bring: `messages` and `images` in Parquet or JSON lines.

A row is ``{"id": ..., "messages": [...], "images": [...], "tools": [...]}``; further columns are ignored. A
message's content is a string in which ``<image>`` marks where an image goes, or a list of ``{"type": "image"}``
and ``{"type": "text", "text": ...}`` parts. An assistant may think (``reasoning_content``, or ``<think>`` in its
text) and call tools (``tool_calls``); lists of records and the records in them may be given as JSON text, which
Parquet keeps as it is. An image is a path, bytes, or ``{"bytes": ..., "path": ...}``.
Bad rows are skipped and listed while the config allows, never dropped in silence.
"""

import hashlib
import io
import itertools
import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow.parquet

from teacher_cache.config import DataConfig
from teacher_cache.errors import DataError, SampleError
from teacher_cache.messages import bad_row, parse_message, parse_tools
from teacher_cache.row_images import RowImages, load_ahead, load_images
from teacher_cache.schema import Message, Sample, SkippedSample

COLUMNS = ("id", "messages", "images", "tools")
"""What is read of a row; further columns are ignored."""
_ROWS_AT_ONCE = 64
_UNREADABLE = (OSError, RuntimeError, SyntaxError, ValueError)
"""What Pillow raises for bytes that it cannot use; its AVIF decoder raises RuntimeError."""


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """The usable samples of a data file, in file order, and the bad ones that were left out."""

    samples: tuple[Sample, ...]
    skipped: tuple[SkippedSample, ...]


def read_samples(config: DataConfig) -> SampleSet:
    """Read a data file.

    Raises:
        DataError: The file is missing or of another kind, or more rows are bad than ``max_skipped_samples``.
    """
    skipped: list[SkippedSample] = []
    samples = tuple(sample for _, sample in usable_rows(config, skipped=skipped))
    return SampleSet(samples=samples, skipped=tuple(skipped))


def usable_rows(config: DataConfig, *, skipped: list[SkippedSample]) -> Iterator[tuple[int, Sample]]:
    """Yield the samples of a data file, each with the place of its row; bad rows go to ``skipped``.

    Raises:
        DataError: As :func:`read_samples` does.
    """
    path, found = Path(config.path), 0
    rows = itertools.islice(read_rows(path, columns=COLUMNS), config.max_samples)
    for place, sample in parse_rows(rows, image_root=image_folder(config)):
        if isinstance(sample, SkippedSample):
            skipped.append(sample)
            check_skip_budget(skipped, allowed=config.max_skipped_samples, source=str(path))
        else:
            found += 1
            yield place, sample
    if not found:
        raise DataError(f"no usable sample in {path}: expected rows with `messages` and `images`")


def image_folder(config: DataConfig) -> Path:
    """Return the folder that image paths are relative to."""
    return Path(config.image_root) if config.image_root else Path(config.path).parent


def parse_rows(rows: Iterable[tuple[int, Any]], *, image_root: Path) -> Iterator[tuple[int, Sample | SkippedSample]]:
    """Yield the place of each row with its sample, or with why there is none; an id counts once."""
    seen: set[str] = set()
    for place, row, images in load_ahead(rows, image_root=image_root):
        try:
            sample = parse_row(row, place=place, image_root=image_root, loading=images)
            if sample.sample_id in seen:
                raise SampleError("the id occurs twice", sample_id=sample.sample_id, reason="bad-row")
        except SampleError as error:
            yield place, SkippedSample(sample_id=error.sample_id, reason=error.reason, message=str(error))
        else:
            seen.add(sample.sample_id)
            yield place, sample


def check_skip_budget(skipped: Sequence[SkippedSample], *, allowed: int, source: str) -> None:
    """Raise DataError, naming the first bad samples, when more than ``allowed`` were skipped."""
    if len(skipped) <= allowed:
        return
    listed = "\n".join(f"  {bad.sample_id}: {bad.reason}: {bad.message}" for bad in skipped[:10])
    raise DataError(
        f"{len(skipped)} bad sample(s) in {source}, allowed are {allowed}:\n{listed}\n"
        "Mend the data, or raise `max_skipped_samples` to leave them out and have them listed."
    )


def read_rows(path: Path, *, columns: Collection[str] | None = None) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a Parquet (.parquet) or JSON-lines (.jsonl) file in order, each with its place.

    The place is the row's number in a Parquet file and the line's byte offset in a JSON-lines file. Of a Parquet file,
    only the named columns are read.

    Raises:
        DataError: The file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise DataError(
            f"no data file at {path}: check `data.path`; with `answers`, run `genrecal cache answers` first"
        )
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path, columns=columns))
    elif path.suffix == ".jsonl":
        place = 0
        with path.open("rb") as lines:
            for line in lines:
                if line.strip():
                    yield place, decode_line(line)
                place += len(line)
    else:
        raise DataError(f"data file {path} is neither .parquet nor .jsonl")


def decode_line(line: bytes) -> Any:
    """Return what a line of a JSON-lines file holds; one that is no JSON comes back as it is, and is no row."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _parquet_rows(path: Path, *, columns: Collection[str] | None) -> Iterator[Any]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            chosen = [name for name in file.schema_arrow.names if columns is None or name in columns]
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=chosen):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"data file {path} cannot be read as Parquet: {error}") from error


def parse_row(row: Any, *, place: int, image_root: Path, loading: RowImages | None = None) -> Sample:
    """Turn one row into a Sample; ``place`` names a row without an id in errors.

    Args:
        row: As it was read.
        place: Of the row in its file.
        image_root: Folder that image paths are relative to.
        loading: Its images, where they were asked for before.

    Raises:
        SampleError: The row cannot be used; its ``reason`` says why.
    """
    try:
        return _parse_row(row, place=place, image_root=image_root, loading=loading)
    except RecursionError as error:  # what can be read may still be too deep to be written or shown
        raise bad_row(f"the row at {place} is nested too deeply", f"row-{place}") from error


def _parse_row(row: Any, *, place: int, image_root: Path, loading: RowImages | None) -> Sample:
    if not isinstance(row, Mapping):
        text = row.decode(errors="replace") if isinstance(row, bytes) else str(row)
        kind = type(row).__name__
        raise bad_row(f"the row at {place} is no record but {kind}: {text[:80].rstrip()}", f"row-{place}")
    given_id = "" if row.get("id") is None else str(row["id"])
    name = given_id or f"row-{place}"
    try:
        messages = tuple(parse_message(message) for message in row["messages"])
        loaded = load_images(row, image_root=image_root) if loading is None else loading.result()
        tools = parse_tools(row.get("tools"))
    except SampleError as error:
        raise SampleError(str(error), sample_id=name, reason=error.reason) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise bad_row(f"expected `messages` and `images` in the chat form, found {error!r}", name) from error
    images = tuple(image.data for image in loaded)
    _check_conversation(messages, images, sample_id=name)
    digest = _digest(messages, [image.sha256 for image in loaded], tools=tools)
    return Sample(sample_id=given_id or digest[:32], messages=messages, images=images, digest=digest, tools=tools)


def content_digest(messages: Sequence[Message], images: Sequence[bytes], *, tools: str = "") -> str:
    """Return the SHA-256 (hex) of a conversation: all of its messages, image bytes and tools."""
    return _digest(messages, [hashlib.sha256(image).hexdigest() for image in images], tools=tools)


def _digest(messages: Sequence[Message], image_digests: Sequence[str], *, tools: str) -> str:
    record = {
        "messages": [_digested(message) for message in messages],
        "images": list(image_digests),
        **({"tools": tools} if tools else {}),
    }
    return hashlib.sha256(json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def decode_image(data: bytes, *, sample_id: str) -> PIL.Image.Image:
    """Decode one image to RGB, its size checked before its pixels are read.

    Raises:
        SampleError: ``corrupt-image``: the bytes are no image, or one beyond Pillow's decompression-bomb limit.
    """
    with _open_image(data, sample_id=sample_id) as image:
        try:
            return image.convert("RGB")
        except _UNREADABLE as error:
            raise SampleError(
                f"an image of {len(data)} bytes cannot be decoded ({type(error).__name__})",
                sample_id=sample_id,
                reason="corrupt-image",
            ) from error


def _open_image(data: bytes, *, sample_id: str) -> PIL.Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            return PIL.Image.open(io.BytesIO(data))
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        message = f"an image exceeds {PIL.Image.MAX_IMAGE_PIXELS} pixels"
        raise SampleError(message, sample_id=sample_id, reason="corrupt-image") from error
    except _UNREADABLE as error:
        message = f"an image of {len(data)} bytes is none that Pillow knows"
        raise SampleError(message, sample_id=sample_id, reason="corrupt-image") from error


def _digested(message: Message) -> list[Any]:
    calls = [[call.name, call.arguments] for call in message.tool_calls]
    rest = [message.reasoning, calls] if message.reasoning or calls else []
    return [message.role, list(message.content), *rest]


def _check_conversation(messages: Sequence[Message], images: Sequence[bytes], *, sample_id: str) -> None:
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise SampleError("no assistant message to distil", sample_id=sample_id, reason="no-answer")
    if messages[0].role == "assistant":
        raise bad_row("the conversation begins with the assistant: there is no question", sample_id)
    if not all(answer.answer or answer.tool_calls for answer in answers):
        raise SampleError("an assistant message is empty", sample_id=sample_id, reason="empty-answer")
    if any(None in answer.content for answer in answers):
        raise bad_row("an assistant message holds an image", sample_id)
    places = sum(message.content.count(None) for message in messages)
    if places != len(images):
        raise bad_row(f"{places} image place(s) in the messages, but {len(images)} image(s)", sample_id)
    for image in images:
        _open_image(image, sample_id=sample_id).close()
