"""Every stored file, damaged in every way that a file system offers, must be noticed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from teacher_cache import open_cache
from teacher_cache.errors import CacheCorrupt, CacheError
from teacher_cache.verify import verify_cache
from tests.teacher_cache.store import assert_same, build, flip_bit, make_samples, make_targets, open_builder

SAMPLES = make_samples(3)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("intact") / "cache"
    build(root, SAMPLES, per_shard=3)
    return root


def stored_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def read_everything(root: Path) -> None:
    """Read all that a trainer reads; what comes back without an error must be what was stored."""
    cache = open_cache(str(root))
    cache.teacher_head()
    for got, sample in zip(cache.read(cache.sample_ids), SAMPLES, strict=True):
        assert_same(got, sample)


def read_error(root: Path) -> str | None:
    try:
        read_everything(root)
    except CacheError as error:
        return str(error)
    return None


def verify_error(root: Path) -> str | None:
    try:
        problems = verify_cache(str(root)).problems
    except CacheError as error:
        return str(error)
    return " ".join(f"{problem.path} {problem.message}" for problem in problems) or None


def flip_somewhere(path: Path) -> None:
    size, generator = path.stat().st_size, np.random.default_rng(len(path.name))
    flip_bit(path, byte=int(generator.integers(size)), bit=int(generator.integers(8)))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit flip": flip_somewhere,
    "deleted": Path.unlink,
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "extended": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found(intact: Path, tmp_path: Path, damage: str) -> None:
    for path in stored_files(intact):
        relative = path.relative_to(intact)
        root = tmp_path / "cache"
        shutil.copytree(intact, root)
        DAMAGES[damage](root / relative)
        found = verify_error(root)
        assert found is not None, f"verify accepts {relative} {damage}"
        assert str(relative) in found
        refused = read_error(root)
        if refused is None:
            unread = damage in ("bit flip", "zeros") and relative.parts[2:] == ("offsets", "c", "0", "0")
            assert unread or (str(relative), damage) == ("SEAL.json", "deleted"), f"reading accepts {relative} {damage}"
        elif relative.parts[0] in ("shards", "commits"):
            assert "shard 00000" in refused
        shutil.rmtree(root)


def test_every_bit_of_a_small_data_file_counts(intact: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(intact, root)
    (stored,) = root.glob("shards/*/target_logprobs/c/0")
    original = stored.read_bytes()
    cache = open_cache(str(root))
    for byte in range(0, len(original), 61):
        flip_bit(stored, byte=byte, bit=byte % 8)
        with pytest.raises(CacheCorrupt, match=r"shard 00000, sample 'sample-\d'.*target_logprobs"):
            cache.read(cache.sample_ids)
        stored.write_bytes(original)
    read_everything(root)


def test_a_file_that_vanishes_after_opening_is_no_row_of_zeros(intact: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(intact, root)
    cache = open_cache(str(root))
    cache.read(["sample-0"])
    (stored,) = root.glob("shards/*/hidden_states/c/0/0")
    stored.unlink()
    with pytest.raises(CacheCorrupt, match=r"shard 00000, sample 'sample-1'.*hidden_states"):
        cache.read(["sample-1"])


def test_a_file_of_another_generation_is_refused(intact: Path, tmp_path: Path) -> None:
    """Same lengths, valid checksums inside, other content: only the commit record can tell."""
    root, other = tmp_path / "cache", tmp_path / "other"
    shutil.copytree(intact, root)
    changed = [
        make_targets(s.sample_id, spans=s.spans, num_tokens=len(s.token_ids), seed=99 + i, questions=i % 2 == 0)
        for i, s in enumerate(SAMPLES)
    ]
    build(other, changed, per_shard=3)
    (target,) = root.glob("shards/*/hidden_states/c/0/0")
    (source,) = other.glob("shards/*/hidden_states/c/0/0")
    assert source.stat().st_size == target.stat().st_size
    shutil.copy(source, target)
    with pytest.raises(CacheCorrupt, match=r"sample 'sample-0'.*hidden_states.*differ from what was committed"):
        read_everything(root)
    shutil.copy(other / "commits" / "00000.json", root / "commits" / "00000.json")
    with pytest.raises(CacheCorrupt, match=r"00000\.json was changed after the cache was completed"):
        open_cache(str(root))


def test_a_lost_commit_record_of_a_complete_cache_is_damage(intact: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(intact, root)
    (root / "commits" / "00000.json").unlink()
    with pytest.raises(CacheCorrupt, match="shard 00000"):
        open_cache(str(root))
    with pytest.raises(CacheCorrupt, match="00000"):
        open_builder(root, SAMPLES, per_shard=3)
    assert [problem.kind for problem in verify_cache(str(root)).problems if "00000.json" in problem.path] == ["missing"]


def test_files_that_nothing_names_are_reported_and_never_read(intact: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(intact, root)
    (shard,) = (root / "shards").iterdir()
    extra = [root / "shards" / f"00000-{'0' * 32}" / "zarr.json", shard / "loss" / "zarr.json", root / "commits" / "x"]
    for path in extra:
        path.parent.mkdir(exist_ok=True)
        path.write_text("not JSON")
    read_everything(root)
    report = verify_cache(str(root))
    assert {problem.path for problem in report.problems} == {str(path.relative_to(root)) for path in extra}
    assert {problem.kind for problem in report.problems} == {"extra"}


def test_links_in_place_of_files_are_refused(intact: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(intact, root)
    (stored,) = root.glob("shards/*/logsumexp/c/0")
    stored.rename(tmp_path / "elsewhere")
    stored.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheCorrupt, match="no regular file"):
        read_everything(root)
