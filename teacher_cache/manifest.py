"""The manifest: what a cache holds, which shards were planned, and whether it serves a run."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from teacher_cache.documents import canonical_json, decode_document, encode_document, parse_document
from teacher_cache.errors import (
    CacheCorrupt,
    CacheError,
    CacheMismatch,
    CacheNotFound,
    ConfigError,
    FormatUnsupported,
)
from teacher_cache.storage import MANIFEST, FileDigest, digest_bytes, read_committed

FORMAT: Final = "genrecal-cache"
VERSION: Final = 1

T = TypeVar("T", bound=BaseModel)

_SHARD_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class StoredModel(BaseModel):
    """Strict, frozen model of a stored document."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """One unit of work and of commit: these samples, in this order."""

    shard_id: str
    sample_ids: tuple[str, ...]


class Plan(StoredModel):
    """All shards of a cache."""

    shards: tuple[PlannedShard, ...]

    @property
    def num_samples(self) -> int:
        """Number of planned samples."""
        return sum(len(shard.sample_ids) for shard in self.shards)


class PlanEntry(StoredModel):
    """Where the plan lies."""

    file: str = Field(pattern=r"^plan-[0-9a-f]{16}\.json$")
    digest: FileDigest
    shards: int
    samples: int


class HeadEntry(StoredModel):
    """Where the teacher head lies, and its sizes."""

    file: str = Field(pattern=r"^teacher_head-[0-9a-f]{16}\.safetensors$")
    digest: FileDigest
    vocab_size: int
    hidden_size: int


class Manifest(StoredModel):
    """Content of CACHE.json."""

    format: Literal["genrecal-cache"] = FORMAT
    version: Literal[1] = VERSION
    identity: dict[str, JsonValue]
    fingerprint: str
    plan: PlanEntry
    teacher_head: HeadEntry | None
    provenance: dict[str, JsonValue]

    def encode(self) -> bytes:
        """Return the bytes of CACHE.json."""
        return encode_document(self.model_dump(mode="json"))


def fingerprint(identity: dict[str, Any]) -> str:
    """Return the SHA-256 (hex) of the canonical JSON of an identity payload.

    Raises:
        ConfigError: a value has no stable JSON form.
    """
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def identity_differences(*, stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Return one line per field that differs, as in ``teacher.weights: stored 'a', asked 'b'``."""
    left, right = _flatten(stored), _flatten(asked)
    return [
        f"{field}: stored {left.get(field, 'nothing')}, asked {right.get(field, 'nothing')}"
        for field in sorted(left.keys() | right.keys())
        if left.get(field) != right.get(field)
    ]


def require_identity(manifest: Manifest, *, asked: dict[str, Any], where: str) -> None:
    """Check that a cache holds what a run asks for.

    Raises:
        CacheMismatch: it does not; the message lists every field that differs.
    """
    if manifest.fingerprint != fingerprint(asked):
        lines = "\n  ".join(identity_differences(stored=manifest.identity, asked=asked))
        raise CacheMismatch(
            f"the cache at {where} was built from other content than this run asks for:\n  {lines}\n"
            "restore these settings, or give the run another cache uri"
        )


def read_manifest(root: Path) -> Manifest:
    """Read and check CACHE.json.

    Raises:
        CacheNotFound: there is none.
        FormatUnsupported: it was written in another format version.
        CacheCorrupt: its bytes differ from what was written.
    """
    path = root / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheNotFound(f"no cache at {root}: {path} does not exist; build the cache or correct the uri") from error
    except OSError as error:
        raise CacheError(f"cannot read {path}: {error}") from error
    document = parse_document(data, where=str(path))
    version = document.get("version")
    if document.get("format") != FORMAT or not isinstance(version, int) or version > VERSION:
        raise FormatUnsupported(
            f"{path}: written in format {document.get('format')!r} version {version!r}, this release reads "
            f"{FORMAT!r} up to version {VERSION}; use a newer release"
        )
    manifest = parse_model(Manifest, data, where=str(path))
    if manifest.fingerprint != fingerprint(manifest.identity):
        raise CacheCorrupt(f"{path}: the fingerprint {manifest.fingerprint} does not belong to the identity")
    return manifest


def check_plan(shards: Sequence[PlannedShard]) -> Plan:
    """Return a plan whose shard ids are safe names, whose sample ids are text, and whose ids are all distinct.

    Raises:
        ConfigError: they are not.
    """
    for shard in shards:
        if not _SHARD_ID.fullmatch(shard.shard_id):
            raise ConfigError(f"shard id {shard.shard_id!r}: expected letters, digits, '.', '_', '-', at most 100")
        if not shard.sample_ids:
            raise ConfigError(f"shard {shard.shard_id}: no samples are planned for it")
    canonical_json([shard.sample_ids for shard in shards])
    _require_distinct("shard id", [shard.shard_id for shard in shards])
    _require_distinct("sample id", [sample_id for shard in shards for sample_id in shard.sample_ids])
    return Plan(shards=tuple(shards))


def encode_plan(plan: Plan) -> tuple[bytes, PlanEntry]:
    """Return the bytes of a plan's file and its entry in the manifest."""
    data = encode_document(plan.model_dump(mode="json"))
    digest = digest_bytes(data)
    entry = PlanEntry(
        file=f"plan-{digest.sha256[:16]}.json", digest=digest, shards=len(plan.shards), samples=plan.num_samples
    )
    return data, entry


def read_plan(root: Path, manifest: Manifest) -> Plan:
    """Read the planned shards.

    Raises:
        CacheCorrupt: the file is missing or differs from what the manifest names.
    """
    path = root / manifest.plan.file
    data = read_committed(path, where="plan")
    if digest_bytes(data) != manifest.plan.digest:
        raise CacheCorrupt(f"{path} was changed: its digest differs from the one in {root / MANIFEST}")
    return parse_model(Plan, data, where=str(path))


def parse_model(model: type[T], data: bytes, *, where: str) -> T:
    """Check a document's digest and parse its body.

    Raises:
        CacheCorrupt: the digest or a field is wrong.
    """
    body = decode_document(data, where=where)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        fields = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise CacheCorrupt(f"{where}: not a {model.__name__.lower()} of format version {VERSION}: {fields}") from error


def _flatten(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {k: v for key in value for k, v in _flatten(value[key], f"{path}.{key}" if path else key).items()}
    return {path: canonical_json(value)}


def _require_distinct(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"{what} {name!r} is planned twice; every {what} must be unique")
        seen.add(name)
