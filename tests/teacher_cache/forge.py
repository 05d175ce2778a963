"""What an attacker can write who knows the format: changed documents and indexes, with every digest computed anew."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from safetensors.numpy import load, save

Body = dict[str, Any]


def digest_of_file(data: bytes) -> Body:
    """Return what documents say of a file."""
    return {"size_bytes": len(data), "blake3": blake3(data).hexdigest()}


def seal(covered: bytes) -> bytes:
    """Append the digest line to the text of a document."""
    return covered + b'"sha256": "' + hashlib.sha256(covered).hexdigest().encode() + b'"\n}\n'


def text_of(body: Body) -> bytes:
    """Return the text of a document up to its digest line; takes NaN and Infinity as well."""
    return ("{\n" + "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in body.items())).encode()


def body_of(path: Path) -> Body:
    """Return the content of a document."""
    body: Body = json.loads(path.read_bytes())
    del body["sha256"]
    return body


def only(root: Path, pattern: str) -> str:
    """Return the name of the one file that matches, or of the first of several."""
    return min(path.relative_to(root).as_posix() for path in root.glob(pattern))


def forge_text(root: Path, pattern: str, change: Callable[[bytes], bytes]) -> None:
    """Change the text of a document, its digest line aside, and compute all digests that cover it."""
    name = only(root, pattern)
    path = root / name
    path.write_bytes(seal(change(path.read_bytes().rpartition(b'"sha256": "')[0])))
    _settle(root, changed=name)


def forge(root: Path, pattern: str, change: Callable[[Body], None]) -> None:
    """Change the body of a document, and compute all digests that cover it."""
    body = body_of(root / only(root, pattern))
    change(body)
    forge_text(root, pattern, lambda _: text_of(body))


def forge_file(root: Path, pattern: str, change: Callable[[bytes], bytes]) -> None:
    """Change any file, and compute all digests that cover it."""
    name = only(root, pattern)
    path = root / name
    path.write_bytes(change(path.read_bytes()))
    _settle(root, changed=name)


def forge_index(root: Path, change: Callable[[dict[str, np.ndarray], list[Body]], None]) -> None:
    """Change the columns of the index, or its entries of shards, and compute all digests that cover it."""

    def forged(data: bytes) -> bytes:
        columns = load(data)
        entries = json.loads(columns["shards"].tobytes())
        change(columns, entries)
        columns["shards"] = np.frombuffer(json.dumps(entries).encode(), dtype=np.uint8)
        return save({name: np.ascontiguousarray(column) for name, column in columns.items()})

    forge_file(root, "index/*", forged)


def safetensors_file(header: bytes, *, claimed: int | None = None, data: bytes = b"") -> bytes:
    """Return a file in the form of safetensors, with any header and any claim of its length."""
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + data


def _settle(root: Path, *, changed: str) -> None:
    top, _, rest = changed.partition("/")
    if top == "shards":
        folder, _, path = rest.partition("/")
        name = f"commits/{folder.rpartition('-')[0]}.0.json"
        body = body_of(root / name)
        body["files"][path] = digest_of_file((root / changed).read_bytes())
        (root / name).write_bytes(seal(text_of(body)))
        return _settle(root, changed=name)
    if top == "commits":
        return forge_index(root, lambda _, entries: _settle_records(root, entries))
    if top == "plans" or top.startswith("teacher_head"):
        body = body_of(root / "CACHE.json")
        body["plan" if top == "plans" else "teacher_head"]["digest"] = digest_of_file((root / changed).read_bytes())
        (root / "CACHE.json").write_bytes(seal(text_of(body)))
    if top != "snapshots":
        name = only(root, "snapshots/*")
        body = body_of(root / name)
        body["files"] = {path: digest_of_file((root / path).read_bytes()) for path in body["files"]}
        (root / name).write_bytes(seal(text_of(body)))
    return None


def _settle_records(root: Path, entries: list[Body]) -> None:
    for entry in entries:
        entry["record"] = digest_of_file((root / "commits" / f"{entry['shard_id']}.0.json").read_bytes())
