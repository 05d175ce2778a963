"""Caches that an attacker has written: every digest fits, so only the structure can tell."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from tests.teacher_cache.assault import Attack
from tests.teacher_cache.forge import (
    Body,
    forge,
    forge_file,
    forge_index,
    forge_text,
    only,
    safetensors_file,
)

HUGE = (0, -1, 10**9, 10**13, 2**63 - 1, 2**64, float("nan"), float("inf"), 8.5, "8", None, [8], True)
"""Instead of a size."""


def in_index(key: str, value: Any) -> Attack:
    """Change a key of the first shard's entry in the index."""

    def change(_: dict[str, np.ndarray], entries: list[Body]) -> None:
        *parents, last = key.split(".")
        target = entries[0]
        for parent in parents:
            target = target[parent]
        target[last] = value

    return lambda root: forge_index(root, change)


def in_column(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Attack:
    """Change a column of the index."""
    return lambda root: forge_index(root, lambda columns, _: columns.update({name: change(columns[name].copy())}))


def in_document(pattern: str, key: str, value: Any) -> Attack:
    """Change a key of a document; a callable value takes the old one."""

    def change(body: Body) -> None:
        *parents, last = key.split(".")
        target: Any = body
        for parent in parents:
            target = target[int(parent) if isinstance(target, list) else parent]
        target[last] = value(target[last]) if callable(value) else value

    return lambda root: forge(root, pattern, change)


def put(value: int, *, row: int, column: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a change of one number of a table."""

    def change(table: np.ndarray) -> np.ndarray:
        table[row, column] = value
        return table

    return change


def many_tokens(root: Path) -> None:
    """Claim one answer of two thousand million tokens, consistently."""
    most = 2**31 - 1

    def change(columns: dict[str, np.ndarray], entries: list[Body]) -> None:
        columns["counts"] = columns["counts"].copy()
        columns["spans"] = columns["spans"].copy()
        columns["counts"][0] = [most, 1, most - 1, -1]
        columns["spans"] = np.concatenate(
            [np.array([[1, most]], dtype=np.int32), columns["spans"][entries[0]["turns"] :]]
        )
        entries[0]["turns"] = 1

    forge_index(root, change)


SHAPES: dict[str, Attack] = {
    **{f"hidden_size {value}": in_index("layout.hidden_size", value) for value in HUGE},
    **{f"topk {value}": in_index("layout.topk", value) for value in HUGE},
    **{f"samples {value}": in_index("samples", value) for value in HUGE},
    **{f"turns {value}": in_index("turns", value) for value in HUGE},
    **{f"record hidden_size {value}": in_document("commits/*", "layout.hidden_size", value) for value in HUGE},
    **{f"head vocab_size {value}": in_document("CACHE.json", "teacher_head.vocab_size", value) for value in HUGE},
    **{
        f"file of {value} bytes": in_document(
            "snapshots/*",
            "files",
            lambda files, value=value: {name: {**entry, "size_bytes": value} for name, entry in files.items()},
        )
        for value in HUGE
    },
    "many tokens": many_tokens,
    "tokens -5": in_column("counts", put(-5, row=0, column=0)),
    "turns 2^31-1": in_column("counts", put(2**31 - 1, row=0, column=1)),
    "answer tokens 2^31-1": in_column("counts", put(2**31 - 1, row=0, column=2)),
    "question rows -2": in_column("counts", put(-2, row=0, column=3)),
    "span from -1": in_column("spans", put(-1, row=0, column=0)),
    "span to 2^31-1": in_column("spans", put(2**31 - 1, row=0, column=1)),
    "ids before the start": in_column("id_offsets", lambda column: column - 50),
    "ids beyond the end": in_column("id_offsets", lambda column: column * 2**40),
    "ids backwards": in_column("id_offsets", lambda column: column[::-1]),
    "ids that are no text": in_column("id_bytes", lambda column: column | 0xF0),
    "keys of floats": in_column("keys", lambda column: column.astype(np.float64)),
    "keys backwards": in_column("keys", lambda column: column[::-1]),
    "order beyond the samples": in_column("key_order", lambda column: column + 2**31),
    "counts of floats": in_column("counts", lambda column: column.astype(np.float64)),
    "counts of bytes": in_column("counts", lambda column: column.astype(np.int8)),
    "counts in 1 axis": in_column("counts", lambda column: column.reshape(-1)),
    "counts in 3 columns": in_column("counts", lambda column: column[:, :3]),
    "spans in 1 axis": in_column("spans", lambda column: column.reshape(-1)),
    "spans of floats": in_column("spans", lambda column: column.astype(np.float32)),
    "checksums in no column": in_column("crc32c", lambda column: column[:, :0]),
    "checksums in 1 axis": in_column("crc32c", lambda column: column[:, 0]),
    "digests of 1 byte": in_column("digests", lambda column: column[:, :1]),
    "no samples": in_column("counts", lambda column: column[:0]),
    "counts that are no base64": in_document("commits/*", "samples.counts", "!!!!"),
    "counts cut in an integer": in_document("commits/*", "samples.counts", "AAA="),
    "counts of other samples": in_document("commits/*", "samples.counts", lambda text: text * 3),
    "checksums left out": in_document("commits/*", "samples.crc32c", ""),
    "digests left out": in_document("plans/*", "sample_digests", ""),
    "digests that are no base64": in_document("plans/*", "sample_digests", "\u00e9"),
}


def bomb(root: Path, *, claimed: int, block: int | None = None) -> None:
    """Let the first compressed chunk claim another length, with all checksums to match."""

    def change(data: bytes) -> bytes:
        chunks = bytearray(data)
        offset, length = struct.unpack_from("<2Q", data, len(data) - 20)
        struct.pack_into("<I", chunks, offset + 4, claimed)
        if block is not None:
            struct.pack_into("<I", chunks, offset + 8, block)
        body = bytes(chunks[offset : offset + length - 4])
        struct.pack_into("<I", chunks, offset + length - 4, crc32c(body))
        return bytes(chunks)

    forge_file(root, "shards/*/hidden_states/c.0.0", change)


def chunk_index(root: Path, *entry: int) -> None:
    """Let the index of the chunks name another place."""

    def change(data: bytes) -> bytes:
        index = struct.pack("<2Q", *entry)
        return data[:-20] + index + struct.pack("<I", crc32c(index))

    forge_file(root, "shards/*/hidden_states/c.0.0", change)


def grow(pattern: str, size: int) -> Attack:
    """Let a file end in a hole of this size; its digests stay as they are."""
    return lambda root: os.truncate(root / only(root, pattern), size)


COMPRESSED: dict[str, Attack] = {
    **{f"a chunk of {size} bytes": lambda root, size=size: bomb(root, claimed=size) for size in (2**30, 2**32 - 1, 0)},
    **{
        f"blocks of {size} bytes": lambda root, size=size: bomb(root, claimed=1024 * 16, block=size)
        for size in (2**30, 2**32 - 1, 1, 0)
    },
    **{
        f"a chunk at {entry}": lambda root, entry=entry: chunk_index(root, *entry)
        for entry in ((0, 2**40), (2**40, 100), (2**64 - 1, 2**64 - 1), (0, 0), (0, 3), (2**63, 2**63))
    },
    **{f"compressed {name}": attack for name, attack in SHAPES.items() if name.startswith(("hidden_size", "many"))},
}

NESTED = b'"identity": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b",\n"


def with_line(line: bytes) -> Callable[[bytes], bytes]:
    """Return a change that puts a line into the text of a document, after its first."""
    return lambda text: text[:2] + line + text[2:]


def without_line(key: str) -> Callable[[bytes], bytes]:
    """Return a change that takes the line of a key away."""
    start = f'"{key}":'.encode()
    return lambda text: b"".join(line for line in text.splitlines(keepends=True) if not line.startswith(start))


DOCUMENTS = ("CACHE.json", "plans/*", "commits/*", "snapshots/*")
TEXTS: dict[str, Attack] = {
    f"{name} in {pattern}": lambda root, pattern=pattern, change=change: forge_text(root, pattern, change)
    for pattern in DOCUMENTS
    for name, change in {
        "deep nesting": with_line(NESTED),
        "deep lists": with_line(b'"x": ' + b"[" * 200_000 + b"]" * 200_000 + b",\n"),
        "a number of 100,000 digits": with_line(b'"x": ' + b"9" * 100_000 + b",\n"),
        "bytes that are no text": with_line(b'"\xff\xfe": 1,\n'),
        "UTF-16": lambda text: text.decode().encode("utf-16"),
        "half a surrogate": with_line(b'"\\ud800": 1,\n'),
        "no JSON": lambda text: b"--- !!python/object/apply:os.system ['touch canary']\n",
        "a list": lambda text: b"[1,\n",
        "nothing": lambda text: b"",
    }.items()
} | {
    "another version twice": lambda root: forge_text(root, "CACHE.json", lambda text: text + b'"version": 3,\n'),
    "another attempt twice": lambda root: forge_text(
        root, "commits/*", lambda text: text + b'"attempt": "' + b"0" * 32 + b'",\n'
    ),
    "NaN in the identity": in_document("CACHE.json", "identity.teacher.dtype", float("nan")),
    "infinity in the identity": in_document("CACHE.json", "identity.teacher.dtype", float("inf")),
    "a nested identity": in_document("CACHE.json", "identity.teacher", json.loads('{"a":' * 150 + "1" + "}" * 150)),
    "NaN bytes of a tier": in_index("tier_bytes.A", float("nan")),
    "a manifest of 3 GiB": grow("CACHE.json", 3 * 2**30),
    "a manifest of 200 MB": grow("CACHE.json", 200 * 10**6),
    "a snapshot of 200 MB": grow("snapshots/*", 200 * 10**6),
    "a plan of 3 GiB": grow("plans/*", 3 * 2**30),
    "a record of 3 GiB": grow("commits/*", 3 * 2**30),
    **{
        f"{pattern} without {key}": lambda root, pattern=pattern, key=key: forge_text(root, pattern, without_line(key))
        for pattern, key in {
            "CACHE.json": "plan",
            "plans/*": "previous",
            "commits/*": "attempt",
            "snapshots/*": "index",
        }.items()
    },
}

_TENSOR = '{"weight":{"dtype":"%s","shape":%s,"data_offsets":%s}}'
_HEADERS: dict[str, bytes] = {
    "no header": b"",
    "a cut header": struct.pack("<Q", 5000) + b"{",
    "a header of 2^63 bytes": safetensors_file(b"{}", claimed=2**63),
    "a header of 200 MB": safetensors_file(b"{}", claimed=200 * 10**6),
    "a header that is no JSON": safetensors_file(b"\x80\x04pickle"),
    "a deep header": safetensors_file(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "data before the start": safetensors_file((_TENSOR % ("F32", "[1]", "[-4,0]")).encode()),
    "data beyond the end": safetensors_file((_TENSOR % ("F32", "[1000000]", "[0,4000000]")).encode(), data=b"\0" * 8),
    "an overflowing shape": safetensors_file(
        (_TENSOR % ("F32", "[4294967296,4294967296]", "[0,0]")).encode(), data=b"\0" * 8
    ),
    "a shape of 10^13": safetensors_file((_TENSOR % ("BF16", "[10000000000000]", "[0,8]")).encode(), data=b"\0" * 8),
    "an unknown type": safetensors_file((_TENSOR % ("OBJECT", "[1]", "[0,8]")).encode(), data=b"\0" * 8),
    "a hole": safetensors_file((_TENSOR % ("F32", "[1]", "[4,8]")).encode(), data=b"\0" * 8),
    "a negative shape": safetensors_file((_TENSOR % ("F32", "[-1]", "[0,4]")).encode(), data=b"\0" * 4),
}
HEADERS: dict[str, Attack] = {
    f"{name} in {pattern}": lambda root, pattern=pattern, data=data: forge_file(root, pattern, lambda _: data)
    for pattern in ("index/*", "teacher_head*")
    for name, data in _HEADERS.items()
}
