"""Extensions of the plan: as many generations as their samples take, each of them short enough to be read again."""

from pathlib import Path

import pytest

from teacher_cache import open_cache, plan
from teacher_cache.errors import CacheCorrupt, ConfigError
from teacher_cache.gc import collect_garbage
from teacher_cache.local_store import LocalStore
from teacher_cache.verify import verify_cache
from tests.teacher_cache.store import assert_same, build, make_samples, open_builder

SAMPLES = make_samples(14)
LIMIT = 500


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of two samples, where a generation that extends it has room for some."""
    build(tmp_path / "cache", SAMPLES[:2])
    monkeypatch.setattr(plan, "GENERATION_LIMIT_BYTES", LIMIT)
    return tmp_path / "cache"


def generations(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "plans").iterdir())[1:]}


def extend(root: Path) -> dict[str, bytes]:
    build(root, SAMPLES, extend=True)
    cache = open_cache(str(root))
    assert cache.sample_ids == tuple(sample.sample_id for sample in SAMPLES)
    for found, sample in zip(cache.read(cache.sample_ids), SAMPLES, strict=True):
        assert_same(found, sample)
    collect_garbage(str(root))
    assert verify_cache(str(root)).ok
    return generations(root)


def test_an_extension_takes_the_generations_that_it_needs(root: Path) -> None:
    made = extend(root)
    assert list(made) == ["000001.json", "000002.json", "000003.json"]
    overhead = len('{\n"previous": "",\n"shards": ,\n"sample_digests": "",\n"sha256": ""\n}\n') + 2 * 64
    assert all(len(data) <= LIMIT + overhead for data in made.values())
    assert extend(root) == made


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_extension_that_dies_midway_is_finished_by_the_next(
    root: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = LocalStore.create

    def die(store: LocalStore, name: str, data: bytes) -> bool:
        if name == f"plans/{number:06}.json":
            raise KeyboardInterrupt
        return create(store, name, data)

    with monkeypatch.context() as broken:
        broken.setattr(LocalStore, "create", die)
        with pytest.raises(KeyboardInterrupt):
            open_builder(root, SAMPLES, extend=True)
    assert len(generations(root)) == number - 1
    assert len(open_cache(str(root))) == 2
    assert len(extend(root)) == 3


def test_a_generation_that_is_lost_is_made_again(root: Path) -> None:
    made = extend(root)
    (root / "plans" / "000001.json").unlink()
    with pytest.raises(CacheCorrupt, match=r"plans/000001\.json is missing"):
        build(root, SAMPLES[:2])
    assert extend(root) == made


def test_a_shard_that_no_generation_holds_is_refused_before_anything_is_written(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as small:
        small.setattr(plan, "GENERATION_LIMIT_BYTES", 100)
        with pytest.raises(ConfigError, match=r"shard 00001: its 2 samples take \d+ bytes .* plan smaller shards"):
            open_builder(root, SAMPLES, extend=True)
    assert generations(root) == {}
    assert len(extend(root)) == 3
