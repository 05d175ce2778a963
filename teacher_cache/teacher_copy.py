"""Whether a node's own copy of the teacher is the one that the driver has identified, without reading all of it.

The identity of a cache has the digest of every byte of the driver's copy. Nodes may read another one: an older folder
on their own disk, or what a repository's branch has become in between.
"""

import hashlib
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from teacher_cache.config import TeacherConfig
from teacher_cache.errors import ConfigError
from teacher_cache.teacher_checkpoint import checkpoint_directory, small_files, weight_files

BLOCKS: Final = 16
"""Of a weight file; the first holds its table of tensors."""
BLOCK_BYTES: Final = 64 * 1024

_PARALLEL_FILES: Final = 16
_NAMED: Final = 3


@dataclass(frozen=True, kw_only=True)
class TeacherCopy:
    """What tells copies of a checkpoint apart."""

    where: str
    """Host and folder of the copy, as errors name it."""
    revision: str | None
    """Commit of the repository; None for a folder."""
    files: dict[str, str]
    """SHA-256 (hex) by name: of small files over their content, of weights over their length and evenly spread blocks.
    Copies whose weights differ in few tensors alone may look the same."""


def at_commit(config: TeacherConfig) -> TeacherConfig:
    """Return a teacher that no later commit changes: a repository id gets the commit that it stands for now.

    Raises:
        ConfigError: There is no such checkpoint.
    """
    if Path(config.model).is_dir():
        return config
    # a snapshot's folder has the name of its commit, also where the Hub is out of reach
    return config.model_copy(update={"revision": checkpoint_directory(config).name})


def describe_copy(config: TeacherConfig) -> TeacherCopy:
    """Return what tells this node's copy of a teacher from others; reads at most a megabyte of each weight file.

    Args:
        config: From :func:`at_commit`.

    Raises:
        ConfigError: There is no such checkpoint.
    """
    directory = checkpoint_directory(config)
    weights = weight_files(directory)
    files = [*small_files(directory, trusted=config.trust_remote_code), *weights]
    files = [file for file in dict.fromkeys(files) if file.is_file()]
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        digests = pool.map(lambda file: _digest(file, whole=file not in weights), files)
        return TeacherCopy(
            where=f"{socket.gethostname()}:{directory}",
            revision=None if Path(config.model).is_dir() else config.revision,
            files={str(file.relative_to(directory)): digest for file, digest in zip(files, digests, strict=True)},
        )


def require_same_copy(config: TeacherConfig, *, expected: TeacherCopy) -> TeacherConfig:
    """Return the teacher for this node to load: at the driver's commit, and found to be the driver's copy.

    Args:
        config: As the run file has it.
        expected: The driver's copy.

    Raises:
        ConfigError: This node has another one, or none.
    """
    config = config.model_copy(update={"revision": expected.revision or config.revision})
    found = describe_copy(config)
    names = sorted(expected.files.keys() | found.files.keys())
    if differing := [name for name in names if expected.files.get(name) != found.files.get(name)]:
        named = ", ".join(f"{name} ({_difference(name, found, expected)})" for name in differing[:_NAMED])
        raise ConfigError(
            f"{found.where} is another teacher than {expected.where}, whose digests the cache has: {len(differing)} "
            f"file(s) are not the same: {named}; copy the checkpoint to this node again, or put it on a file system "
            "that all nodes share"
        )
    return config


def _difference(name: str, found: TeacherCopy, expected: TeacherCopy) -> str:
    if name not in found.files:
        return "missing here"
    return "other content" if name in expected.files else "only here"


def _digest(file: Path, *, whole: bool) -> str:
    size = file.stat().st_size
    with file.open("rb") as content:
        if whole or size <= BLOCKS * BLOCK_BYTES:
            return hashlib.file_digest(content, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for offset in np.linspace(0, size - BLOCK_BYTES, BLOCKS).astype(np.int64).tolist():
            content.seek(offset)
            digest.update(content.read(BLOCK_BYTES))
        return digest.hexdigest()
