"""Checkpoints that count only once committed: every file synced and digested, then one record.

    checkpoints/step-00000500/          what the backend wrote
    checkpoints/step-00000500/COMMIT.json    step, identity of the run, digest of every file; written last

The newest tag whose files still have their digests is resumed. DeepSpeed's own `latest` file is not used: it
is rewritten in place.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.engine import Engine
from distill.processes import Processes
from teacher_cache.documents import decode_document, encode_document
from teacher_cache.durable_files import FileDigest, digest_file, remove, sync_folder, sync_tree
from teacher_cache.errors import CacheCorrupt, CheckpointError
from teacher_cache.manifest import identity_differences

logger = logging.getLogger(__name__)

RECORD = "COMMIT.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One committed checkpoint."""

    directory: Path
    step: int
    identity: dict[str, Any]
    files: dict[str, FileDigest]


def save_checkpoint(
    engine: Engine, directory: Path, *, step: int, identity: dict[str, Any], processes: Processes, keep: int
) -> None:
    """Write and commit a checkpoint, then delete all but the newest ``keep``. Every process calls this."""
    tag = directory / f"step-{step:08d}"
    if processes.rank == 0:
        remove(tag)
        tag.mkdir(parents=True)
    processes.barrier()
    engine.save(tag)
    processes.barrier()
    if processes.rank == 0:
        _commit(tag, step=step, identity=identity)
        for old in committed_tags(directory)[:-keep]:
            # the record first: what is half deleted must not look committed
            remove(old / RECORD)
            remove(old)
    processes.barrier()


def find_checkpoint(directory: Path, *, identity: dict[str, Any], processes: Processes) -> Checkpoint | None:
    """Return the newest checkpoint whose files are all as they were committed, or None when there is none yet.

    Raises:
        CheckpointError: It belongs to a run with other settings, or every checkpoint is damaged.
    """
    tags = committed_tags(directory)
    for tag in reversed(tags):
        checkpoint = _read(tag)
        if checkpoint is not None:
            require_same_run(stored=checkpoint.identity, asked=identity, where=tag)
        # every process looks at its share of the files, and all must agree
        damaged = checkpoint is None or _damaged_files(checkpoint, processes) > 0
        if not processes.sum([float(damaged)])[0]:
            return checkpoint
        logger.warning("checkpoint %s is damaged: falling back to the one before it", tag)
    if tags:
        raise CheckpointError(f"all {len(tags)} checkpoints in {directory} are damaged: delete it to restart the stage")
    return None


def require_same_run(*, stored: dict[str, Any], asked: dict[str, Any], where: Path) -> None:
    """Raise CheckpointError, naming every field, unless two runs have the same identity."""
    differences = identity_differences(stored=stored, asked=asked)
    if differences:
        listed = "\n".join(f"  {difference}" for difference in differences)
        raise CheckpointError(
            f"{where} comes from a run with other settings:\n{listed}\n"
            "Restore them, or choose another output_dir, or delete the stage's folder to train it anew."
        )


def committed_tags(directory: Path) -> list[Path]:
    """Return the folders of committed checkpoints, oldest first."""
    return sorted(path.parent for path in directory.glob(f"step-*/{RECORD}"))


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file atomically, its bytes and its name synced."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def _commit(tag: Path, *, step: int, identity: dict[str, Any]) -> None:
    digests = {name: [digest.size_bytes, digest.blake3] for name, digest in sync_tree(tag).items()}
    sync_folder(tag.parent)
    write_durably(tag / RECORD, encode_document({"step": step, "identity": identity, "files": digests}))


def _read(tag: Path) -> Checkpoint | None:
    try:
        body = json.loads(decode_document((tag / RECORD).read_bytes(), where=str(tag / RECORD)))
    except CacheCorrupt:
        return None
    files = {name: FileDigest(size_bytes=size, blake3=blake3) for name, (size, blake3) in body["files"].items()}
    return Checkpoint(directory=tag, step=body["step"], identity=body["identity"], files=files)


def _damaged_files(checkpoint: Checkpoint, processes: Processes) -> int:
    mine = sorted(checkpoint.files)[processes.rank :: processes.world_size]
    return sum(not _intact(checkpoint.directory / name, expected=checkpoint.files[name]) for name in mine)


def _intact(path: Path, *, expected: FileDigest) -> bool:
    return path.is_file() and path.stat().st_size == expected.size_bytes and digest_file(path) == expected
