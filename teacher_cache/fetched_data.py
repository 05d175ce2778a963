"""A data file whose images were URLs: every image is fetched once into a folder beside it, and named by its path.

A cache is then built from files, whose bytes are hashed into each sample's identity; what a URL leads to later matters
to nobody. An image that is there is not fetched again.
"""

import hashlib
import itertools
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet

from teacher_cache.durable_files import replace_file, sync_file, sync_folder
from teacher_cache.errors import ConfigError, SampleError
from teacher_cache.image_fetch import FetchError, ImageFetcher
from teacher_cache.samples import decode_image, read_rows

ROWS_AT_ONCE: Final = 64
THREADS: Final = 8


@dataclass(frozen=True, kw_only=True)
class FetchSummary:
    """What became of the images of a data file."""

    rows: int
    fetched: int
    """By this run."""
    present: int
    """Files that an earlier run fetched."""
    refused: dict[str, str]
    """Why, by URL. Their rows keep the URL, which a build does not take."""


class _Images:
    """The folder of fetched images: one file per URL, named after it."""

    def __init__(self, folder: Path, fetcher: ImageFetcher) -> None:
        self.folder, self._fetcher = folder, fetcher
        self.fetched = self.present = 0
        self.refused: dict[str, str] = {}
        self._seen: set[str] = set()
        # Pillow's warnings are turned into errors for the whole process while an image is opened
        self._decoding = threading.Lock()

    def make(self, urls: Iterable[str]) -> None:
        """Fetch what is not there."""
        wanted = [url for url in dict.fromkeys(urls) if url not in self._seen]
        self._seen.update(wanted)
        missing = [url for url in wanted if not self.path(url).is_file()]
        self.present += len(wanted) - len(missing)
        if missing:
            self.folder.mkdir(exist_ok=True)
        with ThreadPoolExecutor(THREADS) as threads:
            for url, reason in zip(missing, threads.map(self._fetch, missing), strict=True):
                if reason is None:
                    self.fetched += 1
                else:
                    self.refused[url] = reason

    def path(self, url: str) -> Path:
        """Return the file of a URL."""
        return self.folder / hashlib.sha256(url.encode()).hexdigest()[:32]

    def _fetch(self, url: str) -> str | None:
        try:
            data = self._fetcher.fetch(url)
            with self._decoding:
                decode_image(data, sample_id=url)
        except (FetchError, SampleError) as error:
            return str(error)
        replace_file(self.path(url), data)
        return None


def fetch_data(source: Path, target: Path, *, fetcher: ImageFetcher) -> FetchSummary:
    """Write a data file with paths in the place of URLs, its images in ``TARGET-images`` beside it.

    Raises:
        ConfigError: Source and target are the same, of different kinds, or in different folders.
        DataError: The source is missing or damaged.
    """
    if source.suffix != target.suffix or source.resolve() == target.resolve():
        raise ConfigError(f"{target} must be another {source.suffix} file than {source}")
    if source.resolve().parent != target.resolve().parent:
        raise ConfigError(f"{target} must lie beside {source}, so that paths of other images stay right")
    images = _Images(target.with_name(f"{target.stem}-images"), fetcher)
    rows = _with_paths((row for _, row in read_rows(source)), images)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        is_parquet = source.suffix == ".parquet"
        count = _write_parquet(rows, source, temporary) if is_parquet else _write_lines(rows, temporary)
        sync_file(temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.resolve().parent)
    return FetchSummary(rows=count, fetched=images.fetched, present=images.present, refused=images.refused)


def _with_paths(rows: Iterator[Any], images: _Images) -> Iterator[Any]:
    while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
        images.make(url for row in batch for image in _images_of(row) if (url := _url(image)) is not None)
        for row in batch:
            yield {**row, "images": [_local(image, images) for image in found]} if (found := _images_of(row)) else row


def _images_of(row: Any) -> list[Any]:
    found = row.get("images") if isinstance(row, Mapping) else None
    return found if isinstance(found, list) else []


def _url(image: Any) -> str | None:
    """Return the URL that an image is given by, or None."""
    if isinstance(image, Mapping):
        image = None if image.get("bytes") else image.get("path")
    return image if isinstance(image, str) and "://" in image else None


def _local(image: Any, images: _Images) -> Any:
    url = _url(image)
    if url is None or url in images.refused:
        return image
    path = f"{images.folder.name}/{images.path(url).name}"
    return {**image, "path": path} if isinstance(image, Mapping) else path


def _write_lines(rows: Iterator[Any], path: Path) -> int:
    count = 0
    with path.open("wb") as file:
        for row in rows:
            file.write((row.rstrip(b"\r\n") if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n")
            count += 1
    return count


def _write_parquet(rows: Iterator[Any], source: Path, path: Path) -> int:
    # before the schema, since a file that is none is named here
    count, batch = 0, list(itertools.islice(rows, ROWS_AT_ONCE))
    schema = pyarrow.parquet.read_schema(source)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while batch:
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
            count += len(batch)
            batch = list(itertools.islice(rows, ROWS_AT_ONCE))
    return count
