"""The bad samples of one stage, as all of its processes meet them: counted, limited, listed."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.checkpoint import write_durably
from teacher_cache.errors import DataError
from teacher_cache.schema import SkippedSample


class SkippedSamples:
    """Samples that were left out so far, each once; rank 0 lists them in ``skipped.jsonl``."""

    def __init__(self, path: Path, *, allowed: int, start_step: int, writes: bool) -> None:
        """Go on with what the steps up to ``start_step`` left out; what a killed run listed later comes again."""
        self._path = path
        self._allowed = allowed
        self._writes = writes
        lines = path.read_text().splitlines() if path.exists() else []
        self._records = [record for line in lines if (record := _parse(line)) and record["global_step"] <= start_step]
        self._ids = {record["sample_id"] for record in self._records}
        if writes and len(self._records) < len(lines):
            self._write()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, skipped: Iterable[SkippedSample], *, step: int) -> None:
        """Count what all processes left out at a step.

        Raises:
            DataError: More samples are bad than ``max_skipped_samples``.
        """
        new = sorted({bad.sample_id: bad for bad in skipped if bad.sample_id not in self._ids}.items())
        if not new:
            return
        self._ids |= {sample_id for sample_id, _ in new}
        self._records += [{"global_step": step, **asdict(bad)} for _, bad in new]
        if self._writes:
            self._write()
        if len(self) > self._allowed:
            raise DataError(
                f"{len(self)} bad samples on the student's side where max_skipped_samples allows {self._allowed}; the "
                f"last is {new[-1][0]}: {new[-1][1].message}. Mend the data or raise the limit; {self._path} lists all"
            )

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self._path, _lines(self._records))


def _lines(records: Sequence[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


def _parse(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        return {}
