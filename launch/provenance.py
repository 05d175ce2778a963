"""Where an output came from: beside each one lie the run file that made it and a record of every run that did.

Of an output ``X`` these are ``X.run.yaml``, whose first line says what takes it to the same result, and
``X.provenance.json``. Both are written when a run ends, however it ends, and before it begins
where what it will make is known: of one that is killed the record stays at `running`.
"""

import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.run_config import RunConfig, run_file_text
from launch.secrets import redact
from launch.software import gpus, host, source_state, versions
from teacher_cache.durable_files import replace_file
from teacher_cache.local_store import LocalStore
from teacher_cache.storage import open_store

RECORD = ".provenance.json"
RUN_FILE = ".run.yaml"


@dataclass(kw_only=True)
class Recording:
    """What becomes of a record."""

    counts: bool = True
    """False when everything was there already, so that nothing came from this run."""


@contextmanager
def recorded(
    outputs: Callable[[], Sequence[Path]],
    *,
    config: RunConfig | None,
    expected: Sequence[Path] = (),
    rerun: str = "`genrecal run` of this file",
) -> Iterator[Recording]:
    """Record the run of the block beside its outputs.

    Args:
        outputs: Asked at the end: files and folders that came from this run.
        config: What the run was told; None where no run file was given.
        expected: Files and folders that will come from this run, to be recorded before it begins.
        rerun: What makes the same again, in the words of the run file's first line.
    """
    recording, run = Recording(), _describe_run()
    for output in expected:
        _write(output, run=run | {"outcome": "running"}, config=config, rerun=rerun)
    ended = "done"
    try:
        yield recording
    except BaseException as error:
        ended = type(error).__name__
        raise
    finally:
        if recording.counts:
            run |= {"ended": _now(), "outcome": ended}
            made = outputs()
            for output in made:
                _write(output, run=run, config=config, rerun=rerun)
            for output in expected:
                if output not in made:
                    _forget(output, run=run)


def record_path(output: Path) -> Path:
    """Return where the record of an output lies."""
    return output.with_name(output.name + RECORD)


def run_file_path(output: Path) -> Path:
    """Return where the run file of an output lies."""
    return output.with_name(output.name + RUN_FILE)


def read_runs(output: Path) -> list[dict[str, Any]]:
    """Return the runs that an output came from, oldest first."""
    path = record_path(output)
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def cache_output(config: RunConfig) -> Path:
    """Return what the record of a cache lies beside: the cache, or `cache` in the run's folder for an object store."""
    store = open_store(config.cache.uri)
    return store.root if isinstance(store, LocalStore) else Path(config.output_dir) / "cache"


def _describe_run() -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "started": _now(),
        "argv": [redact(word) for word in sys.argv],
        "working_directory": os.getcwd(),
        "host": host(),
        "gpus": [gpu.name for gpu in gpus()],
        "versions": versions(),
        "source": source_state(),
    }


def _write(output: Path, *, run: dict[str, Any], config: RunConfig | None, rerun: str) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    if config is not None:
        header = f"What made {output.name}; {rerun} gives the same result."
        replace_file(run_file_path(output), run_file_text(config, header=header).encode())
    _write_record(output, runs=[*_other_runs(output, run=run), run])


def _forget(output: Path, *, run: dict[str, Any]) -> None:
    """Take back what was written of a run that did not come to an output."""
    if runs := _other_runs(output, run=run):
        _write_record(output, runs=runs)
    else:
        record_path(output).unlink(missing_ok=True)
        run_file_path(output).unlink(missing_ok=True)


def _other_runs(output: Path, *, run: dict[str, Any]) -> list[dict[str, Any]]:
    return [other for other in read_runs(output) if other["id"] != run["id"]]


def _write_record(output: Path, *, runs: Sequence[dict[str, Any]]) -> None:
    record = {"output": output.name, "runs": runs}
    replace_file(record_path(output), (json.dumps(record, indent=2) + "\n").encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
