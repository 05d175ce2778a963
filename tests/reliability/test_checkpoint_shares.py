"""Each process makes its share of a checkpoint durable; what one has not done, or cannot do, is not committed."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from distill import checkpoint
from distill.checkpoint import RECORD, Record, committed_tags, find_checkpoint, own_share, save_checkpoint
from distill.export_checkpoint import LONE
from distill.processes import Processes
from teacher_cache import durable_files
from teacher_cache.errors import GenrecalError
from tests.reliability.processes import run_ranks

COMMON = ("events/a.json", "events/b.json")
LAYOUT = {"backend": "zero3", "world_size": 2}


def written_by(rank: int) -> list[str]:
    return [f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for kind in ("model", "optim")]


class Engine:
    """Writes what each process has, and what the first one writes for all."""

    def __init__(self, processes: Processes) -> None:
        self.rank = processes.rank

    def save(self, tag: Path) -> None:
        if self.rank == 0:
            (tag / "events").mkdir()
        for name in [*written_by(self.rank), *(COMMON if self.rank == 0 else ())]:
            (tag / name).write_text(f"{name} of {tag.name}")


def save(processes: Processes, folder: Path, *, step: int) -> None:
    engine: Any = Engine(processes)
    record = Record(step=step, identity={}, layout=LAYOUT, origin={}, state={})
    save_checkpoint(engine, folder, record=record, processes=processes, keep=2)


def test_each_process_digests_what_it_wrote_and_the_record_waits_for_all(tmp_path: Path) -> None:
    digest_file = durable_files.digest_file

    def act(processes: Processes) -> None:
        def noting(path: Path) -> durable_files.FileDigest:
            with (tmp_path / f"digested-{processes.rank}").open("a") as file:
                file.write(f"{path.relative_to(tmp_path / 'checkpoints' / 'step-00000001').as_posix()}\n")
            if processes.rank == 1:
                time.sleep(0.5)
                assert not list(tmp_path.rglob(RECORD))
            return digest_file(path)

        with mock.patch.object(durable_files, "digest_file", noting):
            save(processes, tmp_path / "checkpoints", step=1)
        assert len(committed_tags(tmp_path / "checkpoints")) == 1

    run_ranks(act, tmp_path)
    digested = [sorted((tmp_path / f"digested-{rank}").read_text().split()) for rank in range(2)]
    assert digested == [sorted([*written_by(rank), COMMON[rank]]) for rank in range(2)]
    found = find_checkpoint(tmp_path / "checkpoints", identity={}, layout=LAYOUT, processes=LONE)
    assert found is not None
    assert list(found.files) == sorted([*written_by(0), *written_by(1), *COMMON])


def _fails_in_its_share(processes: Processes) -> Any:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    return mock.patch.object(durable_files, "sync_file", full if processes.rank == 1 else durable_files.sync_file)


def _fails_in_the_record(processes: Processes) -> Any:
    def full(path: Path, _: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    return mock.patch.object(checkpoint, "write_durably", full)


@pytest.mark.parametrize(("failing", "rank"), [(_fails_in_its_share, 1), (_fails_in_the_record, 0)])
def test_one_process_that_fails_ends_all_and_the_checkpoint_does_not_count(
    failing: Callable[[Processes], Any], rank: int, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"

    def act(processes: Processes) -> None:
        save(processes, folder, step=1)
        with pytest.raises((OSError, GenrecalError)) as raised, failing(processes):
            save(processes, folder, step=2)
        (tmp_path / f"error-{processes.rank}").write_text(f"{raised.type.__name__} {raised.value}")

    run_ranks(act, tmp_path)
    errors = [(tmp_path / f"error-{other}").read_text() for other in (rank, 1 - rank)]
    assert errors[0].startswith("OSError [Errno 28]")
    assert errors[1].startswith(f"GenrecalError process {rank} could not save {folder / 'step-00000002'} (OSError")
    assert [tag.name for tag in committed_tags(folder)] == ["step-00000001"]


def test_every_file_is_of_one_process_whatever_its_name() -> None:
    names = [*written_by(0), *written_by(7), "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt", "state.pt", "a", "b"]
    for world_size in (1, 2, 3):
        shares = [
            own_share(names, Processes(rank=rank, world_size=world_size, device=LONE.device))
            for rank in range(world_size)
        ]
        assert sorted(name for share in shares for name in share) == sorted(names)
