"""S1: whatever a path is spelled like and wherever it stands, nothing outside a cache is read or written."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from teacher_cache import open_cache
from teacher_cache.checked_file import checked_file
from teacher_cache.durable_files import digest_bytes
from teacher_cache.errors import CacheCorrupt, CacheError, ConfigError, SampleError
from teacher_cache.gc import collect_garbage
from teacher_cache.inspect import cache_status
from teacher_cache.repair import repair_cache
from teacher_cache.samples import parse_row
from teacher_cache.schema import TeacherTargets
from teacher_cache.storage import Store, open_store
from teacher_cache.verify import verify_cache
from tests.reliability.processes import quick_folder
from tests.teacher_cache.assault import Attack, assault
from tests.teacher_cache.paths import FILES, FOLDER_KINDS, FOLDERS, KINDS, PLACES, SPELLINGS, instead, spelled
from tests.teacher_cache.store import build, make_samples, make_targets
from tests.teacher_cache.watch import Watch

SAMPLES = {sample.sample_id: sample for sample in make_samples(2)}
READING = ("read", "full", "gc")
STORE_CALLS: dict[str, Callable[[Store, str], object]] = {
    "read": lambda store, name: store.read(name),
    "size": lambda store, name: store.size(name),
    "open": lambda store, name: store.open(name).size_bytes,
    "create": lambda store, name: store.create(name, b"new"),
    "create content": lambda store, name: store.create_content(name, b"new"),
    "replace": lambda store, name: store.replace(name, b"new"),
    "write": lambda store, name: write(store, name),
    "list": lambda store, name: list(store.list(name)),
    "folders": lambda store, name: store.folders(name),
    "map": lambda store, name: checked_file(store, name, expected=digest_bytes(b""), where="a file").__enter__(),
    "sync": lambda store, name: store.sync(name),
}
URI_CALLS: tuple[Callable[[str], object], ...] = (
    open_cache,
    cache_status,
    verify_cache,
    collect_garbage,
    repair_cache,
)


@pytest.fixture(scope="module")
def template() -> Any:
    with quick_folder() as folder:
        build(folder / "cache", list(SAMPLES.values()), per_shard=1)
        yield folder / "cache"


@pytest.fixture
def place() -> Any:
    """Return a folder that holds a canary outside the one that is used."""
    with quick_folder() as folder:
        (folder / "outside").mkdir()
        (folder / "outside" / "canary").write_bytes(b"canary")
        (folder / "inside").mkdir(mode=0o700)
        yield folder


def withstand(
    template: Path,
    attacks: Mapping[str, Attack],
    *,
    chosen: tuple[str, ...] = (),
    samples: Mapping[str, TeacherTargets] = SAMPLES,
) -> None:
    failures = {
        name: outcome
        for name, outcome in assault(template, attacks, samples=samples, chosen=chosen)
        if outcome.wrong or not outcome.noticed
    }
    assert not failures, "\n".join(f"{name}: {outcome}" for name, outcome in failures.items())


def write(store: Store, name: str) -> None:
    with store.writer(name) as file:
        file.write([memoryview(b"new")])


def rotated(count: int, *, shift: int) -> list[str]:
    """Return ``count`` of each 7 spellings, other ones for another shift."""
    return [spelling for number, spelling in enumerate(SPELLINGS) if (number + shift) % 7 < count]


@pytest.mark.parametrize(
    ("read", "used"),
    [(1, 0), pytest.param(4, 1, marks=pytest.mark.slow), pytest.param(7, 7, marks=pytest.mark.nightly)],
    ids=["few", "some", "every"],
)
def test_no_document_leads_out_of_a_cache(template: Path, read: int, used: int) -> None:
    total, fewest = 0, len(SPELLINGS)
    for shift, (name, put) in enumerate(PLACES.items()):
        for count, chosen in ((read, READING), (used, ())):
            attacks = {f"{name}: {spelling!r}": put(spelling) for spelling in rotated(count, shift=shift)}
            withstand(template, attacks, chosen=chosen)
            if chosen:
                total, fewest = total + len(attacks), min(fewest, len(attacks))
    assert fewest >= 10 * read
    print(f"S1: documents: {total} paths in {len(PLACES)} places, at least {fewest} each, 0 bytes outside")


def test_no_link_or_special_file_leads_out_of_a_cache(template: Path) -> None:
    files = {f"{kind} as {name}": instead(make, name) for kind, make in KINDS.items() for name in FILES}
    folders = {f"{kind} as {name}": instead(make, name) for kind, make in FOLDER_KINDS.items() for name in FOLDERS}
    withstand(template, files)
    withstand(template, folders)
    print(f"S1: files: {len(files)} links, pipes, sockets, devices and {len(folders)} linked folders, 0 bytes outside")


@pytest.mark.parametrize("scheme", ["", "memory://bucket/cache"], ids=["local", "object store"])
def test_a_store_takes_plain_names_alone(place: Path, scheme: str) -> None:
    store = open_store(scheme or str(place / "inside"))
    calls = 0
    with Watch(place / "inside", outside=place / "outside") as watch:
        # an object store has nothing to sync, and takes no name for its own prefix
        for method, call in list(STORE_CALLS.items())[: -1 if scheme else None]:
            for spelling in SPELLINGS:
                name = spelled(place / "inside", spelling)
                if name or (method != "list" and not scheme):
                    with pytest.raises(CacheCorrupt, match="is no name of a file in a cache"):
                        call(store, name)
                    calls += 1
    assert not watch.strange
    assert not list((place / "inside").iterdir())
    print(f"S1: names: {calls} of {calls} calls of {'an object' if scheme else 'a local'} store refused")


def test_a_store_removes_nothing_outside(place: Path) -> None:
    root = place / "inside"
    store = open_store(str(root))
    (root / "link").symlink_to(place / "outside")
    with Watch(root, outside=place / "outside") as watch:
        for spelling in [*SPELLINGS, "link/canary", "link/../../outside/canary"]:
            try:
                store.remove(spelled(root, spelling))
            except OSError:
                continue
    assert not watch.strange
    assert [path.name for path in root.iterdir()] == ["link"]
    store.remove("link")
    assert (place / "outside" / "canary").read_bytes() == b"canary"


def test_uris_that_are_no_caches_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "inside" / "work").mkdir()
    monkeypatch.chdir(place / "inside" / "work")
    # an object store would be asked over the network
    uris = [spelled(place / "inside", spelling) for spelling in SPELLINGS if not spelling.startswith("s3://")]
    for uri in [*uris, *(f"file://{uri}" for uri in uris), *(f"file://localhost/{uri}" for uri in uris)]:
        for call in URI_CALLS:
            with pytest.raises((CacheError, ConfigError)):
                call(uri)
    content = {path.relative_to(place).as_posix() for path in place.rglob("*")}
    assert content == {"inside", "inside/work", "outside", "outside/canary"}
    print(f"S1: URIs: {3 * len(uris)} x {len(URI_CALLS)} commands refused, nothing written")


def test_sample_ids_are_never_paths(place: Path) -> None:
    root = place / "inside" / "cache"
    ids = [spelled(root, spelling) for spelling in SPELLINGS]
    samples = {sample_id: make_targets(sample_id, seed=seed) for seed, sample_id in enumerate(ids)}
    with Watch(place, outside=place / "outside") as watch:
        build(root, list(samples.values()), per_shard=20)
        cache = open_cache(str(root))
        assert [found.sample_id for found in cache.read(ids)] == ids
        assert verify_cache(str(root)).ok
    assert not watch.strange
    print(f"S1: sample ids: {len(ids)} stored and read, 0 bytes outside")


def test_images_lie_within_their_folder(place: Path) -> None:
    root, outside = place / "inside", place / "outside"
    with Watch(root, outside=outside) as watch:
        for spelling in SPELLINGS:
            require_no_image(spelled(root, spelling), root=root)
    for number, make in enumerate(KINDS.values()):
        name = f"{number}.png"
        (root / name).write_bytes(b"no image")
        make(root / name, outside)
        with Watch(root, outside=outside) as of_kind:
            require_no_image(name, root=root)
        watch.strange += of_kind.strange
        shutil.rmtree(outside / "moved", ignore_errors=True)
        (outside / "moved").unlink(missing_ok=True)
    assert not watch.strange
    print(f"S1: images: {len(SPELLINGS)} paths and {len(KINDS)} kinds of files refused, 0 bytes outside")


def require_no_image(image: str, *, root: Path) -> None:
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "This."}]
    with pytest.raises(SampleError):
        parse_row({"messages": messages, "images": [image]}, place=0, image_root=root)


def test_the_watch_sees_what_is_done_outside(place: Path) -> None:
    root, canary = place / "inside", place / "outside" / "canary"
    (root / "link").symlink_to(canary)

    def seen(act: Callable[[], object]) -> bool:
        with Watch(root, outside=place / "outside") as watch:
            act()
        return bool(watch.strange)

    assert not seen(lambda: (root / "file").write_bytes(b"x"))
    assert not seen(lambda: (root / "link").is_symlink())
    assert seen(canary.read_bytes)
    assert seen((root / "link").read_bytes)
    assert seen(lambda: os.listdir(place / "outside"))
    assert seen(lambda: Path("/etc/hostname").exists() and Path("/etc/hostname").read_bytes())
    assert seen(lambda: (place / "outside" / "new").write_bytes(b"x"))
    assert seen((place / "outside" / "new").unlink)
    assert seen(lambda: os.system("true"))
