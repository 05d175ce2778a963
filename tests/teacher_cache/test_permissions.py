"""S9: who may read and write a cache, and that nothing planted in one is followed."""

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from teacher_cache import open_cache
from teacher_cache.config import Sharing
from teacher_cache.errors import CacheError
from teacher_cache.gc import collect_garbage
from teacher_cache.inspect import cache_status
from teacher_cache.storage import open_store
from teacher_cache.verify import verify_cache
from tests.reliability.processes import quick_folder, run_in_child
from tests.teacher_cache.store import assert_same, build, make_samples, open_builder

SAMPLES = make_samples(4)
NOBODY = 65534
DENIED = r"Read-only file system|Permission denied"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(root: Path) -> dict[str, set[int]]:
    """Return the permissions of all files and of all folders."""
    found: dict[str, set[int]] = {"files": set(), "folders": set()}
    for path in [root, *root.rglob("*")]:
        found["folders" if path.is_dir() else "files"].add(stat.S_IMODE(path.lstat().st_mode))
    return found


@pytest.mark.parametrize("mask", [0o022, 0o000, 0o077])
@pytest.mark.parametrize(("sharing", "file", "folder"), [("private", 0o600, 0o700), ("group", 0o640, 0o750)])
def test_a_cache_has_the_permissions_of_its_sharing(
    tmp_path: Path, mask: int, sharing: Sharing, file: int, folder: int
) -> None:
    root = tmp_path / "cache"
    with umask(mask):
        writer = build(root, SAMPLES, sharing=sharing)
        store = open_store(str(root))
        store.create("claims/00000.0.json", b"{}")
        with store.writer("shards/attempt/array/c.0") as written:
            written.write([memoryview(b"rows")])
        store.replace("claims/00000.0.json", b"{}")
    assert writer.complete()
    found = modes(root)
    assert found == {"files": {file}, "folders": {folder}}
    print(f"S9: umask {mask:03o}, {sharing}: files {file:04o}, folders {folder:04o}")


@pytest.mark.parametrize(
    "name", [".", "commits", "shards", "snapshots", "CACHE.json", "plans/*", "index/*", "commits/*"]
)
def test_what_every_user_may_write_is_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "cache"
    build(root, SAMPLES)
    (path, *_) = sorted(root.glob(name)) if name != "." else [root]
    path.chmod(path.stat().st_mode | stat.S_IWOTH)
    uses: tuple[Callable[[str], object], ...] = (
        verify_cache,
        lambda uri: open_cache(uri).read([SAMPLES[0].sample_id]),
        lambda uri: open_cache(uri, allow_incomplete=True),
        lambda uri: build(Path(uri), SAMPLES),
    )
    refusals = []
    for use in uses:
        try:
            found = use(str(root))
            assert found is not None
        except CacheError as error:
            refusals.append(str(error))
    messages = [*refusals, *(() if refusals else [problem.message for problem in verify_cache(str(root)).problems])]
    assert messages
    assert all("may be written by every user" in message and "chmod o-w" in message for message in messages)
    assert str(path) in messages[0]
    path.chmod(path.stat().st_mode & ~stat.S_IWOTH)
    assert verify_cache(str(root)).ok
    print(f"S9: {name} that every user may write: refused")


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    planted = ("CACHE.json", "commits/00000.0.json", "snapshots/00000000.json", "commits", "shards", "staging")
    for number, name in enumerate(planted):
        root, outside = tmp_path / str(number) / "cache", tmp_path / str(number) / "outside"
        root.mkdir(parents=True, mode=0o700)
        outside.mkdir()
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(outside if "/" not in name and "." not in name else outside / "new")
        if name != "CACHE.json":
            plant_into_a_new_cache(root, name)
        with pytest.raises(CacheError, match=r"is a link|no regular file"):
            build(root, SAMPLES)
        assert not list(outside.iterdir()), name
        assert (root / name).is_symlink(), name
    print(f"S9: {len(planted)} planted links refused, nothing written through them")


def plant_into_a_new_cache(root: Path, name: str) -> None:
    """Create a cache as it is before its first shard, and put the link there afterwards."""
    target = os.readlink(root / name)
    shutil.rmtree(root)
    open_builder(root, SAMPLES)
    (root / name).parent.mkdir(exist_ok=True, mode=0o700)
    if (root / name).is_dir():
        shutil.rmtree(root / name)
    (root / name).symlink_to(target)


def test_a_new_file_takes_no_name_that_is_taken(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "cache"), create=True)
    outside = tmp_path / "outside"
    store.create("shards/there/file", b"old")
    (tmp_path / "cache" / "shards" / "there" / "link").symlink_to(outside)
    for name in ("shards/there/file", "shards/there/link"):
        with pytest.raises(FileExistsError):
            store.writer(name)
    assert store.read("shards/there/file") == b"old"
    assert not outside.exists()


@contextmanager
def read_only(root: Path) -> Iterator[Callable[[], None]]:
    """Make a folder read-only for everybody where that can be mounted, else for another user, whom the call becomes."""
    try:
        subprocess.run(["mount", "--bind", root, root], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        for path in [root, *root.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        root.parent.chmod(0o755)
        yield (lambda: os.setuid(NOBODY)) if os.getuid() == 0 else (lambda: None)
        return
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", root], check=True, capture_output=True)
        yield lambda: None
    finally:
        subprocess.run(["umount", "--lazy", root], check=True, capture_output=True)


def test_a_read_only_cache_is_read_and_verified(tmp_path: Path) -> None:
    with quick_folder() as folder:
        root = folder / "cache"
        build(root, SAMPLES)
        expected = {sample.sample_id: sample for sample in SAMPLES}

        def act(tell: Callable[..., None]) -> None:
            become()
            with pytest.raises(OSError, match=DENIED):
                (root / "new").write_bytes(b"x")
            cache = open_cache(str(root))
            for found in cache.read(cache.sample_ids):
                assert_same(found, expected[found.sample_id])
            assert cache.teacher_head().weight.shape == (50, 8)
            assert verify_cache(str(root)).ok
            assert cache_status(str(root)).complete
            tell("read")
            assert not collect_garbage(str(root)).removed
            with pytest.raises(CacheError, match=DENIED):
                open_builder(root, make_samples(6), extend=True)
            tell("refused")

        with read_only(root) as become:
            status, told = run_in_child(act)
    assert (status, told) == (0, ["read", "refused"])
    print("S9: a read-only cache is opened, read and verified; whoever changes it gets a clear error")
