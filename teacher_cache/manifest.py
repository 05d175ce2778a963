"""The manifest: what decides the targets in a cache, and whether it serves a run."""

import hashlib
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from teacher_cache.config import RowCodec
from teacher_cache.documents import canonical_json, decode_document, encode_document, parse_document
from teacher_cache.durable_files import FileDigest
from teacher_cache.errors import (
    CacheCorrupt,
    CacheError,
    CacheMismatch,
    CacheNotFound,
    ConfigError,
    FormatUnsupported,
)
from teacher_cache.storage import DOCUMENT_LIMIT_BYTES, Store

MANIFEST: Final = "CACHE.json"
FORMAT: Final = "genrecal-cache"
VERSION: Final = 2
LIMIT_BYTES: Final = 16 * 1024**2
"""Longest manifest or snapshot."""

T = TypeVar("T", bound=BaseModel)


class StoredModel(BaseModel):
    """Strict, frozen model of a stored document."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PlanEntry(StoredModel):
    """Where the first generation of the plan lies."""

    file: str = Field(pattern=r"^plans/000000-[0-9a-f]{16}\.json$")
    digest: FileDigest


class HeadEntry(StoredModel):
    """Where the teacher head lies, and its sizes."""

    file: str = Field(pattern=r"^teacher_head-[0-9a-f]{16}\.safetensors$")
    digest: FileDigest
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)


class Manifest(StoredModel):
    """Content of CACHE.json."""

    format: Literal["genrecal-cache"] = FORMAT
    version: Literal[2] = VERSION
    identity: dict[str, JsonValue]
    """Teacher, processing, targets and tap: all that decides a sample's targets beside the sample itself."""
    fingerprint: str
    """SHA-256 (hex) of the identity's canonical JSON."""
    codec: RowCodec
    """How hidden states are stored; part of the identity."""
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


def identity_differences(
    *, stored: dict[str, Any], asked: dict[str, Any], sides: tuple[str, str] = ("stored", "asked")
) -> list[str]:
    """Return one line per field that differs, as in ``teacher.weights: stored "a", asked "b"``."""
    left, right = _flatten(stored), _flatten(asked)
    return [
        f"{field}: {sides[0]} {left.get(field, 'nothing')}, {sides[1]} {right.get(field, 'nothing')}"
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


def read_manifest(store: Store) -> Manifest:
    """Read and check CACHE.json.

    Raises:
        CacheNotFound: there is none.
        FormatUnsupported: it was written in another format version.
        CacheCorrupt: its bytes differ from what was written.
    """
    where = f"{store.uri}/{MANIFEST}"
    try:
        data = store.read(MANIFEST, limit_bytes=LIMIT_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheNotFound(
            f"no cache at {store.uri}: {where} does not exist; build the cache or correct the uri"
        ) from error
    except OSError as error:
        raise CacheError(f"cannot read {where}: {error}") from error
    document = parse_document(data, where=where)
    version = document.get("version")
    if document.get("format") != FORMAT or version != VERSION:
        older = isinstance(version, int) and version < VERSION
        raise FormatUnsupported(
            f"{where}: written in format {document.get('format')!r} version {version!r}, this release reads "
            f"{FORMAT!r} version {VERSION}; {'build the cache again' if older else 'use a newer release'}"
        )
    manifest = parse_model(Manifest, data, where=where)
    try:
        expected = fingerprint(manifest.identity)
    except ConfigError as error:
        raise CacheCorrupt(f"{where}: the identity has {error}") from error
    if manifest.fingerprint != expected:
        raise CacheCorrupt(f"{where}: the fingerprint {manifest.fingerprint} does not belong to the identity")
    return manifest


def read_document(store: Store, name: str, *, where: str, limit_bytes: int = DOCUMENT_LIMIT_BYTES) -> bytes:
    """Return the bytes of a document that must exist.

    Raises:
        CacheCorrupt: it is missing.
        CacheError: it cannot be read.
    """
    try:
        return store.read(name, limit_bytes=limit_bytes)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheCorrupt(f"{where}: {store.uri}/{name} is missing; restore it or build the cache again") from error
    except OSError as error:
        raise CacheError(f"{where}: cannot read {store.uri}/{name}: {error}") from error


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
