"""The pool of a build with actors that misbehave, under a real Ray, and the spot check of a shard."""

import dataclasses
import errno
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from teacher_cache import build_pool, open_cache, shard_worker
from teacher_cache.build import import_ray, start_ray
from teacher_cache.build_job import BuildJob, StopRequest
from teacher_cache.build_metrics import BuildMetrics
from teacher_cache.build_placement import ReplicaPlacement, replica_resources
from teacher_cache.build_plan import open_builder
from teacher_cache.build_pool import LOOKS_PER_LEASE, REFUSAL_PAUSE_S, REFUSALS, ShardQueue, build_shards
from teacher_cache.claims import Claims
from teacher_cache.config import BuildConfig, CacheConfig
from teacher_cache.errors import CacheError, ConfigError, DataError, SpotCheckMismatch, TeacherError
from teacher_cache.progress import PieceProgress
from teacher_cache.repair import repair_cache
from teacher_cache.sample_file import SampleFile, scan_samples
from teacher_cache.samples import read_samples
from teacher_cache.shard_worker import ShardReport, ShardWorker
from teacher_cache.spot_check import ReferenceRows, is_spot_checked
from teacher_cache.spot_check_job import SAMPLES_PER_BATCH, compute_references
from teacher_cache.teacher import TransformersTeacher, compute_targets
from teacher_cache.verify import verify_cache
from tests.teacher_cache.conversations import encode_digits
from tests.teacher_cache.store import commit, flip_bit, make_samples
from tests.teacher_cache.store import open_builder as open_store_builder
from tests.teacher_cache.test_build import local_ray, make_config

__all__ = ["local_ray"]


class StuckActor:
    """Never gives a sign, or one sign and then none."""

    def __init__(self, signs: int) -> None:
        self.signs = signs

    def ready(self) -> None:
        pass

    def build(self, *_: Any) -> Iterator[PieceProgress]:
        for _ in range(self.signs):
            yield PieceProgress(samples=1, tokens=10)
        time.sleep(600)


class DyingActor:
    """Gives a sign, then its process ends."""

    def ready(self) -> None:
        pass

    def compute(self, *_: Any) -> Iterator[PieceProgress]:
        yield PieceProgress(samples=0, tokens=0)
        time.sleep(2)  # until the sign has been read
        os._exit(1)


class Placement(ReplicaPlacement):
    """Starts actors that misbehave at first, then the real ones."""

    def __init__(self, ray: Any, config: CacheConfig, *, first: list[tuple[Any, ...]]) -> None:
        super().__init__(ray, config)
        self.first = first
        self.started = 0

    def start(self, actor_class: type, *arguments: Any) -> Any:
        self.started += 1
        return super().start(*(self.first.pop(0) if self.first else (actor_class, *arguments)))


@contextmanager
def build_job(config: CacheConfig, *, log_dir: Path) -> Iterator[BuildJob]:
    table = scan_samples(config.data)
    with SampleFile(config.data) as file:
        yield BuildJob(
            config=config,
            writer=open_builder(config, table),
            samples={sample.sample_id: sample for sample in table.samples},
            file=file,
            skipped=[],
            log_dir=log_dir,
        )


def run_pool(config: CacheConfig, *, first: list[tuple[Any, ...]], log_dir: Path) -> tuple[BuildJob, Placement]:
    ray = import_ray()
    placement = Placement(ray, config, first=first)
    with build_job(config, log_dir=log_dir) as job, Claims(job.writer.store, lease_s=60) as claims:
        build_shards(
            job,
            job.missing_shards(),
            stop=StopRequest(),
            ray=ray,
            claims=claims,
            placement=placement,
            metrics=BuildMetrics(uri=config.uri),
            references={},
        )
    return job, placement


def test_a_builder_takes_no_shard_that_another_has_committed(tmp_path: Path) -> None:
    samples = make_samples(6)
    writer = open_store_builder(tmp_path / "cache", samples, per_shard=1)
    missing = writer.missing_shards()
    commit(writer, missing[5], samples)
    with Claims(writer.store, lease_s=60) as ours, Claims(writer.store, lease_s=60) as theirs:
        queues = [ShardQueue(missing, writer=writer, claims=claims, lease_s=60) for claims in (ours, theirs)]
        assert [queue.drop_done_elsewhere() for queue in queues] == [1, 1]
        for shard in (queues[0].take(), queues[0].take()):
            assert shard is not None
            commit(writer, shard, samples)
            ours.release(shard.shard_id)
        taken = queues[1].take()
        assert taken == missing[2], "the first two are committed, and nobody claims them any more"
        assert queues[1].drop_done_elsewhere() == 2
        assert [shard.shard_id for shard in queues[1].pieces] == ["00003", "00004"]

        commit(writer, missing[2], samples)
        queues[1].put_back(missing[2])
        assert [queues[1].take() for _ in range(3)][-1] == missing[2], "whose answer was lost: its worker reports it"


class RefusingStore:
    """A store that refuses some steps so many times."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.left: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        if self.left[name] > 0:
            self.left[name] -= 1
            raise OSError(errno.EIO, "Input/output error", name)
        return getattr(self.store, name)


@pytest.mark.parametrize("step", ["size", "create"])
def test_a_store_that_refuses_a_claim_is_asked_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(build_pool, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    writer = open_store_builder(tmp_path / "cache", make_samples(3), per_shard=1)
    missing = writer.missing_shards()
    store: Any = RefusingStore(writer.store)
    with Claims(store, lease_s=60) as claims:
        queue = ShardQueue(missing, writer=writer, claims=claims, lease_s=60)
        store.left[step] = 1
        assert (queue.take(), queue.take(), len(queue)) == (None, None, 3)
        assert store.left[step] == 0
        assert "cannot take a shard, attempt 1 of 30: shard 00000: cannot claim it" in caplog.text
        clock[0] += REFUSAL_PAUSE_S
        assert queue.take() == missing[0]

        store.left[step] = 2 * REFUSALS
        for _ in range(REFUSALS - 1):
            assert queue.take() is None
            clock[0] += REFUSAL_PAUSE_S
        with pytest.raises(CacheError, match="cannot claim it"):
            queue.take()
        store.left[step] = 0


def test_commits_that_cannot_be_listed_are_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(build_pool, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    samples = make_samples(2)
    writer = open_store_builder(tmp_path / "cache", samples, per_shard=1)
    missing = writer.missing_shards()
    store: Any = RefusingStore(writer.store)
    refused = open_store_builder(tmp_path / "cache", samples, per_shard=1)
    monkeypatch.setitem(refused.__dict__, "store", store)
    with Claims(writer.store, lease_s=60) as ours, Claims(writer.store, lease_s=60) as theirs:
        store.left["list"] = 1
        queue = ShardQueue(missing, writer=refused, claims=ours, lease_s=60)
        assert theirs.take(missing[0].shard_id)
        assert (queue.take(), queue.take()) == (missing[1], None)
        commit(writer, missing[0], samples)
        store.left["list"] = 1
        assert queue.drop_done_elsewhere() == 0
        clock[0] += 60 / LOOKS_PER_LEASE
        assert (queue.drop_done_elsewhere(), len(queue)) == (1, 0)


class MismatchActor:
    """Its engine runs; its shard fails the spot check."""

    def ready(self) -> None:
        pass

    def build(self, *_: Any) -> Iterator[PieceProgress]:
        yield PieceProgress(samples=0, tokens=0)
        raise SpotCheckMismatch("spot check of sample s: its hidden states differ")


def test_a_spot_check_that_fails_ends_the_build_at_its_first_attempt(
    local_ray: None, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples, max_attempts=3)
    first: list[tuple[Any, ...]] = [(MismatchActor,)]
    with pytest.raises(SpotCheckMismatch, match="its hidden states differ"):
        run_pool(config, first=first, log_dir=tmp_path)
    assert first == []


def test_a_builder_takes_a_shard_that_was_withdrawn(tmp_path: Path) -> None:
    samples = make_samples(2)
    writer = open_store_builder(tmp_path / "cache", samples, per_shard=1)
    missing = writer.missing_shards()
    with Claims(writer.store, lease_s=60) as claims:
        queue = ShardQueue(missing, writer=writer, claims=claims, lease_s=60)
        for shard in missing:
            commit(writer, shard, samples)
        (path,) = (tmp_path / "cache").glob("shards/00000-*/hidden_states/c.0.0")
        flip_bit(path, byte=3, bit=1)
        assert repair_cache(writer.uri).withdrawn_shards == ("00000",)
        assert queue.take() == missing[0]
        assert queue.take() is None
        assert (queue.drop_done_elsewhere(), len(queue)) == (1, 0)


@pytest.mark.slow
def test_hung_replicas_are_replaced_and_their_shards_built(
    local_ray: None, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(
        tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples, stall_timeout_s=10, max_attempts=3
    ).model_copy(update={"samples_per_shard": 14})
    job, placement = run_pool(config, first=[(StuckActor, 1), (StuckActor, 2)], log_dir=tmp_path)
    assert placement.started == 3, "two that hung, and the one that built both shards"
    # what failed goes behind the rest, so each of them took another shard
    message = r"shard (\S+) on node \w+: attempt 1 of 3 failed: its replica has given no sign for 10 s and was killed"
    assert sorted(re.findall(message, caplog.text)) == ["shard-000000", "shard-000001"]
    assert sorted(report.shard_id for report in job.reports) == ["shard-000000", "shard-000001"]
    assert job.writer.complete()
    report = verify_cache(config.uri)
    assert (report.problems, report.missing_shards, report.samples) == ((), (), 28)


def test_a_replica_that_never_starts_is_named(
    local_ray: None, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples, start_timeout_s=2, max_attempts=1)
    with pytest.raises(TeacherError, match=r"has not started its engine for 2 s and was killed.*Engine logs are in"):
        run_pool(config, first=[(StuckActor, 0), (StuckActor, 0)], log_dir=tmp_path)


@pytest.mark.slow
def test_references_are_computed_though_an_actor_is_lost(
    local_ray: None, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples)
    placement = Placement(import_ray(), config, first=[(DyingActor,)])
    with build_job(config, log_dir=tmp_path) as job:
        samples = list(job.samples.values())
        found = compute_references(samples, placement=placement, ray=import_ray(), stop=StopRequest(), job=job)
    assert len(samples) > SAMPLES_PER_BATCH
    assert found.keys() == job.samples.keys()
    assert placement.started == 2
    (expected,) = compute_targets(
        TransformersTeacher(config.teacher, num_gpus=0),
        encode_digits(tiny_qwen2_vl, digit_samples, count=1),
        topk=8,
        question_rows=[False],
    )
    reference = found[expected.sample_id]
    torch.testing.assert_close(reference.rows, ReferenceRows.of(expected).rows, rtol=1e-5, atol=1e-5)


def test_a_reference_that_fails_names_the_option_to_build_without(
    local_ray: None, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples, max_attempts=1)
    placement = Placement(import_ray(), config, first=[(DyingActor,)])
    with build_job(config, log_dir=tmp_path) as job:
        samples = list(job.samples.values())[:2]
        with pytest.raises(
            TeacherError, match=r"(?s)part of sample .* failed with: .*`cache.build.spot_check_every` to 0"
        ):
            compute_references(samples, placement=placement, ray=import_ray(), stop=StopRequest(), job=job)


def test_a_sample_that_differs_from_the_reference_stops_its_shard(
    tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples).model_copy(
        update={"samples_per_shard": 28}
    )
    samples = read_samples(config.data)
    worker = ShardWorker(config, writer=open_builder(config, samples), identity={}, log_file=None)
    conversations = encode_digits(tiny_qwen2_vl, digit_samples, count=3)
    targets = compute_targets(worker.teacher, conversations, topk=8, question_rows=[False] * 3)
    references = [ReferenceRows.of(one) for one in targets]

    off = dataclasses.replace(references[1], rows=references[1].rows.roll(1, dims=1))
    with pytest.raises(SpotCheckMismatch, match=rf"{off.sample_id}: its hidden states differ .* by \d.*relative L2"):
        list(worker.build("shard-000000", samples.samples, references=[references[0], off]))
    other = dataclasses.replace(references[2], token_ids=references[2].token_ids + 1)
    with pytest.raises(SpotCheckMismatch, match=f"{other.sample_id}: the engine saw other tokens"):
        list(worker.build("shard-000000", samples.samples, references=[other]))
    assert open_cache(config.uri, allow_incomplete=True).sample_ids == ()
    assert list((tmp_path / "cache").glob("shards/*")) == []

    *_, report = worker.build("shard-000000", samples.samples, references=references)
    assert isinstance(report, ShardReport)
    assert report.spot_check.samples == 3
    assert report.spot_check.hidden_relative_l2 == 0
    assert worker.writer.complete()
    assert len(open_cache(config.uri)) == 28

    (again,) = worker.build("shard-000000", samples.samples, references=[off])
    assert isinstance(again, ShardReport)
    assert (again.samples, again.tokens) == (28, 0), "it stands: nothing was computed"


def test_a_shard_with_more_bad_samples_than_allowed_is_not_committed(
    tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples)
    samples = read_samples(config.data)
    worker = ShardWorker(config, writer=open_builder(config, samples), identity={}, log_file=None)

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("this machine's processor is broken")

    with monkeypatch.context() as broken:
        broken.setattr(shard_worker, "encode_conversation", refuse)
        with pytest.raises(DataError, match=r"2 bad sample\(s\) in shard shard-000000 of .*, allowed are 0"):
            list(worker.build("shard-000000", samples.samples[:2]))
    assert worker.writer.missing_shards()[0].shard_id == "shard-000000"
    *_, report = worker.build("shard-000000", samples.samples[:2])
    assert isinstance(report, ShardReport)
    assert (report.samples, report.skipped) == (2, ())


@pytest.mark.parametrize(
    ("failures", "message"), [(2, "timed out during startup"), (3, "timed out during startup"), (1, "full")]
)
def test_ray_is_started_again_where_it_came_up_too_late(failures: int, message: str) -> None:
    calls: list[str] = []

    def init(**_: Any) -> None:
        calls.append("init")
        if calls.count("init") <= failures:
            raise RuntimeError(message)

    ray: Any = SimpleNamespace(init=init, shutdown=lambda: calls.append("shutdown"))
    if (failures, message) == (2, "timed out during startup"):
        start_ray(ray, address="local")
        assert calls == ["init", "shutdown"] * 2 + ["init"]
    else:
        with pytest.raises(RuntimeError, match=message):
            start_ray(ray, address="local")
        assert calls.count("init") == failures


def test_one_in_so_many_is_checked_whatever_its_id() -> None:
    digests = [f"{number:064x}"[::-1] for number in range(3000)]
    chosen = {every: [d for d in digests if is_spot_checked(d, every=every)] for every in (0, 1, 10)}
    assert chosen[0] == []
    assert chosen[1] == digests
    assert all(is_spot_checked(digest, every=5) for digest in chosen[10])


def test_replicas_that_fit_neither_the_cluster_nor_a_node_are_refused() -> None:
    build = BuildConfig(num_replicas=2, tensor_parallel_size=8, pipeline_parallel_size=2)
    assert replica_resources(build, available={"CPU": 64, "GPU": 32}, gpus_per_node=16).gpus == 16
    with pytest.raises(
        ConfigError, match=r"a replica takes 16 GPU\(s\), but no node has more than 8.*lower `cache\.build\.ten"
    ):
        replica_resources(build, available={"CPU": 64, "GPU": 32}, gpus_per_node=8)
    with pytest.raises(ConfigError, match=r"2 replica\(s\) with 16 GPU\(s\) each do not fit .* has 24 GPU"):
        replica_resources(build, available={"CPU": 64, "GPU": 24}, gpus_per_node=8)
    assert replica_resources(build, available={"CPU": 64}, gpus_per_node=0).gpus == 0


def test_no_actor_goes_to_a_node_that_is_avoided(
    local_ray: None, tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    ray = import_ray()
    placement = ReplicaPlacement(ray, make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples))
    actor = placement.start(StuckActor, 0)
    node = placement.node_of(actor)
    placement.stop(actor)
    assert node in {node["NodeID"] for node in ray.nodes()}
    placement.avoid(node)
    waiting = placement.start(StuckActor, 0)
    assert ray.wait([waiting.ready.remote()], timeout=3)[0] == []
    placement.stop(waiting)


def test_there_is_a_place_unless_all_nodes_that_are_large_enough_are_avoided() -> None:
    def node(name: str, *, gpus: int, alive: bool = True) -> dict[str, Any]:
        return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 8.0, "GPU": gpus}}

    nodes = [node("head", gpus=0), node("a", gpus=4), node("b", gpus=4)]
    ray = SimpleNamespace(nodes=lambda: nodes, cluster_resources=lambda: {"CPU": 24, "GPU": 8})
    config = make_config(Path("cache"), model=Path("model"), data=Path("data"), tensor_parallel_size=4)
    placement = ReplicaPlacement(ray, config)  # type: ignore[arg-type]
    placement.avoid("a")
    assert placement.has_place()
    placement.avoid("b")
    assert not placement.has_place()
    nodes[1:] = [node("a", gpus=4, alive=False), node("b", gpus=4, alive=False)]
    assert placement.has_place(), "one may join"


def test_the_reference_keeps_some_rows_of_a_long_answer(tiny_qwen2_vl: Path, digit_samples: Path) -> None:
    (conversation,) = encode_digits(tiny_qwen2_vl, digit_samples, count=1)
    config = make_config(Path("unused"), model=tiny_qwen2_vl, data=digit_samples)
    (targets,) = compute_targets(TransformersTeacher(config.teacher), [conversation], topk=2, question_rows=[True])
    long = dataclasses.replace(targets, hidden_states=torch.randn(500, 8))
    kept = ReferenceRows.of(long)
    assert (len(kept.rows), kept.places[0], kept.places[-1]) == (64, 0, 499)
    assert torch.equal(kept.rows, long.hidden_states[kept.places])
