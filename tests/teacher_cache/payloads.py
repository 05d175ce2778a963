"""Caches that bring code: pickles in the place of files, and names of types and codecs that would run some."""

import os
import pickle
from pathlib import Path

import numpy as np

from tests.teacher_cache.assault import Attack
from tests.teacher_cache.attacks import in_document, in_index
from tests.teacher_cache.forge import forge_file


class Payload:
    """Leaves a mark beside the cache when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self._mark}",)


def pickled(pattern: str) -> Attack:
    """Put a pickle in the place of a file."""
    return lambda root: forge_file(root, pattern, lambda _: pickle.dumps(Payload(root.parent / "outside" / "canary")))


def numpy_pickled(pattern: str) -> Attack:
    """Put an array of objects in the place of a file."""

    def attack(root: Path) -> None:
        path = root.parent / "payload.npy"
        np.save(path, np.array([Payload(root.parent / "outside" / "canary")], dtype=object), allow_pickle=True)
        forge_file(root, pattern, lambda _: path.read_bytes())

    return attack


def torch_pickled(pattern: str) -> Attack:
    """Put a checkpoint of torch in the place of a file."""

    def attack(root: Path) -> None:
        import torch

        path = root.parent / "payload.pt"
        torch.save({"weight": Payload(root.parent / "outside" / "canary")}, path)
        forge_file(root, pattern, lambda _: path.read_bytes())

    return attack


_STORED = (
    "index/*",
    "teacher_head*",
    "shards/*/hidden_states/c.0.0",
    "shards/*/zarr.json",
    "shards/*/token_ids/zarr.json",
)
CODE: dict[str, Attack] = {
    **{f"a pickle as {pattern}": pickled(pattern) for pattern in _STORED},
    **{f"an array of objects as {pattern}": numpy_pickled(pattern) for pattern in _STORED},
    **{f"a checkpoint as {pattern}": torch_pickled(pattern) for pattern in _STORED},
    **{
        f"dtype {value!r}": in_index("layout.dtype", value) for value in ("object", "|O", "float64", "O8", "datetime64")
    },
    **{
        f"codec {value!r}": in_index("layout.codec", value)
        for value in ("pickle", "vlen-utf8", "int8", "os.system", "")
    },
    **{f"compression {value!r}": in_index("layout.compression", value) for value in ("gzip", "pickle", "lz4", None, 1)},
    **{f"record dtype {value!r}": in_document("commits/*", "layout.dtype", value) for value in ("object", "|O")},
    **{f"manifest codec {value!r}": in_document("CACHE.json", "codec", value) for value in ("pickle", "eval")},
    "an unknown tier": in_index("tiers", ["A", "Q", "L", "pickle"]),
    "an unknown key": in_index("filters", [{"id": "pickle"}]),
    "an unknown key in a record": in_document("commits/*", "filters", [{"id": "pickle"}]),
}
