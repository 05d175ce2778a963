"""The data file with written answers: parts that are committed one by one, then one Parquet file made of them."""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet

from teacher_cache.answer_writing import WrittenSample
from teacher_cache.durable_files import sync_folder
from teacher_cache.errors import DataError, DataMismatch
from teacher_cache.manifest import identity_differences
from teacher_cache.messages import parse_tools
from teacher_cache.schema import Message, SkippedSample

METADATA_KEY: Final = b"genrecal.answers"
IDENTITY_FILE: Final = "identity.json"
_ROWS_PER_GROUP: Final = 64
_PART: Final = pa.struct([("type", pa.string()), ("text", pa.string())])
_MESSAGE: Final = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.list_(_PART)),
        ("reasoning_content", pa.string()),
        ("tool_calls", pa.string()),
    ]
)
SCHEMA: Final = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("tools", pa.string()),
        ("original_answers", pa.list_(pa.string())),
        ("answer_outcomes", pa.list_(pa.string())),
    ]
)
"""What a build reads, and for every assistant message its original text and what became of it."""


@dataclass(frozen=True, kw_only=True)
class AnswerCounts:
    """How many answers were replaced."""

    samples: int
    replaced: int
    unverified: int
    """Very short, and kept because no attempt held the original answer."""
    kept: int
    """Not very short, or no plain answer to a question."""


class AnswerFile:
    """A data file that is written part by part."""

    def __init__(self, path: Path, *, identity: Mapping[str, Any], num_parts: int) -> None:
        """Take a path whose file need not exist.

        Args:
            path: The Parquet file that is made.
            identity: All that decides its content.
            num_parts: Parts that it is made of.
        """
        self.path = path
        self.parts_folder = path.with_name(f"{path.name}.parts")
        self._identity = json.loads(json.dumps(identity))
        self._num_parts = num_parts

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from writing the same file within the block.

        Raises:
            DataError: Another process is at it.
            DataMismatch: Parts of other content lie here.
        """
        self.parts_folder.mkdir(parents=True, exist_ok=True)
        with (self.parts_folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"another process is writing {self.path}; wait for it, or stop it") from None
            identity = self.parts_folder / IDENTITY_FILE
            if identity.exists():
                self._require_own(json.loads(identity.read_text(encoding="utf-8")), where=self.parts_folder)
            else:
                self._write_durably(identity, json.dumps(self._identity, indent=2).encode())
            yield

    def finished(self) -> AnswerCounts | None:
        """Return the counts of the file, or None when it is not there yet.

        Raises:
            DataMismatch: It was written from other content or with other settings, or by somebody else.
        """
        if not self.path.exists():
            return None
        try:
            metadata = pyarrow.parquet.read_schema(self.path).metadata or {}
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.path} cannot be read as Parquet: {error}; move it away") from error
        if METADATA_KEY not in metadata:
            raise DataMismatch(
                f"{self.path} is there and holds no written answers: `cache.data.path` must name a new file, made "
                "from the one that `answers.source` names"
            )
        record = json.loads(metadata[METADATA_KEY])
        self._require_own(record["identity"], where=self.path)
        return AnswerCounts(**record["counts"])

    def missing_parts(self) -> list[int]:
        """Return the numbers of the parts that are not committed."""
        return [number for number in range(self._num_parts) if not self._part(number).exists()]

    def commit(self, number: int, samples: Sequence[WrittenSample], *, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one part, whole and durably or not at all.

        Args:
            number: Number of the part.
            samples: Its samples.
            rows: The rows of the source that they came from, for what does not change.
        """
        records = [_record(sample, row) for sample, row in zip(samples, rows, strict=True)]
        with (
            self._written_durably(self._part(number)) as temporary,
            pyarrow.parquet.ParquetWriter(temporary, SCHEMA) as writer,
        ):
            for start in range(0, len(records), _ROWS_PER_GROUP):
                writer.write_table(pa.Table.from_pylist(records[start : start + _ROWS_PER_GROUP], schema=SCHEMA))

    def finish(self, *, skipped: Sequence[SkippedSample], provenance: Mapping[str, str]) -> AnswerCounts:
        """Make the file of its parts, and remove them; call it within :meth:`claimed`."""
        counts = self._count()
        record = {
            "identity": self._identity,
            "counts": asdict(counts),
            "skipped_rows": [asdict(bad) for bad in skipped],
            "provenance": dict(provenance),
        }
        schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps(record).encode()})
        with (
            self._written_durably(self.path) as temporary,
            pyarrow.parquet.ParquetWriter(temporary, schema) as writer,
        ):
            for number in range(self._num_parts):
                with pyarrow.parquet.ParquetFile(self._part(number)) as part:
                    for group in range(part.num_row_groups):
                        writer.write_table(part.read_row_group(group).cast(schema))
        self.remove_parts()
        return counts

    def remove_parts(self) -> None:
        """Remove what is not needed once the file is there."""
        shutil.rmtree(self.parts_folder, ignore_errors=True)

    def _count(self) -> AnswerCounts:
        outcomes: Counter[str] = Counter()
        samples = 0
        for number in range(self._num_parts):
            column = pyarrow.parquet.read_table(self._part(number), columns=["answer_outcomes"])["answer_outcomes"]
            samples += len(column)
            outcomes.update(outcome for row in column.to_pylist() for outcome in row)
        return AnswerCounts(samples=samples, **{name: outcomes[name] for name in ("replaced", "unverified", "kept")})

    def _part(self, number: int) -> Path:
        return self.parts_folder / f"part-{number:06}.parquet"

    def _require_own(self, stored: Mapping[str, Any], *, where: Path) -> None:
        if stored != self._identity:
            lines = "\n  ".join(identity_differences(stored=dict(stored), asked=self._identity))
            raise DataMismatch(
                f"{where} was written from other content or with other settings than this run asks for:\n  {lines}\n"
                "restore these, or give the run another `cache.data.path`"
            )

    def _write_durably(self, path: Path, data: bytes) -> None:
        with self._written_durably(path) as temporary:
            temporary.write_bytes(data)

    @contextmanager
    def _written_durably(self, path: Path) -> Iterator[Path]:
        """Yield a temporary file that gets its name when its content is on the disk."""
        temporary = self.parts_folder / f"{path.name}.tmp"
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def _record(sample: WrittenSample, row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": sample.sample_id,
        "messages": [_message_record(message) for message in sample.messages],
        "images": [_image_record(image) for image in row.get("images") or ()],
        "tools": parse_tools(row.get("tools")) or None,
        "original_answers": list(sample.original_answers),
        "answer_outcomes": list(sample.outcomes),
    }


def _message_record(message: Message) -> dict[str, Any]:
    parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in message.content]
    calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in message.tool_calls]
    return {
        "role": message.role,
        "content": parts,
        "reasoning_content": message.reasoning or None,
        "tool_calls": json.dumps(calls, ensure_ascii=False) if calls else None,
    }


def _image_record(image: Any) -> dict[str, Any]:
    if isinstance(image, bytes):
        return {"bytes": image}
    if isinstance(image, str):
        return {"path": image}
    return {"bytes": image.get("bytes"), "path": image.get("path")}
