"""Which samples a build computes twice, and that a signal ends their reading at once."""

import itertools
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from teacher_cache import build_job
from teacher_cache.build_job import BuildJob, StopRequest
from teacher_cache.build_plan import plan_shards
from teacher_cache.config import BuildConfig, CacheConfig, DataConfig, TeacherConfig
from teacher_cache.errors import CacheIncomplete
from teacher_cache.plan import PlannedShard
from teacher_cache.sample_file import SampleEntry, SampleFile, scan_samples
from teacher_cache.schema import Sample
from teacher_cache.spot_check import is_spot_checked
from teacher_cache.spot_check_job import _ReferenceWork
from tests.teacher_cache.test_samples import png, row

SAMPLES = 600
PER_SHARD = 10


class CountingFile(SampleFile):
    """Counts what is read; a signal comes with a chosen sample."""

    def __init__(self, config: DataConfig, *, stop: StopRequest, stop_at: int | None) -> None:
        super().__init__(config)
        self.stop, self.stop_at, self.num_read = stop, stop_at, 0

    def read(self, entries: Sequence[SampleEntry]) -> list[Sample]:
        self.num_read += len(entries)
        if self.num_read == self.stop_at:
            self.stop.signal = signal.SIGTERM
        return super().read(entries)


@contextmanager
def make_job(folder: Path, *, every: int, stop: StopRequest, stop_at: int | None = None) -> Iterator[BuildJob]:
    (folder / "g.png").write_bytes(png())
    rows = [row(f"s{number}", answer=f"answer {number}", images=["g.png"]) for number in range(SAMPLES)]
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    data = DataConfig(path=str(folder / "data.jsonl"))
    entries = scan_samples(data).samples
    shards = plan_shards(entries, samples_per_shard=PER_SHARD)
    config = CacheConfig(
        uri=str(folder / "cache"),
        teacher=TeacherConfig(model="teacher"),
        data=data,
        build=BuildConfig(engine="vllm", spot_check_every=every),
    )
    writer: Any = SimpleNamespace(missing_shards=lambda: shards)
    samples = {entry.sample_id: entry for entry in entries}
    with CountingFile(data, stop=stop, stop_at=stop_at) as file:
        yield BuildJob(config=config, writer=writer, samples=samples, file=file, skipped=[], log_dir=folder)


def num_read(job: BuildJob) -> int:
    assert isinstance(job.file, CountingFile)
    return job.file.num_read


@pytest.fixture
def stop() -> StopRequest:
    return StopRequest()


@pytest.mark.parametrize("every", [0, 7])
def test_one_in_so_many_is_chosen_and_nothing_is_read_for_it(tmp_path: Path, stop: StopRequest, every: int) -> None:
    with make_job(tmp_path, every=every, stop=stop) as job:
        chosen = job.spot_checked(job.missing_shards(), stop=stop)
        assert chosen == [entry for entry in job.samples.values() if is_spot_checked(entry.digest, every=every)]
        assert bool(chosen) == (every > 0)
        assert num_read(job) == 0


def test_no_more_than_the_most_are_chosen_evenly_over_the_missing_shards(
    tmp_path: Path, stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_job, "MOST_CHECKED", 20)
    with make_job(tmp_path, every=1, stop=stop) as job:
        missing = job.missing_shards()[:40]  # twenty others are there
        chosen = {entry.sample_id for entry in job.spot_checked(missing, stop=stop)}
    assert len(chosen) == 20
    holding = [number for number, shard in enumerate(missing) if not chosen.isdisjoint(shard.sample_ids)]
    assert len(holding) == 20
    assert {after - before for before, after in itertools.pairwise(holding)} == {2}


def test_a_signal_ends_the_choice(tmp_path: Path, stop: StopRequest) -> None:
    class Shards(list[PlannedShard]):
        def __iter__(self) -> Iterator[PlannedShard]:
            for number, shard in enumerate(list.__iter__(self)):
                assert number < 4
                if number == 3:
                    stop.signal = signal.SIGINT
                yield shard

    with (
        make_job(tmp_path, every=1, stop=stop) as job,
        pytest.raises(CacheIncomplete, match="stopped by SIGINT"),
    ):
        job.spot_checked(Shards(job.missing_shards()), stop=stop)


def test_a_signal_ends_the_reading_of_a_batch(tmp_path: Path, stop: StopRequest) -> None:
    given: list[list[Sample]] = []
    actor: Any = SimpleNamespace(
        compute=SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda samples: given.append(samples)))
    )
    with make_job(tmp_path, every=1, stop=stop, stop_at=5) as job:
        work = _ReferenceWork(job, placement=SimpleNamespace(), stop=stop)  # type: ignore[arg-type]
        pieces = list(job.samples.values())
        work.begin(actor, pieces[:3])
        with pytest.raises(CacheIncomplete, match=r"stopped by SIGTERM with 60 shard\(s\)"):
            work.begin(actor, pieces[3:16])
        assert num_read(job) == 5, "what was read before the signal, and no sample more"
    assert [sample.sample_id for sample in given[0]] == ["s0", "s1", "s2"]
    assert len(given) == 1
