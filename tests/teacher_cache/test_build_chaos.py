"""R20, R26: workers and drivers that are killed, and calls that get lost, lose nothing and build nothing twice."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from teacher_cache import open_cache
from teacher_cache.build import build_cache, import_ray
from teacher_cache.config import CacheConfig
from teacher_cache.verify import verify_cache
from tests.teacher_cache.test_build import (
    BUILD_SCRIPT,
    assert_same_contents,
    commit_records,
    local_ray,
    make_config,
    wait_for_commits,
    with_data,
)

__all__ = ["local_ray"]

SAMPLES_PER_SHARD = 4
LONG = (pytest.mark.nightly, pytest.mark.timeout(7200))
FIGURE = re.compile(r"^ray_genrecal_build_(\w+)\{(.*)\} (\S+)$", re.MULTILINE)


def many_samples(config: CacheConfig, *, folder: Path, copies: int) -> CacheConfig:
    """Use so many copies of the samples, four to a shard."""
    rows = pa.parquet.read_table(config.data.path).to_pylist()
    many = [{**row, "id": f"{row['id']}-{copy}"} for copy in range(copies) for row in rows]
    pa.parquet.write_table(pa.Table.from_pylist(many), folder / "many.parquet")
    config = with_data(config, path=str(folder / "many.parquet"), image_root=str(Path(config.data.path).parent))
    return config.model_copy(update={"samples_per_shard": SAMPLES_PER_SHARD})


def check_whole(config: CacheConfig, *, samples: int) -> int:
    """Check that every shard is committed once, all samples are there, and every byte is as committed."""
    shards = samples // SAMPLES_PER_SHARD
    records = commit_records(Path(config.uri))
    assert sorted(record["shard_id"] for record in records) == [f"shard-{number:06}" for number in range(shards)]
    assert {record["revision"] for record in records} == {0}
    report = verify_cache(config.uri)
    assert (report.problems, report.missing_shards, report.samples) == ((), (), samples)
    return shards


@dataclass(kw_only=True)
class Scraper:
    """What Prometheus would see of a build: every figure, scrape by scrape, summed over the processes that tell it."""

    address: str
    cache: str
    scrapes: list[dict[str, float]] = field(default_factory=list)

    def scrape(self) -> dict[str, float]:
        """Read the endpoint once."""
        with urllib.request.urlopen(self.address, timeout=30) as answer:
            text = answer.read().decode()
        figures: dict[str, float] = {}
        for name, labels, value in FIGURE.findall(text):
            if f'cache="{self.cache}"' in labels and not name.endswith("_bucket"):
                figures[name] = figures.get(name, 0.0) + float(value)
        if figures:
            self.scrapes.append(figures)
        return figures

    def watch(self, done: threading.Event) -> None:
        """Scrape every two seconds until the build is done."""
        while not done.wait(2.0):
            with suppress(OSError, HTTPException):  # a busy machine answers too late
                self.scrape()


def metrics_address() -> str:
    (node,) = import_ray().nodes()
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


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


def check_figures(scraper: Scraper, *, samples: int, shards: int, kills: int) -> None:
    """Wait until Ray has exported the last figures, and check them and those of the running build."""
    while_running = len(scraper.scrapes)
    deadline = time.monotonic() + 300
    last: dict[str, float] = {}
    # an export may have the last shard's time and not yet what else it changed
    while (last.get("shard_seconds_count"), last.get("missing_shards")) != (shards, 0) or last[
        "samples_total"
    ] < samples:
        assert time.monotonic() < deadline, last
        time.sleep(0.5)
        with suppress(OSError, HTTPException):
            last = scraper.scrape()
    assert last["tokens_total"] > last["samples_total"]
    assert last["failed_attempts_total"] >= kills
    assert "skipped_samples_total" not in last, "no sample is bad"
    counted = [scrape.get("samples_total", 0) for scrape in scraper.scrapes]
    assert counted == sorted(counted)
    running = [scrape for scrape in scraper.scrapes[:while_running] if scrape.get("running_replicas")]
    assert any(0 < scrape["missing_shards"] <= shards for scrape in running)
    assert max(scrape["running_replicas"] for scrape in running) <= 2
    print(f"metrics: {while_running} scrapes of a running build, {last['failed_attempts_total']:.0f} failed attempts")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=LONG)])
def test_killed_workers_lose_nothing(
    kills: int, local_ray: None, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    copies = 4 + kills
    samples = 28 * copies
    config = make_config(
        tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples, num_replicas=2, max_attempts=kills + 2
    )
    config = many_samples(config, folder=tmp_path, copies=copies)
    done, killed = threading.Event(), set[int]()
    scraper = Scraper(address=metrics_address(), cache=config.uri)
    threads = [
        threading.Thread(
            target=kill_workers, args=(Path(config.uri),), kwargs={"kills": kills, "done": done, "killed": killed}
        ),
        threading.Thread(target=scraper.watch, args=(done,)),
    ]
    for thread in threads:
        thread.start()
    try:
        summary = build_cache(config)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert len(killed) == kills, "the build was over before all were killed: give it more shards"
    shards = check_whole(config, samples=samples)
    assert (summary.shards, summary.shards_built, summary.samples) == (shards, shards, samples)
    check_figures(scraper, samples=samples, shards=shards, kills=kills)
    quiet = config.model_copy(update={"uri": str(tmp_path / "quiet")})
    build_cache(quiet)
    assert_same_contents(open_cache(config.uri), open_cache(quiet.uri))
    print(f"R20: {kills} workers killed over {shards} shards: 0 lost, 0 built twice, same content as an unharmed build")


LOGGING_SCRIPT = f"import logging\nlogging.basicConfig(level=logging.INFO)\n{BUILD_SCRIPT}"
PUSH_TASK = "CoreWorkerService.grpc_client.PushTask"
REPORT_ITEM = "CoreWorkerService.grpc_client.ReportGeneratorItemReturns"
LEASE = "NodeManagerService.grpc_client.RequestWorkerLease"
CREATE_ACTOR = "ray::rpc::ActorInfoGcsService.grpc_client.CreateActor"


def faults(*methods: str, at_most: int) -> str:
    """Requests that never arrive, answers that never arrive, and both at once: one call each, then a fifth each."""
    kinds = ("req", "resp", "in_flight")
    certain = {f"num_lower_bound_{kind}_failures": 1 for kind in kinds}
    likely = {f"{kind}_failure_prob": 20 for kind in kinds}
    return json.dumps({method: {"num_failures": at_most, **certain, **likely} for method in methods})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("copies", "at_most", "methods"),
    [
        (1, 3, (PUSH_TASK,)),
        pytest.param(6, -1, (PUSH_TASK,), marks=LONG),
        pytest.param(6, -1, (REPORT_ITEM, LEASE, CREATE_ACTOR), marks=LONG),
    ],
    ids=["few", "tasks", "others"],
)
def test_lost_calls_lose_nothing(
    copies: int, at_most: int, methods: tuple[str, ...], tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples, num_replicas=2, max_attempts=50)
    config = many_samples(config, folder=tmp_path, copies=copies)
    done = subprocess.run(
        [sys.executable, "-c", LOGGING_SCRIPT, config.model_dump_json()],
        env=os.environ | {"RAY_testing_rpc_failure": faults(*methods, at_most=at_most)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = len(re.findall(r"attempt \d+ of 50 failed|a replica died before it had work", done.stderr))
    assert seen > 0 or PUSH_TASK not in methods
    shards = check_whole(config, samples=28 * copies)
    print(
        f"R20: {shards} shards under lost calls ({', '.join(methods)}): {seen} attempts failed, 0 lost, 0 built twice"
    )


@contextmanager
def marked_build(config: CacheConfig) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """Start a build whose processes, Ray's own among them, can be told by a mark in their environment."""
    mark = uuid.uuid4().hex
    environment = os.environ | {"GENRECAL_TEST_MARK": mark}
    job = subprocess.Popen([sys.executable, "-c", BUILD_SCRIPT, config.model_dump_json()], env=environment)
    try:
        yield job, mark
    finally:
        for pid in marked_processes(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.wait()


def marked_processes(mark: str) -> list[int]:
    """The living processes with this mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def wait_for_none(mark: str, *, timeout_s: float) -> float:
    """Wait until no process has the mark; return how long that took."""
    start = time.monotonic()
    while marked_processes(mark):
        assert time.monotonic() - start < timeout_s, "processes of a dead driver go on"
        time.sleep(0.2)
    return time.monotonic() - start


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_killed_drivers_lose_nothing_and_leave_no_process(
    local_ray: None, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples, num_replicas=2)
    config = many_samples(config, folder=tmp_path, copies=20)
    uri, chooser, kept = Path(config.uri), random.Random(0), dict[str, str]()
    gone: list[float] = []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        with marked_build(config) as (job, mark):
            wait_for_commits(uri, count=len(kept) + 4)
            time.sleep(chooser.random())
            job.send_signal(number)
            assert job.wait() == (3 if number == signal.SIGTERM else -signal.SIGKILL)
            gone.append(wait_for_none(mark, timeout_s=120))
        attempts = {record["shard_id"]: record["attempt"] for record in commit_records(uri)}
        assert kept.items() <= attempts.items(), "what was committed stays, and is not built again"
        assert verify_cache(config.uri).problems == ()
        kept = attempts
    left = 28 * 20 // SAMPLES_PER_SHARD - len(kept)
    assert left > 0, "the build was over before all drivers were killed: give it more shards"
    assert build_cache(config).shards_built == left
    shards = check_whole(config, samples=28 * 20)
    quiet = config.model_copy(update={"uri": str(tmp_path / "quiet")})
    build_cache(quiet)
    assert_same_contents(open_cache(config.uri), open_cache(quiet.uri))
    print(
        f"R26: 2 drivers killed and 2 ended by SIGTERM (exit 3) over {shards} shards: 0 lost, 0 built twice, all "
        f"processes gone within {max(gone):.0f} s"
    )
