"""A data file larger than memory: one pass lists its samples, then their rows are read where they are needed."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow.parquet

from teacher_cache.config import DataConfig
from teacher_cache.errors import DataError
from teacher_cache.samples import COLUMNS, decode_line, image_folder, parse_row, usable_rows
from teacher_cache.schema import Sample, SkippedSample


@dataclass(frozen=True, kw_only=True)
class SampleEntry:
    """One usable sample of a data file, without its content."""

    sample_id: str
    digest: str
    """SHA-256 (hex) of its content."""
    place: int
    """Number of its row in a Parquet file, byte offset of its line in a JSON-lines file."""
    has_images: bool


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """The usable samples of a data file, in file order, and the bad ones that were left out."""

    samples: tuple[SampleEntry, ...]
    skipped: tuple[SkippedSample, ...]


def scan_samples(config: DataConfig) -> SampleTable:
    """Read a data file once, its images included, and keep no content.

    Raises:
        DataError: The file is missing or of another kind, or more rows are bad than ``max_skipped_samples``.
    """
    skipped: list[SkippedSample] = []
    samples = tuple(
        SampleEntry(sample_id=sample.sample_id, digest=sample.digest, place=place, has_images=bool(sample.images))
        for place, sample in usable_rows(config, skipped=skipped)
    )
    return SampleTable(samples=samples, skipped=tuple(skipped))


class SampleFile:
    """Reads samples by their entries. Holds row groups of a Parquet file, at least one: read entries in file order."""

    def __init__(self, config: DataConfig, *, held_bytes: int = 0) -> None:
        """Open the data file of a configuration.

        Args:
            config: The data file.
            held_bytes: Hold the row groups that were read last up to this size, for whoever reads in another order.

        Raises:
            DataError: It cannot be opened.
        """
        self._path = Path(config.path)
        self._image_root = image_folder(config)
        self._held_bytes = held_bytes
        self._groups: dict[int, Any] = {}
        try:
            if self._path.suffix == ".parquet":
                self._file: Any = pyarrow.parquet.ParquetFile(self._path)
                metadata = self._file.metadata
                sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
                self._first_rows = [0, *itertools.accumulate(sizes)]
                self._columns = [name for name in self._file.schema_arrow.names if name in COLUMNS]
            else:
                self._file = self._path.open("rb")
        except OSError as error:
            raise DataError(f"data file {self._path}: {error}; check `data.path`") from error

    def read(self, entries: Sequence[SampleEntry]) -> list[Sample]:
        """Return the samples of these entries, in their order.

        Raises:
            DataError: The file or an image is gone, or holds other content than when the file was scanned.
        """
        return [self._sample(entry, row) for entry, row in zip(entries, self._rows(entries), strict=True)]

    def rows(self, entries: Sequence[SampleEntry]) -> list[Any]:
        """Return the rows of these entries as they lie in the file.

        Raises:
            DataError: The file is gone.
        """
        return list(self._rows(entries))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "SampleFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rows(self, entries: Sequence[SampleEntry]) -> Iterator[Any]:
        for entry in entries:
            try:
                if self._path.suffix == ".parquet":
                    yield self._parquet_row(entry.place)
                else:
                    self._file.seek(entry.place)
                    yield decode_line(self._file.readline())
            except (OSError, IndexError, pyarrow.ArrowException) as error:
                raise DataError(f"sample {entry.sample_id} of {self._path} cannot be read again: {error}") from error

    def _parquet_row(self, row: int) -> Any:
        group = bisect.bisect_right(self._first_rows, row) - 1
        table = self._groups.pop(group, None)
        if table is None:
            table = self._file.read_row_group(group, columns=self._columns)
        self._groups[group] = table
        while len(self._groups) > 1 and sum(held.nbytes for held in self._groups.values()) > self._held_bytes:
            del self._groups[next(iter(self._groups))]
        return table.slice(row - self._first_rows[group], 1).to_pylist()[0]

    def _sample(self, entry: SampleEntry, row: Any) -> Sample:
        try:
            sample = parse_row(row, place=entry.place, image_root=self._image_root)
        except DataError as error:
            raise self._changed(entry, str(error)) from error
        if (sample.sample_id, sample.digest) != (entry.sample_id, entry.digest):
            raise self._changed(entry, f"it is {sample.sample_id} of digest {sample.digest} now")
        return sample

    def _changed(self, entry: SampleEntry, what: str) -> DataError:
        return DataError(
            f"sample {entry.sample_id} of digest {entry.digest} in {self._path} has changed since the build began: "
            f"{what}; keep the data as it is while a cache is built, then run the build again"
        )
