"""The store on a local disk, where a cache has more than one writer."""

import os
from pathlib import Path

import pytest

from teacher_cache.local_store import LocalStore


def test_a_folder_is_removed_whose_writer_has_not_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shards" / "00000-attempt"
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_bytes(b"{}")
    rmdir, late = os.rmdir, ["c.0.0"]

    def written_to_meanwhile(path: str, *, dir_fd: int | None = None) -> None:
        if late:
            (folder / late.pop()).write_bytes(b"in vain")
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", written_to_meanwhile)
    LocalStore(tmp_path).remove("shards/00000-attempt")
    assert not late
    assert not folder.exists()


def test_a_name_that_is_taken_is_settled_whatever_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    defaults = LocalStore.read.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "limit_bytes", 10)
    assert store.create_content("index/a", b"a long index")
    assert store.create_content("index/a", b"a long index")
    assert not store.create_content("index/a", b"a long_index")
    assert not store.create_content("index/a", b"a longer index")
