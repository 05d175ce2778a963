"""The plan: which samples belong to which shard, in numbered generations of which the later ones extend the first."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from teacher_cache.documents import canonical_json, encode_document
from teacher_cache.durable_files import FileDigest, digest_bytes
from teacher_cache.errors import CacheCorrupt, CacheError, CacheMismatch, ConfigError
from teacher_cache.manifest import Manifest, PlanEntry, StoredModel, parse_model, read_document
from teacher_cache.storage import Store

PLANS: Final = "plans"
GENERATION_LIMIT_BYTES: Final = 64 * 1024**2
"""Longest generation that extends a plan: its name does not say its content, so an object store takes it in one put."""
SHARD_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")

_DIGEST = re.compile(r"[0-9a-f]{64}")
_DIGEST_BYTES = 32
_ENTRY_BYTES, _SAMPLE_BYTES = 64, 44
"""At most what an entry of a generation takes beside its ids, and a digest in base64."""
_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """One unit of work and of commit: these samples, in this order."""

    shard_id: str
    sample_ids: tuple[str, ...]
    sample_digests: tuple[str, ...]
    """SHA-256 (hex) of each sample's content."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All shards of a cache, generation after generation."""

    shards: tuple[PlannedShard, ...]
    generations: tuple[FileDigest, ...]
    """Digest of each generation's document, oldest first."""

    @property
    def num_samples(self) -> int:
        """Number of planned samples."""
        return sum(len(shard.sample_ids) for shard in self.shards)

    @property
    def data(self) -> dict[str, Any]:
        """What identifies the samples: their number and the digest over ids and contents."""
        digests = self.digests()
        return {"samples": len(digests), "digest": data_digest(digests.items())}

    def digests(self) -> dict[str, str]:
        """Return the digest of each sample by its id."""
        return {
            sample_id: digest
            for shard in self.shards
            for sample_id, digest in zip(shard.sample_ids, shard.sample_digests, strict=True)
        }


class _ShardEntry(StoredModel):
    shard_id: str
    sample_ids: tuple[str, ...]


class _Generation(StoredModel):
    """Content of a document in plans/."""

    previous: str | None
    """BLAKE3 of the generation before."""
    shards: tuple[_ShardEntry, ...]
    sample_digests: str
    """Base64 of the samples' SHA-256, in order."""


def data_digest(samples: Iterable[tuple[str, str]]) -> str:
    """Return the SHA-256 (hex) over pairs of id and content digest, whatever their order."""
    lines = sorted(f"{sample_id}\0{digest}\n" for sample_id, digest in samples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_plan(shards: Sequence[PlannedShard]) -> tuple[PlannedShard, ...]:
    """Return shards whose ids are safe names, whose sample ids are text, and whose ids are all distinct.

    Raises:
        ConfigError: they are not.
    """
    for shard in shards:
        if not SHARD_ID.fullmatch(shard.shard_id):
            raise ConfigError(f"shard id {shard.shard_id!r}: expected letters, digits, '_', '-', at most 100")
        if not shard.sample_ids:
            raise ConfigError(f"shard {shard.shard_id}: no samples are planned for it")
        if len(shard.sample_ids) != len(shard.sample_digests) or not all(map(_DIGEST.fullmatch, shard.sample_digests)):
            raise ConfigError(f"shard {shard.shard_id}: expected one SHA-256 in 64 hex digits per sample")
    canonical_json([shard.sample_ids for shard in shards])
    _require_distinct("shard id", [shard.shard_id for shard in shards])
    _require_distinct("sample id", [sample_id for shard in shards for sample_id in shard.sample_ids])
    return tuple(shards)


def first_generation(shards: Sequence[PlannedShard]) -> tuple[bytes, PlanEntry]:
    """Return the document that a cache's manifest names, and its entry there; named after its content."""
    data = _encode(shards, previous=None)
    digest = digest_bytes(data)
    return data, PlanEntry(file=f"{PLANS}/{0:06}-{digest.blake3[:16]}.json", digest=digest)


def generation_name(number: int, manifest: Manifest) -> str:
    """Return where a generation of the plan lies."""
    return manifest.plan.file if number == 0 else f"{PLANS}/{number:06}.json"


def append_generation(store: Store, manifest: Manifest, *, stored: Plan, shards: Sequence[PlannedShard]) -> None:
    """Extend a plan durably, by as many generations as the shards take.

    Who dies between two of them has extended the cache by a part: the same shards, asked for again, make the rest.

    Raises:
        ConfigError: an id is planned already, or a shard is too large for a generation.
        CacheMismatch: another builder has added other samples at the same time.
    """
    check_plan([*stored.shards, *shards])
    previous = stored.generations[-1].blake3
    grouped = list(_in_generations(shards))  # whole, before the first of them is written
    for number, chosen in enumerate(grouped, start=len(stored.generations)):
        name, data = generation_name(number, manifest), _encode(chosen, previous=previous)
        if not store.create(name, data):
            raise CacheMismatch(f"another builder planned other samples in {store.uri}/{name}; run the build again")
        previous = digest_bytes(data).blake3


def read_plan(store: Store, manifest: Manifest) -> Plan:
    """Read all generations of the plan.

    Raises:
        CacheCorrupt: one is missing, was changed, or belongs to another cache.
    """
    shards: list[PlannedShard] = []
    generations: list[FileDigest] = []
    while (data := _read_generation(store, len(generations), manifest)) is not None:
        where = f"{store.uri}/{generation_name(len(generations), manifest)}"
        digest = digest_bytes(data)
        document = parse_model(_Generation, data, where=where)
        expected = generations[-1].blake3 if generations else None
        if document.previous != expected or (not generations and digest != manifest.plan.digest):
            raise CacheCorrupt(f"{where} is not the generation of the plan that belongs here: its digest differs")
        shards += _decode_shards(document, where=where)
        generations.append(digest)
    try:
        return Plan(shards=check_plan(shards), generations=tuple(generations))
    except ConfigError as error:
        raise CacheCorrupt(f"{store.uri}/{PLANS}: {error}") from error


def require_samples(stored: Plan, *, asked: dict[str, str], where: str, extend: bool) -> None:
    """Check that a cache was planned for all samples that a run asks for, or may be extended by them.

    Raises:
        CacheMismatch: a sample has other content, or is not planned and ``extend`` is not set.
    """
    planned = stored.digests()
    changed = [sample_id for sample_id, digest in asked.items() if planned.get(sample_id, digest) != digest]
    if changed:
        lines = "\n  ".join(f"{id_}: stored {planned[id_]}, asked {asked[id_]}" for id_ in changed[:_NAMED])
        raise CacheMismatch(
            f"the cache at {where} was planned for other samples: {len(changed)} have another text or other images:\n"
            f"  {lines}\ngive them new ids, or give the run another cache uri"
        )
    new = [sample_id for sample_id in asked if sample_id not in planned]
    if new and not extend:
        raise CacheMismatch(
            f"the cache at {where} was planned for other samples: {len(planned)} stored, {len(asked)} asked, of which "
            f"{len(new)} are not stored, first {new[:_NAMED]}; set `cache.build.extend` to add them, or give the run "
            "another cache uri"
        )


def _in_generations(shards: Sequence[PlannedShard]) -> Iterator[list[PlannedShard]]:
    """Yield the shards of one generation after the other."""
    chosen: list[PlannedShard] = []
    size = 0
    for shard in shards:
        ids = json.dumps([shard.shard_id, shard.sample_ids])
        length = _ENTRY_BYTES + len(ids) + _SAMPLE_BYTES * len(shard.sample_ids)
        if length > GENERATION_LIMIT_BYTES:
            raise ConfigError(
                f"shard {shard.shard_id}: its {len(shard.sample_ids)} samples take {length} bytes of the plan, an "
                f"extension takes at most {GENERATION_LIMIT_BYTES}; plan smaller shards"
            )
        if size + length > GENERATION_LIMIT_BYTES:
            yield chosen
            chosen, size = [], 0
        chosen.append(shard)
        size += length
    yield chosen


def _encode(shards: Sequence[PlannedShard], *, previous: str | None) -> bytes:
    digests = b"".join(bytes.fromhex(digest) for shard in shards for digest in shard.sample_digests)
    document = _Generation(
        previous=previous,
        shards=tuple(_ShardEntry(shard_id=shard.shard_id, sample_ids=shard.sample_ids) for shard in shards),
        sample_digests=base64.b64encode(digests).decode(),
    )
    return encode_document(document.model_dump(mode="json"))


def _read_generation(store: Store, number: int, manifest: Manifest) -> bytes | None:
    name = generation_name(number, manifest)
    if number == 0:
        return read_document(store, name, where="plan", limit_bytes=manifest.plan.digest.size_bytes)
    try:
        return store.read(name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"plan: cannot read {store.uri}/{name}: {error}") from error


def _decode_shards(document: _Generation, *, where: str) -> list[PlannedShard]:
    try:
        digests = base64.b64decode(document.sample_digests, validate=True)
    except ValueError as error:
        raise CacheCorrupt(f"{where}: sample_digests is no base64: {error}") from error
    wanted = sum(len(shard.sample_ids) for shard in document.shards) * _DIGEST_BYTES
    if len(digests) != wanted:
        raise CacheCorrupt(f"{where}: sample_digests has {len(digests)} bytes, expected {wanted}")
    hexadecimal = iter(digests[i : i + _DIGEST_BYTES].hex() for i in range(0, len(digests), _DIGEST_BYTES))
    return [
        PlannedShard(
            shard_id=shard.shard_id,
            sample_ids=shard.sample_ids,
            sample_digests=tuple(next(hexadecimal) for _ in shard.sample_ids),
        )
        for shard in document.shards
    ]


def _require_distinct(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"{what} {name!r} is planned twice; every {what} must be unique")
        seen.add(name)
