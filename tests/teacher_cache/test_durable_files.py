"""Durable steps of folders: what may be passed over and what may not."""

import errno
from pathlib import Path

import pytest

from teacher_cache import durable_files
from teacher_cache.durable_files import sync_names_above


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EINVAL, errno.EROFS])
def test_folders_that_are_not_for_this_process_to_sync_are_passed_over(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _fail_at(tmp_path, code, monkeypatch)
    sync_names_above(tmp_path / "below" / "tag")
    assert seen == [tmp_path / "below", *(tmp_path / "below").parents]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_whose_names_were_not_written_is_an_error(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at(tmp_path, code, monkeypatch)
    with pytest.raises(OSError, match=str(tmp_path)):
        sync_names_above(tmp_path / "below" / "tag")


def _fail_at(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Let one folder fail to sync; return the list of those that are asked for."""
    seen: list[Path] = []

    def sync_folder(path: Path) -> None:
        seen.append(path)
        if path == folder:
            raise OSError(code, "as told", str(path))

    monkeypatch.setattr(durable_files, "sync_folder", sync_folder)
    return seen
