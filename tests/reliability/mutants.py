"""Wrong versions of the store, each with one mistake that a run without faults does not show."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from teacher_cache import gc, local_store, manifest
from teacher_cache.claims import Claims
from teacher_cache.ledger import COMMITS, SHARDS, CommitRecord
from teacher_cache.local_files import LocalWriter
from teacher_cache.local_store import LocalStore
from teacher_cache.plan import PLANS
from teacher_cache.shard_reader import RowRange, ShardReader
from teacher_cache.snapshot import SNAPSHOTS


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A mistake, and who must notice it."""

    name: str
    apply: Callable[[pytest.MonkeyPatch], None]
    killed_by: Sequence[str]
    """Names of harnesses."""


def _files_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalWriter, "close", LocalWriter.abort)


def _folders_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(local_store, "_sync_folder", lambda path: None)


def _skip_sync(patch: pytest.MonkeyPatch, is_skipped: Callable[[str], bool]) -> None:
    sync = LocalStore.sync
    patch.setattr(LocalStore, "sync", lambda self, folder: None if is_skipped(folder) else sync(self, folder))


def _folders_of_shards_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    _skip_sync(patch, lambda folder: folder.startswith(f"{SHARDS}/"))


def _names_by_others_are_taken_as_durable(patch: pytest.MonkeyPatch) -> None:
    _skip_sync(patch, lambda folder: folder in (PLANS, COMMITS, SNAPSHOTS))


def _create_by(patch: pytest.MonkeyPatch, give_name: Callable[[LocalStore, Path, bytes], bool]) -> None:
    def create(self: LocalStore, name: str, data: bytes) -> bool:
        target = self.root / name
        self._make_folders(target.parent)
        try:
            return give_name(self, target, data)
        except FileExistsError:
            return self.read(name) == data

    patch.setattr(LocalStore, "create", create)


def _names_are_acknowledged_before_they_are_durable(patch: pytest.MonkeyPatch) -> None:
    create, sync = LocalStore.create, local_store._sync_folder

    def create_without_sync(self: LocalStore, name: str, data: bytes) -> bool:
        folder = (self.root / name).parent
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(local_store, "_sync_folder", lambda path: None if path == folder else sync(path))
            return create(self, name, data)

    patch.setattr(LocalStore, "create", create_without_sync)


def _documents_are_written_in_place(patch: pytest.MonkeyPatch) -> None:
    def give_name(store: LocalStore, target: Path, data: bytes) -> bool:
        with LocalWriter(target, mode=0o600) as file:
            file.write([memoryview(data)])
        local_store._sync_folder(target.parent)
        return True

    _create_by(patch, give_name)


def _documents_replace_each_other(patch: pytest.MonkeyPatch) -> None:
    def give_name(store: LocalStore, target: Path, data: bytes) -> bool:
        local_store.os.replace(store._stage(target.name, data), target)
        local_store._sync_folder(target.parent)
        return True

    _create_by(patch, give_name)


class _LateWriter(LocalWriter):
    closed: list["_LateWriter"] = []  # noqa: RUF012

    def close(self) -> None:
        self.closed.append(self)


def _commits_come_before_the_data_is_synced(patch: pytest.MonkeyPatch) -> None:
    create, sync = LocalStore.create, LocalStore.sync
    folders: list[str] = []

    def create_then_sync(self: LocalStore, name: str, data: bytes) -> bool:
        won = create(self, name, data)
        if name.startswith(f"{COMMITS}/"):
            for file in _LateWriter.closed:
                LocalWriter.close(file)
            for folder in folders:
                sync(self, folder)
            _LateWriter.closed.clear()
            folders.clear()
        return won

    def writer(self: LocalStore, name: str) -> LocalWriter:
        self._make_folders((self.root / name).parent)
        return _LateWriter(self.root / name, mode=0o600)

    patch.setattr(LocalStore, "create", create_then_sync)
    patch.setattr(LocalStore, "writer", writer)
    patch.setattr(
        LocalStore,
        "sync",
        lambda self, folder: folders.append(folder) if folder.startswith(f"{SHARDS}/") else sync(self, folder),
    )


def _a_taken_name_is_ours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalStore, "_holds", lambda self, name, data: True)


def _a_taken_name_is_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalStore, "_holds", lambda self, name, data: False)


def _rows_are_not_checked(patch: pytest.MonkeyPatch) -> None:
    read = ShardReader.read

    def read_unchecked(self: ShardReader, name: str, rows: RowRange) -> Any:
        return read(self, name, replace(rows, crc32c=None))

    patch.setattr(ShardReader, "read", read_unchecked)


def _documents_are_not_checked(patch: pytest.MonkeyPatch) -> None:
    def decode(data: bytes, *, where: str) -> bytes:
        return data.rpartition(b'"sha256": ')[0].removesuffix(b",\n") + b"}"

    patch.setattr(manifest, "decode_document", decode)


def _attempts_that_go_on_are_removed(patch: pytest.MonkeyPatch) -> None:
    superfluous = gc._superfluous

    def too_many(names: Iterable[str], *, manifest: Any, records: Sequence[CommitRecord]) -> list[str]:
        names, kept = list(names), {record.folder for record in records}
        attempts = [name for name in names if name.startswith(f"{SHARDS}/") and name not in kept]
        folders = [name for name in attempts if gc.ATTEMPT.fullmatch(name.removeprefix(f"{SHARDS}/"))]
        return [*superfluous(names, manifest=manifest, records=records), *folders]

    patch.setattr(gc, "_superfluous", too_many)


def _claims_are_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Claims, "take", lambda self, shard_id: True)


def _claims_last_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Claims, "_expired", lambda self, shard_id, number: False)


_KILLED_BY: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]] = {
    _files_are_not_synced: ("R2", "R3"),
    _folders_are_not_synced: ("R2", "R3"),
    _folders_of_shards_are_not_synced: ("R2",),
    _names_by_others_are_taken_as_durable: ("R2",),
    _names_are_acknowledged_before_they_are_durable: ("R2",),
    _commits_come_before_the_data_is_synced: ("R2", "R3"),
    _documents_are_written_in_place: ("R1", "R2", "R9"),
    _documents_replace_each_other: ("R9",),
    _a_taken_name_is_ours: ("R9",),
    _a_taken_name_is_lost: ("R1", "lost answers"),
    _rows_are_not_checked: ("R5",),
    _documents_are_not_checked: ("R5",),
    _attempts_that_go_on_are_removed: ("R9",),
    _claims_are_ignored: ("claims",),
    _claims_last_for_ever: ("claims",),
}
MUTANTS = [
    Mutant(name=apply.__name__.strip("_").replace("_", " "), apply=apply, killed_by=harnesses)
    for apply, harnesses in _KILLED_BY.items()
]
