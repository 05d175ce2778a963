"""Checkpoints that count only once committed: every file synced and digested, then one record.

    checkpoints/step-00000500/               what the backend wrote
    checkpoints/step-00000500/COMMIT.json    step, identity and layout of the run, digest of every file; written last
    checkpoints/damaged-step-00001000/       a tag that did not verify, put aside

The newest tag whose files still have their digests is resumed. DeepSpeed's own `latest` file is not used: it
is rewritten in place.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from distill.engine import Engine
from distill.faults import gather
from distill.processes import Processes
from teacher_cache.documents import decode_document, encode_document
from teacher_cache.durable_files import (
    FileDigest,
    digest_file,
    file_names,
    remove,
    sync_files,
    sync_folder,
    sync_folders,
    sync_names_above,
)
from teacher_cache.errors import CacheCorrupt, CheckpointError, GenrecalError
from teacher_cache.manifest import identity_differences

logger = logging.getLogger(__name__)

RECORD = "COMMIT.json"
ANY_SIZE = "any"
"""World size of a tag that any number of processes can load."""
_WRITER = re.compile(r"zero_pp_rank_(\d+)_")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One committed checkpoint."""

    directory: Path
    record: "Record"
    files: dict[str, FileDigest]

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return self.record.step


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a checkpoint beside its files."""

    step: int
    identity: dict[str, Any]
    """What decides the training: a run with another one does not resume it."""
    layout: dict[str, Any]
    """Backend and world size that wrote it: a run with another one cannot read it."""
    origin: dict[str, Any]
    """What an export needs: the untouched student and its element type."""
    state: dict[str, Any]
    """State of the loop that is no function of the step."""


def save_checkpoint(engine: Engine, directory: Path, *, record: Record, processes: Processes, keep: int) -> None:
    """Write and commit a checkpoint, then delete all but the newest ``keep``. Every process calls this.

    Each process syncs and digests its share of the files; the first one then writes the record.

    Raises:
        GenrecalError: Another process could not do its part; the checkpoint does not count.
    """
    tag = directory / f"step-{record.step:08d}"

    def prepare() -> None:
        if processes.rank == 0:
            discard_tag(tag)
            tag.mkdir(parents=True)

    _together(prepare, processes, tag=tag)
    engine.save(tag)
    # what a process wrote it sees itself; on shared storage others may see it later
    seen = _together(lambda: file_names(tag), processes, tag=tag)
    share = own_share(sorted({name for names in seen for name in names}), processes)
    digests = _together(lambda: sync_files(tag, share), processes, tag=tag)

    def finish() -> None:
        if processes.rank == 0:
            _let_count(tag, record, files={name: digest for part in digests for name, digest in part.items()})
            for old in committed_tags(directory)[:-keep]:
                discard_tag(old)

    _together(finish, processes, tag=tag)


def own_share(names: Sequence[str], processes: Processes) -> list[str]:
    """Return the files that this process has written, by DeepSpeed's names, and its part of all others."""
    writers = {name: int(found[1]) for name in names if (found := _WRITER.search(name))}
    others = [name for name in names if name not in writers][processes.rank :: processes.world_size]
    return [*(name for name, rank in writers.items() if rank % processes.world_size == processes.rank), *others]


def _together(act: Callable[[], T], processes: Processes, *, tag: Path) -> tuple[T, ...]:
    """Let every process act, and return what each got; one that fails ends all, instead of leaving them waiting."""
    result, error = None, None
    try:
        result = act()
    except Exception as raised:
        error = raised
    outcomes = gather((result, None if error is None else f"{type(error).__name__}: {error}"), processes)
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise GenrecalError(
                f"process {rank} could not save {tag} ({failure}): it does not count, and the checkpoint before it is "
                "what the next start goes on from"
            )
    return tuple(cast(T, result) for result, _ in outcomes)


def find_checkpoint(
    directory: Path, *, identity: dict[str, Any], layout: dict[str, Any], processes: Processes
) -> Checkpoint | None:
    """Return the newest checkpoint whose files are all as they were committed, or None when there is none yet.

    Damaged ones are put aside, so that they do not count among those to keep.

    Raises:
        CheckpointError: It belongs to a run with other settings or another layout, or every checkpoint is damaged.
    """
    tags = committed_tags(directory)
    for tag in reversed(tags):
        checkpoint = read_checkpoint(tag)
        if checkpoint is not None:
            require_same_run(stored=checkpoint.record.identity, asked=identity, where=tag)
        # every process looks at its share of the files, and all must agree
        damaged = checkpoint is None or not checkpoint.files or bool(damaged_files(checkpoint, processes))
        if not processes.sum([float(damaged)])[0]:
            assert checkpoint is not None
            require_same_layout(stored=checkpoint.record.layout, asked=layout, where=tag)
            _put_aside(tags[tags.index(tag) + 1 :], processes)
            return checkpoint
        logger.warning("checkpoint %s is damaged: falling back to the one before it", tag)
    if tags:
        raise CheckpointError(
            f"all {len(tags)} checkpoints in {directory} are damaged: restore one from a copy, or delete the folder to "
            "restart the stage"
        )
    return None


def intact_checkpoint(directory: Path) -> Checkpoint:
    """Return the newest checkpoint of a folder whose files are all as they were committed, whichever run it is of.

    Raises:
        CheckpointError: There is none.
    """
    lone = Processes(rank=0, world_size=1, device=torch.device("cpu"))
    tags = committed_tags(directory)
    for tag in reversed(tags):
        checkpoint = read_checkpoint(tag)
        if checkpoint is not None and checkpoint.files and not damaged_files(checkpoint, lone):
            return checkpoint
        logger.warning("checkpoint %s is damaged: falling back to the one before it", tag)
    raise CheckpointError(f"{len(tags)} checkpoints in {directory}, none of them intact")


def require_same_run(*, stored: dict[str, Any], asked: dict[str, Any], where: Path) -> None:
    """Raise CheckpointError, naming every field, unless two runs have the same identity."""
    differences = identity_differences(stored=stored, asked=asked)
    if differences:
        listed = "\n".join(f"  {difference}" for difference in differences)
        raise CheckpointError(
            f"{where} comes from a run with other settings:\n{listed}\n"
            "Restore them, or choose another output_dir, or delete the stage's folder to train it anew."
        )


def require_same_layout(*, stored: dict[str, Any], asked: dict[str, Any], where: Path) -> None:
    """Raise CheckpointError, naming what to do, unless these processes can read what others wrote."""
    if stored["backend"] != asked["backend"]:
        raise CheckpointError(
            f"{where} was written by backend {stored['backend']}, which backend {asked['backend']} cannot read: set "
            f"train.backend to {stored['backend']}, or delete the stage's folder to train it anew"
        )
    if stored["world_size"] not in (asked["world_size"], ANY_SIZE):
        raise CheckpointError(
            f"{where} was written by {stored['world_size']} processes, and this run has {asked['world_size']}: make it "
            f"readable for any number with `genrecal reshard {where.parent.parent}`, then start again"
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


def commit(tag: Path, record: Record) -> None:
    """Make a tag durable and let it count."""
    _let_count(tag, record, files=sync_files(tag, file_names(tag)))


def _let_count(tag: Path, record: Record, *, files: Mapping[str, FileDigest]) -> None:
    """Make the names of a tag durable, whose files are, and write its record."""
    sync_folders(tag)
    sync_folder(tag.parent)
    sync_names_above(tag.parent)
    digests = {name: [digest.size_bytes, digest.blake3] for name, digest in sorted(files.items())}
    write_durably(tag / RECORD, encode_document({**vars(record), "files": digests}))


def discard_tag(tag: Path) -> None:
    """Delete a tag; the record first and for good: what is half deleted must not look committed."""
    if (tag / RECORD).exists():
        remove(tag / RECORD)
        sync_folder(tag)
    remove(tag)


def read_checkpoint(tag: Path) -> Checkpoint | None:
    """Return what the record of a tag says; None where it is damaged."""
    try:
        body = json.loads(decode_document((tag / RECORD).read_bytes(), where=str(tag / RECORD)))
    except (CacheCorrupt, FileNotFoundError):
        return None
    files = {name: FileDigest(size_bytes=size, blake3=blake3) for name, (size, blake3) in body.pop("files").items()}
    return Checkpoint(directory=tag, record=Record(**body), files=files)


def damaged_files(checkpoint: Checkpoint, processes: Processes) -> list[str]:
    """Return which files of this process's share are missing or not as they were committed."""
    mine = sorted(checkpoint.files)[processes.rank :: processes.world_size]
    return [name for name in mine if not _intact(checkpoint.directory / name, expected=checkpoint.files[name])]


def _put_aside(tags: Sequence[Path], processes: Processes) -> None:
    if processes.rank == 0:
        for tag in tags:
            target = tag.with_name(f"damaged-{tag.name}")
            remove(target)
            tag.rename(target)
    processes.barrier()


def _intact(path: Path, *, expected: FileDigest) -> bool:
    return path.is_file() and path.stat().st_size == expected.size_bytes and digest_file(path) == expected
