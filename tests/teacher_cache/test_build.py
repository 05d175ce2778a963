"""The Ray job that fills a cache: who built it, what survives a kill, what is skipped, what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from teacher_cache import open_cache
from teacher_cache.build import build_cache, import_ray, start_ray
from teacher_cache.build_job import METRICS_FILE
from teacher_cache.build_plan import keeps_question_rows, open_builder, plan_shards
from teacher_cache.config import BuildConfig, CacheConfig, DataConfig, TargetsConfig, TeacherConfig
from teacher_cache.errors import CacheMismatch, ConfigError, DataError, TeacherError
from teacher_cache.reader import TeacherCache
from teacher_cache.repair import withdraw_shards
from teacher_cache.samples import read_samples
from teacher_cache.shard_worker import ShardReport, ShardWorker
from teacher_cache.spot_check import TOLERANCE, is_spot_checked
from teacher_cache.teacher import TransformersTeacher, compute_targets
from teacher_cache.verify import verify_cache
from tests.teacher_cache.conversations import MAX_LENGTH, encode_digits
from tests.teacher_cache.test_vllm_teacher import FLOAT32_TOLERANCE, largest_difference

SAMPLES_PER_SHARD = 2
TARGETS = TargetsConfig(topk=8, question_fraction=0.5)


def make_config(uri: Path, *, model: Path, data: Path, **build: Any) -> CacheConfig:
    settings: dict[str, Any] = {"engine": "transformers", "kv_cache_gib": 0.0625, "cpus_per_replica": 0.5} | build
    return CacheConfig(
        uri=str(uri),
        teacher=TeacherConfig(model=str(model), dtype="float32"),
        data=DataConfig(path=str(data), max_length=MAX_LENGTH),
        targets=TARGETS,
        samples_per_shard=SAMPLES_PER_SHARD,
        build=BuildConfig(**settings),
    )


def with_data(config: CacheConfig, **changes: Any) -> CacheConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray = import_ray()
    start_ray(ray, address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def commit_records(uri: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((uri / "commits").glob("*.json"))]


def wait_for_commits(uri: Path, *, count: int, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while len(list((uri / "commits").glob("*.json"))) < count:
        assert time.monotonic() < deadline, f"no {count} commits in {timeout_s} s"
        time.sleep(0.02)


def kill_first_worker(uri: Path, killed: list[int]) -> None:
    wait_for_commits(uri, count=1)
    killed.append(int(commit_records(uri)[0]["provenance"]["pid"]))
    with suppress(ProcessLookupError):  # the build may be over
        os.kill(killed[0], signal.SIGKILL)


@pytest.fixture(scope="module")
def vllm_cache(
    local_ray: None, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cache built by vLLM in two actors, one of which was killed on the way."""
    uri = tmp_path_factory.mktemp("build") / "cache"
    config = make_config(
        uri, model=tiny_qwen2_vl, data=digit_samples, engine="vllm", num_replicas=2, spot_check_every=4
    )
    killed: list[int] = []
    killer = threading.Thread(target=kill_first_worker, args=(uri, killed))
    killer.start()
    summary = build_cache(config)
    killer.join()
    assert summary.engine == "vllm"
    assert (summary.shards, summary.shards_built, summary.samples, summary.skipped) == (14, 14, 28, ())
    deadline = time.monotonic() + 60
    while Path(f"/proc/{killed[0]}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return uri


def test_vllm_builds_in_several_actors_and_survives_a_killed_one(
    vllm_cache: Path, tiny_qwen2_vl: Path, digit_samples: Path
) -> None:
    cache = open_cache(str(vllm_cache))
    shards = cache.provenance["shards"]
    assert {shard["engine"] for shard in shards} == {"vllm"}
    checked = [shard["spot_check"] for shard in shards]
    chosen = [
        cache.sample_digest(id_) for id_ in cache.sample_ids if is_spot_checked(cache.sample_digest(id_), every=4)
    ]
    assert sum(check["samples"] for check in checked) == len(chosen) > 0
    assert 0 < max(check["hidden_relative_l2"] for check in checked) <= TOLERANCE["float32"]
    assert len({shard["actor_id"] for shard in shards}) >= 2
    assert verify_cache(str(vllm_cache)).ok

    conversations = encode_digits(tiny_qwen2_vl, digit_samples, count=28)
    found = cache.read([conversation.sample_id for conversation in conversations])
    stored = [sample.question_hidden_states is not None for sample in found]
    assert 0 < sum(stored) < 28
    reference = TransformersTeacher(TeacherConfig(model=str(tiny_qwen2_vl), dtype="float32"))
    expected = compute_targets(reference, conversations, topk=TARGETS.topk, question_rows=stored)
    difference = max(largest_difference(left, right) for left, right in zip(found, expected, strict=True))
    print(f"cache built by vLLM: largest difference from transformers {difference:.2e}")
    assert difference <= FLOAT32_TOLERANCE
    assert [sample.token_ids.tolist() for sample in found] == [sample.token_ids.tolist() for sample in expected]


def test_a_complete_cache_is_left_alone(vllm_cache: Path, tiny_qwen2_vl: Path, digit_samples: Path) -> None:
    config = make_config(vllm_cache, model=tiny_qwen2_vl, data=digit_samples, engine="vllm")
    summary = build_cache(config)
    assert (summary.shards, summary.shards_built, summary.samples, summary.workers) == (14, 0, 28, ())
    last = (vllm_cache.parent / f"{vllm_cache.name}-logs" / METRICS_FILE).read_text().splitlines()[-1]
    assert json.loads(last)["summary"]["shards"] == 14


def test_a_cache_of_another_teacher_or_other_data_is_refused(
    tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples)
    open_builder(config, read_samples(config.data))
    other_dtype = config.teacher.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(CacheMismatch, match=r"teacher\.dtype"):
        build_cache(config.model_copy(update={"teacher": other_dtype}))
    rows = pa.parquet.read_table(digit_samples).to_pylist()
    rows[3]["messages"][-1]["content"] += " indeed"
    changed = tmp_path / "changed.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), changed)
    image_root = str(digit_samples.parent)
    with pytest.raises(CacheMismatch, match=r"1 have another text or other images:\n  \S+: stored [0-9a-f]{64}"):
        build_cache(with_data(config, path=str(changed), image_root=image_root))


def test_samples_that_are_too_long_are_listed(
    local_ray: None, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    lengths = sorted(len(c.token_ids) for c in encode_digits(tiny_qwen2_vl, digit_samples, count=28))
    max_length = lengths[-4]
    too_long = sum(length > max_length for length in lengths)
    assert too_long > 0
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples)
    config = with_data(config, max_length=max_length, max_skipped_samples=too_long)
    summary = build_cache(config)
    cache = open_cache(config.uri)
    assert [bad.reason for bad in summary.skipped] == ["too-long"] * too_long
    assert sorted(bad.sample_id for bad in cache.skipped) == sorted(bad.sample_id for bad in summary.skipped)
    assert len(cache.sample_ids) == 28 - too_long

    smaller_budget = with_data(config, max_skipped_samples=too_long - 1)
    with pytest.raises(DataError, match="too-long"):
        build_cache(smaller_budget)
    with pytest.raises(DataError, match="max_skipped_samples"):
        build_cache(smaller_budget.model_copy(update={"uri": str(tmp_path / "fresh")}))


def test_an_image_that_the_processor_refuses_costs_one_sample(tiny_qwen2_vl: Path, tmp_path: Path) -> None:
    rows = []
    for name, size in (("good", (16, 16)), ("thin", (1, 400))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        messages = [{"role": "user", "content": "<image>Which digit?"}, {"role": "assistant", "content": "seven"}]
        rows.append({"id": name, "messages": messages, "images": [f"{name}.png"]})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = with_data(make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=data), max_skipped_samples=1)
    samples = read_samples(config.data)
    worker = ShardWorker(config, writer=open_builder(config, samples), identity={}, log_file=None)
    *_, report = worker.build("shard-000000", samples.samples)
    assert isinstance(report, ShardReport)
    assert [(bad.sample_id, bad.reason) for bad in report.skipped] == [("thin", "not-encodable")]
    assert worker.writer.complete()
    assert open_cache(config.uri).sample_ids == ("good",)

    assert build_cache(config).skipped == report.skipped
    others = with_data(config, max_samples=1, max_skipped_samples=0)
    assert build_cache(others).skipped == (), "what another run's data has does not count"
    strict = with_data(config, max_skipped_samples=0)
    with pytest.raises(DataError, match=r"bad samples: shard-000000\. .* `genrecal cache repair URI --withdraw SHARD`"):
        build_cache(strict)
    withdraw_shards(config.uri, ["shard-000000"])
    worker.config = strict
    with pytest.raises(DataError, match="1 bad sample"):
        list(worker.build("shard-000000", samples.samples))
    worker.config = config
    list(worker.build("shard-000000", samples.samples))
    assert worker.writer.complete()
    assert open_cache(config.uri).sample_ids == ("good",)


@pytest.mark.slow
def test_a_teacher_that_cannot_start_is_given_up(
    local_ray: None, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_qwen2_vl.iterdir():
        (model / file.name).symlink_to(file)
    weights = load_file(tiny_qwen2_vl / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("up_proj.weight"))]
    (model / "model.safetensors").unlink()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = make_config(tmp_path / "cache", model=model, data=digit_samples, max_attempts=2)
    with pytest.raises(TeacherError, match=r"no replica starts on any node.*the last start failed with: .*up_proj"):
        build_cache(config)
    assert commit_records(tmp_path / "cache") == []


def test_more_replicas_than_the_cluster_holds_are_refused(
    local_ray: None, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples, num_replicas=9)
    with pytest.raises(ConfigError, match="9 replica"):
        build_cache(config)


def test_shards_hold_consecutive_samples(digit_samples: Path) -> None:
    samples = read_samples(DataConfig(path=str(digit_samples))).samples
    shards = plan_shards(samples, samples_per_shard=10)
    assert [len(shard.sample_ids) for shard in shards] == [10, 10, 8]
    assert [name for shard in shards for name in shard.sample_ids] == [sample.sample_id for sample in samples]


def test_question_rows_are_kept_for_a_fixed_growing_part(digit_samples: Path) -> None:
    samples = read_samples(DataConfig(path=str(digit_samples))).samples
    kept = [{s.sample_id for s in samples if keeps_question_rows(s, fraction=f)} for f in (0.0, 0.3, 0.7, 1.0)]
    assert kept[0] == set()
    assert kept[0] < kept[1] < kept[2] < kept[3]
    assert len(kept[3]) == len(samples)


BUILD_SCRIPT = """
import sys
from teacher_cache.build import build_cache
from teacher_cache.config import CacheConfig
from teacher_cache.errors import GenrecalError
try:
    build_cache(CacheConfig.model_validate_json(sys.argv[1]))
except GenrecalError as error:
    sys.exit(error.exit_code)
"""


def start_build(config: CacheConfig) -> "subprocess.Popen[bytes]":
    """Run a build in a process group of its own, with a Ray of its own."""
    return subprocess.Popen([sys.executable, "-c", BUILD_SCRIPT, config.model_dump_json()], start_new_session=True)


def assert_same_contents(left: TeacherCache, right: TeacherCache) -> None:
    assert (left.fingerprint, left.sample_ids) == (right.fingerprint, right.sample_ids)
    for a, b in zip(left.read(left.sample_ids), right.read(right.sample_ids), strict=True):
        assert a.spans == b.spans
        assert (a.question_hidden_states is None) == (b.question_hidden_states is None)
        for name in vars(a):
            if isinstance(getattr(a, name), torch.Tensor):
                assert torch.equal(getattr(a, name), getattr(b, name)), (a.sample_id, name)


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_stood(
    vllm_cache: Path, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    uri = tmp_path / "cache"
    config = make_config(uri, model=tiny_qwen2_vl, data=digit_samples, engine="vllm", num_replicas=2)
    for _ in range(3):  # a busy machine may notice the second commit when all is done
        shutil.rmtree(uri, ignore_errors=True)
        job = start_build(config)
        wait_for_commits(uri, count=2)
        os.killpg(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
        if len(commit_records(uri)) < 14:
            break
    committed = {record["shard_id"]: record["attempt"] for record in commit_records(uri)}
    assert 2 <= len(committed) < 14
    assert start_build(config).wait() == 0
    now = {record["shard_id"]: record["attempt"] for record in commit_records(uri)}
    assert {shard_id: now[shard_id] for shard_id in committed} == committed
    assert verify_cache(str(uri)).ok
    assert_same_contents(open_cache(str(uri)), open_cache(str(vllm_cache)))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_build_as_incomplete(
    number: signal.Signals, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    uri = tmp_path / "cache"
    rows = pa.parquet.read_table(digit_samples).to_pylist()
    many = tmp_path / "many.parquet"  # so that shards are missing however late the signal comes
    pa.parquet.write_table(
        pa.Table.from_pylist([{**row, "id": f"{row['id']}-{n}"} for n in range(20) for row in rows]), many
    )
    config = make_config(uri, model=tiny_qwen2_vl, data=many).model_copy(update={"samples_per_shard": 1})
    config = with_data(config, image_root=str(digit_samples.parent))
    job = start_build(config)
    wait_for_commits(uri, count=1)
    job.send_signal(number)
    assert job.wait() == 3
    report = verify_cache(str(uri))
    assert report.problems == ()
    assert 0 < len(report.missing_shards) < 28 * 20
