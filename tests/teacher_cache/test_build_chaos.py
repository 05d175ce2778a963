"""R20: workers of a build that are killed again and again lose nothing and build nothing twice."""

import os
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from teacher_cache import open_cache
from teacher_cache.build import build_cache
from teacher_cache.verify import verify_cache
from tests.teacher_cache.test_build import assert_same_contents, commit_records, local_ray, make_config, with_data

__all__ = ["local_ray"]


def kill_workers(uri: Path, *, kills: int, done: threading.Event, killed: set[int]) -> None:
    """Kill a worker that has committed a shard, then wait for another that has."""
    chooser = random.Random(0)
    while len(killed) < kills and not done.is_set():
        workers = {int(record["provenance"]["pid"]) for record in commit_records(uri)} if uri.exists() else set()
        alive = [pid for pid in sorted(workers - killed) if Path(f"/proc/{pid}").exists()]
        if alive:
            time.sleep(chooser.random() * 0.2)
            pid = chooser.choice(alive)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.nightly)])
def test_killed_workers_lose_nothing(
    kills: int, local_ray: None, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    copies = 2 + kills // 2
    rows = pa.parquet.read_table(digit_samples).to_pylist()
    many = [{**row, "id": f"{row['id']}-{copy}"} for copy in range(copies) for row in rows]
    pa.parquet.write_table(pa.Table.from_pylist(many), tmp_path / "many.parquet")
    config = make_config(
        tmp_path / "cache", model=tiny_qwen2_vl, data=tmp_path / "many.parquet", num_replicas=2, max_attempts=kills + 2
    ).model_copy(update={"samples_per_shard": 4})
    config = with_data(config, image_root=str(digit_samples.parent))
    done, killed = threading.Event(), set[int]()
    killer = threading.Thread(
        target=kill_workers, args=(Path(config.uri),), kwargs={"kills": kills, "done": done, "killed": killed}
    )
    killer.start()
    try:
        summary = build_cache(config)
    finally:
        done.set()
        killer.join()
    shards = -(-len(many) // 4)
    assert len(killed) == kills, "the build was over before all were killed: give it more shards"
    assert (summary.shards, summary.shards_built, summary.samples) == (shards, shards, len(many))
    records = commit_records(Path(config.uri))
    assert sorted(record["shard_id"] for record in records) == [f"shard-{number:06}" for number in range(shards)]
    assert {record["revision"] for record in records} == {0}
    report = verify_cache(config.uri)
    assert (report.problems, report.missing_shards, report.samples) == ((), (), len(many))
    quiet = config.model_copy(update={"uri": str(tmp_path / "quiet")})
    build_cache(quiet)
    assert_same_contents(open_cache(config.uri), open_cache(quiet.uri))
    print(f"R20: {kills} workers killed over {shards} shards: 0 lost, 0 built twice, same content as an unharmed build")
