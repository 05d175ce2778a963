"""Caches whose content was changed so that all digests fit that lie in the cache itself."""

import base64
import itertools
from pathlib import Path

import numpy as np

from tests.teacher_cache.assault import Attack
from tests.teacher_cache.attacks import in_column, in_document, in_index
from tests.teacher_cache.forge import Body, body_of, digest_of_file, forge_file, forge_index, only, seal, text_of


def flip(pattern: str) -> Attack:
    """Flip a bit in the middle of a file."""

    def change(data: bytes) -> bytes:
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]

    return lambda root: forge_file(root, pattern, change)


def later_record(root: Path) -> None:
    """Change rows, and put a later record beside the one that the snapshot vouches for."""
    record = only(root, "commits/*")
    body = body_of(root / record)
    rows = root / only(root, "shards/*/hidden_states/c.0.0")
    data = bytearray(rows.read_bytes())
    data[0] ^= 1
    rows.write_bytes(data)
    body["files"]["hidden_states/c.0.0"] = digest_of_file(bytes(data))
    body["revision"] = 1
    (root / record.replace(".0.json", ".1.json")).write_bytes(seal(text_of(body)))


def later_snapshot(root: Path) -> None:
    """Put a snapshot after the latest one."""
    body = body_of(root / only(root, "snapshots/*"))
    body["number"] = 1
    (root / "snapshots" / "00000001.json").write_bytes(seal(text_of(body)))


def later_plan(root: Path) -> None:
    """Plan another shard."""
    first = root / only(root, "plans/*")
    body = {
        "previous": digest_of_file(first.read_bytes())["blake3"],
        "shards": [{"shard_id": "late", "sample_ids": ["late"]}],
        "sample_digests": base64.b64encode(bytes(32)).decode(),
    }
    (root / "plans" / "000001.json").write_bytes(seal(text_of(body)))


def swapped_ids(root: Path) -> None:
    """Give the targets of one sample out as those of another."""

    def change(columns: dict[str, np.ndarray], _: list[Body]) -> None:
        columns["key_order"] = columns["key_order"][::-1].copy()
        columns["keys"] = columns["keys"].copy()
        ids = [columns["id_bytes"][start:stop] for start, stop in itertools.pairwise(columns["id_offsets"])]
        columns["id_bytes"] = np.concatenate(ids[::-1])

    forge_index(root, change)


TAMPERING: dict[str, Attack] = {
    **{
        f"another bit in {pattern}": flip(pattern)
        for pattern in ("teacher_head*", "index/*", "shards/*/*/c.*", "shards/*/zarr.json", "shards/*/*/zarr.json")
    },
    "another provenance": in_document("CACHE.json", "provenance", {"release": "9.9.9"}),
    "another provenance of a shard": in_document("commits/*", "provenance", {"engine": "mine"}),
    "another digest of a sample": in_document("plans/*", "sample_digests", lambda text: text[:40] + "A" + text[41:]),
    "another digest of a sample in the index": in_column("digests", lambda column: column ^ 1),
    "another checksum": in_column("crc32c", lambda column: column ^ 1),
    "another data digest": in_document("snapshots/*", "data.digest", "0" * 64),
    "another reason of a skip": in_index("skipped", [{"sample_id": "x", "reason": "bad-row", "message": "m"}]),
    "swapped ids": swapped_ids,
    "a later record": later_record,
    "a later snapshot": later_snapshot,
    "a later plan": later_plan,
}
