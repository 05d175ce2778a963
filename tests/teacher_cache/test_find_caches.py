from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.gc import collect_garbage
from teacher_cache.inspect import cache_status, find_caches
from teacher_cache.local_store import LocalStore
from tests.teacher_cache.store import IDENTITY, build, commit, digest_of, make_samples, open_builder

SAMPLES = make_samples(4)
ASKED: dict[str, Any] = {
    "identity": {**IDENTITY, "codec": "exact"},
    "digests": {sample.sample_id: digest_of(sample.sample_id) for sample in SAMPLES},
}


@pytest.fixture
def names_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    read: Callable[..., bytes] = LocalStore.read

    def read_and_note(store: LocalStore, name: str, **options: Any) -> bytes:
        names.append(name)
        return read(store, name, **options)

    monkeypatch.setattr(LocalStore, "read", read_and_note)
    return names


def test_complete_caches_are_found_without_reading_a_record_or_looking_into_them(
    tmp_path: Path, names_read: list[str]
) -> None:
    build(tmp_path / "a" / "whole", SAMPLES)
    build(tmp_path / "other", SAMPLES, identity={**IDENTITY, "tap": "other"})
    (tmp_path / "a" / "whole" / "shards" / "CACHE.json").write_text("no cache")
    names_read.clear()
    found = find_caches(tmp_path, **ASKED)
    assert [(Path(cache.uri).name, cache.serves, cache.complete) for cache in found] == [
        ("whole", True, True),
        ("other", False, True),
    ]
    assert not [name for name in names_read if name.startswith("commits/")]
    assert found[0].tier_bytes == cache_status(found[0].uri).tier_bytes


def test_a_cache_is_complete_when_its_snapshot_is_of_what_is_committed(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    writer = open_builder(root, SAMPLES)
    first, second = writer.missing_shards()

    def look() -> tuple[bool, int]:
        (found,) = find_caches(tmp_path, **ASKED)
        assert found.serves
        assert found.tier_bytes == cache_status(str(root)).tier_bytes
        return found.complete, found.tier_bytes["Q"]

    assert look() == (False, 0)
    commit(writer, first, SAMPLES)
    assert not look()[0]
    commit(writer, second, SAMPLES)
    assert look()[0]
    collect_garbage(str(root), drop_question_rows=True)
    assert look() == (True, 0)
    open_builder(root, make_samples(5), extend=True)
    assert not look()[0]
