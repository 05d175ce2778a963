"""The seal of a completed cache: one digest over everything outside the shards' folders."""

import logging
import re
from contextlib import suppress
from pathlib import Path

from teacher_cache.documents import encode_document
from teacher_cache.errors import CacheCorrupt, CacheError
from teacher_cache.ledger import committed_shards, read_record, record_path
from teacher_cache.manifest import Manifest, Plan, StoredModel, parse_model
from teacher_cache.storage import MANIFEST, SEAL, SHARDS, STAGING, FileDigest, digest_bytes, publish_bytes, remove

logger = logging.getLogger(__name__)

LEFTOVERS = re.compile(r"shards|commits|staging|plan-[0-9a-f]{16}\.json|teacher_head-[0-9a-f]{16}\.safetensors")
"""What a killed creation may leave in a folder that has no manifest yet."""

ATTEMPT = re.compile(r".*[-.][0-9a-f]{32}")
"""What one attempt writes under ``staging`` and ``shards``."""


class Seal(StoredModel):
    """Content of SEAL.json; with the commit records it covers every file of the cache."""

    files: dict[str, FileDigest]


def read_seal(root: Path, manifest: Manifest) -> Seal | None:
    """Return the seal of a completed cache, or None while it is being built.

    Raises:
        CacheCorrupt: the seal, or the manifest under it, was changed.
    """
    path = root / SEAL
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    seal = parse_model(Seal, data, where=str(path))
    if seal.files.get(MANIFEST) != digest_bytes((root / MANIFEST).read_bytes()):
        raise CacheCorrupt(f"{root / MANIFEST} was changed after the cache was completed")
    if seal.files.get(manifest.plan.file) != manifest.plan.digest:
        raise CacheCorrupt(f"{path} belongs to another cache")
    return seal


def seal_if_complete(root: Path, *, manifest: Manifest, plan: Plan) -> None:
    """Remove what lost attempts left and write the seal, once every planned shard is committed.

    Any number of processes may do this at once: they all write the same bytes.

    Raises:
        CacheCorrupt: the cache was completed before and has lost a commit record since.
        CacheError: the file system refused a step; opening the builder again tries once more.
    """
    committed = committed_shards(root, plan)
    if read_seal(root, manifest) is not None:
        if len(committed) < len(plan.shards):
            lost = sorted({shard.shard_id for shard in plan.shards} - {shard.shard_id for shard in committed})
            raise CacheCorrupt(f"{root}: completed, but the commit records of shards {lost[:5]} are missing")
        for path in _attempts(root / STAGING):
            remove(path)
        return
    if len(committed) < len(plan.shards):
        return
    try:
        _sweep(root, manifest=manifest, plan=plan)
        data = encode_document(_make_seal(root, manifest=manifest, plan=plan).model_dump(mode="json"))
        with suppress(FileNotFoundError):  # another process that completes the cache swept our temporary file
            publish_bytes(data, root / SEAL, staging=root / STAGING)
    except OSError as error:
        raise CacheError(f"{root}: all shards are committed, but the seal cannot be written: {error}") from error
    logger.info("cache %s is complete: %d shards, %d samples", root, len(plan.shards), plan.num_samples)


def _make_seal(root: Path, *, manifest: Manifest, plan: Plan) -> Seal:
    files = {manifest.plan.file: manifest.plan.digest}
    if manifest.teacher_head is not None:
        files[manifest.teacher_head.file] = manifest.teacher_head.digest
    for path in [root / MANIFEST, *(record_path(root, shard.shard_id) for shard in plan.shards)]:
        files[path.relative_to(root).as_posix()] = digest_bytes(path.read_bytes())
    return Seal(files=dict(sorted(files.items())))


def _sweep(root: Path, *, manifest: Manifest, plan: Plan) -> None:
    records = (read_record(root, shard, fingerprint=manifest.fingerprint) for shard in plan.shards)
    kept = {record.folder(root) for record in records}
    kept.add(root / manifest.plan.file)
    if manifest.teacher_head is not None:
        kept.add(root / manifest.teacher_head.file)
    attempts = [*_attempts(root / SHARDS), *_attempts(root / STAGING)]
    created = [path for path in root.iterdir() if path.is_file() and LEFTOVERS.fullmatch(path.name)]
    for path in [*attempts, *created]:
        if path not in kept:
            remove(path)


def _attempts(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if ATTEMPT.fullmatch(path.name)]
