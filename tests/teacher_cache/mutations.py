"""Changes of what a cache holds that keep its structure: one value, one key, one number of a table at a time."""

import base64
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.teacher_cache.forge import Body, forge, forge_index

DOCUMENTS = ("CACHE.json", "plans/*", "commits/*", "snapshots/*")
COLUMNS = ("id_bytes", "id_offsets", "digests", "counts", "spans", "crc32c", "keys", "key_order")
KINDS = ("document", "document", "document", "table", "entries", "column", "column", "column")
DTYPES = ("<i4", "<u4", "<i8", "<u8", "<f4", "<f8", "u1", "i1", "<i2", "?")

_NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    10**9,
    10**13,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
)
_FLOATS = (0.0, -0.0, 8.0, 0.5, 1e308, float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    "",
    ".",
    "..",
    "../outside/canary",
    "/etc/passwd",
    "\0",
    "0",
    "00000",
    "CACHE.json",
    "A",
    "Q",
    "fp8",
    "zstd",
    "a" * 5000,
)
_PLAIN = st.sampled_from((*_NUMBERS, *_FLOATS, *_TEXTS, None, True, False))
VALUES = st.one_of(
    _PLAIN,
    st.integers(),
    st.text(max_size=8),
    st.lists(_PLAIN, max_size=3),
    st.dictionaries(st.text(max_size=3), _PLAIN, max_size=2),
)
"""What may stand where something else stood."""

Mutation = Callable[[Path], None]


@st.composite
def mutations(draw: st.DrawFn) -> Mutation:
    """Draw a change of one document, of one column of the index, or of the index's entries of shards."""
    kind = draw(st.sampled_from(KINDS))
    if kind == "document":
        return _of_document(draw(st.sampled_from(DOCUMENTS)), _edits(draw))
    if kind == "table":
        return _of_table(draw(st.sampled_from(("counts", "spans", "crc32c"))), _numbers(draw), draw(_RESIZES))
    if kind == "entries":
        edits = _edits(draw)
        return lambda root: forge_index(root, lambda _, entries: [edit(entries) for edit in edits])
    column, numbers, resize = draw(st.sampled_from(COLUMNS)), _numbers(draw), draw(_RESIZES)
    dtype = draw(st.sampled_from((*[None] * 10, *DTYPES)))
    return lambda root: forge_index(
        root, lambda columns, _: columns.update({column: _changed(columns[column], numbers, resize, dtype=dtype)})
    )


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to each value within a JSON value, parents first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from leaves(item, (*path, key))


_RESIZES = st.sampled_from((None, None, None, None, None, None, "drop", "double", "empty", "flat", "transpose"))
_Edit = Callable[[Any], None]


def _edits(draw: st.DrawFn) -> list[_Edit]:
    return [_edit(draw) for _ in range(draw(st.integers(1, 3)))]


def _edit(draw: st.DrawFn) -> _Edit:
    """Draw a change of the value at one place of a JSON value, whatever that value is."""
    place = draw(st.integers(0, 500))
    action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "swap", "repeat", "text")))
    value = draw(VALUES)
    other = draw(st.integers(0, 500))

    def edit(body: Any) -> None:
        paths = list(leaves(body))
        if not paths:
            return
        parent, key = _at(body, paths[place % len(paths)])
        if action == "replace":
            parent[key] = value
        elif action == "remove":
            del parent[key]
        elif action == "add" and isinstance(parent, dict):
            parent[str(value)[:50]] = value
        elif action == "repeat" and isinstance(parent, list):
            parent += copy.deepcopy(parent)
        elif action == "swap":
            parent[key] = copy.deepcopy(_value(body, paths[other % len(paths)]))
        elif action == "text" and isinstance(parent[key], str):
            text = parent[key]
            at = other % (len(text) + 1)
            parent[key] = text[:at] + str(value)[:20] + text[at + 1 :]

    return edit


def _at(body: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    for key in path[:-1]:
        body = body[key]
    return body, path[-1]


def _value(body: Any, path: tuple[Any, ...]) -> Any:
    parent, key = _at(body, path)
    return parent[key]


def _of_document(pattern: str, edits: list[_Edit]) -> Mutation:
    def change(body: Body) -> None:
        for edit in edits:
            edit(body)

    return lambda root: forge(root, pattern, change)


def _of_table(name: str, numbers: list[tuple[int, int]], resize: str | None) -> Mutation:
    """Change numbers of a record's table of samples."""

    def change(body: Body) -> None:
        table = np.frombuffer(base64.b64decode(body["samples"][name]), dtype="<i4")
        changed = _changed(table, numbers, resize, dtype=None)
        body["samples"][name] = base64.b64encode(changed.tobytes()).decode()

    return lambda root: forge(root, "commits/*", change)


def _numbers(draw: st.DrawFn) -> list[tuple[int, int]]:
    return draw(st.lists(st.tuples(st.integers(0, 500), st.sampled_from(_NUMBERS)), max_size=3))


def _changed(
    column: np.ndarray, numbers: list[tuple[int, int]], resize: str | None, *, dtype: str | None
) -> np.ndarray:
    changed = np.ascontiguousarray(column).copy()
    flat = changed.reshape(-1)
    bits = 8 * flat.itemsize
    for place, number in numbers if flat.size else ():
        flat[place % flat.size] = np.array(number % 2**bits, dtype=np.uint64).astype(flat.dtype)
    if resize == "drop":
        changed = changed[:-1]
    elif resize == "double":
        changed = np.concatenate([changed, changed])
    elif resize == "empty":
        changed = changed[:0]
    elif resize == "flat":
        changed = flat
    elif resize == "transpose":
        changed = changed.T
    return changed if dtype is None else changed.astype(dtype)
