"""Rows of the data that were no samples: what a manifest says of them, and the list of all of them beside the logs."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from teacher_cache.durable_files import replace_file
from teacher_cache.schema import SkippedSample

logger = logging.getLogger(__name__)

LISTED_ROWS: Final = 1000
LISTED_BYTES: Final = 1024**2
"""Rows that a manifest lists at most, and their JSON: it is read whole each time that a cache is opened."""


def skipped_facts(skipped: Sequence[SkippedSample]) -> dict[str, Any]:
    """Return what a manifest says of skipped rows: how many for which reason, the first ones, and where the rest is."""
    listed: list[dict[str, str]] = []
    size = 0
    for bad in skipped[:LISTED_ROWS]:
        row = _as_unicode(bad)
        size += len(json.dumps(row))
        if size > LISTED_BYTES:
            break
        listed.append(row)
    counts = dict(sorted(Counter(bad.reason for bad in skipped).items()))
    facts: dict[str, Any] = {"skipped_rows": listed, "skipped_row_counts": counts}
    if len(listed) < len(skipped):
        facts |= {"skipped_rows_not_listed": len(skipped) - len(listed), "skipped_rows_file": _file_name(skipped)}
    return facts


def write_skipped_rows(skipped: Sequence[SkippedSample], *, folder: Path) -> None:
    """List all skipped rows in a file that is named after its content, and say where; none where there are none."""
    if not skipped:
        return
    path = folder / _file_name(skipped)
    if not path.exists():
        replace_file(path, _lines(skipped))
    counts = ", ".join(f"{count:,} {reason}" for reason, count in Counter(bad.reason for bad in skipped).most_common())
    logger.warning("%d bad row(s) of the data are left out (%s); all are listed in %s", len(skipped), counts, path)


def _file_name(skipped: Sequence[SkippedSample]) -> str:
    return f"skipped-rows-{hashlib.sha256(_lines(skipped)).hexdigest()[:16]}.jsonl"


def _lines(skipped: Sequence[SkippedSample]) -> bytes:
    return "".join(f"{json.dumps(_as_unicode(bad))}\n" for bad in skipped).encode()


def _as_unicode(bad: SkippedSample) -> dict[str, str]:
    """Return a row as JSON can hold it: a lone surrogate, which stands for an undecodable byte, is escaped."""
    row = {"sample_id": bad.sample_id, "reason": bad.reason, "message": bad.message}
    return {name: text.encode(errors="backslashreplace").decode() for name, text in row.items()}
