"""The whole protocol on an S3-compatible store, through faults."""

import json
import multiprocessing
import os
import pickle
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import obstore
import pytest
from obstore.exceptions import GenericError

from teacher_cache import TeacherCache, object_client, object_files, object_store, open_cache
from teacher_cache.errors import CacheCorrupt, CacheError, ConfigError
from teacher_cache.gc import collect_garbage
from teacher_cache.object_store import ObjectStore
from teacher_cache.repair import repair_cache
from teacher_cache.storage import open_store, require_create
from teacher_cache.verify import verify_cache
from teacher_cache.writer import CacheWriter
from tests.teacher_cache.s3_server import BUCKET, S3, Fault, start_s3
from tests.teacher_cache.store import assert_same, build, make_samples

SAMPLES = make_samples(6)


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as patch, start_s3(patch) as s3:
        yield s3


@pytest.fixture
def s3(server: S3, request: pytest.FixtureRequest) -> Iterator[S3]:
    server.uri = f"s3://bucket/{request.node.name.replace('[', '-').replace(']', '')}/cache"
    server.requests.clear()
    yield server
    server.fault = lambda method, path: None


def build_at(uri: str, samples: list[Any] = SAMPLES, **kwargs: Any) -> CacheWriter:
    return build(uri, samples, **kwargs)  # type: ignore[arg-type]


def require_whole(uri: str) -> None:
    cache = open_cache(uri)
    assert cache.sample_ids == tuple(sample.sample_id for sample in SAMPLES)
    for found, sample in zip(cache.read(cache.sample_ids), SAMPLES, strict=True):
        assert_same(found, sample)
    assert verify_cache(uri).problems == ()


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"codec": "fp8"}])
def test_a_cache_lives_in_a_bucket(s3: S3, options: dict[str, Any]) -> None:
    build_at(s3.uri, **options)
    if "codec" not in options:
        require_whole(s3.uri)
    cache = pickle.loads(pickle.dumps(open_cache(s3.uri)))
    head = cache.teacher_head()
    assert head.logit_softcap == 30.0
    assert len(cache.read(["sample-3", "sample-0"], threads=4)) == 2
    assert collect_garbage(s3.uri).removed == ()


def test_one_request_per_sample_and_array_and_no_listing(s3: S3) -> None:
    build_at(s3.uri)
    s3.requests.clear()
    cache = open_cache(s3.uri)
    assert s3.lists == 0
    opening = len(s3.requests)
    s3.requests.clear()
    (sample,) = cache.read(["sample-2"])
    arrays = 8 if sample.question_hidden_states is not None and len(sample.question_hidden_states) else 7
    assert (s3.count("GET"), s3.count("HEAD"), s3.lists) == (arrays, 0, 0)
    s3.requests.clear()
    cache.read(["sample-2"], tiers=())
    assert (s3.count("GET"), len(s3.requests)) == (2, 2)
    print(f"R14: {opening} requests to open, 1 per sample and array, 0 listings")


def faults(share: float, *, seed: int) -> Any:
    kinds: list[Fault] = ["503", "500", "429", "reset", "truncate", "lost-answer"]
    dice, lock = random.Random(seed), threading.Lock()

    def fault(method: str, path: str) -> Fault | None:
        with lock:
            return dice.choice(kinds) if dice.random() < share else None

    return fault


def test_faults_in_a_third_of_all_requests_lose_nothing(s3: S3) -> None:
    s3.fault = faults(0.3, seed=1)
    store = open_store(f"{s3.uri}-objects")
    contents = {f"many/{number}": os.urandom(1000 + number) for number in range(60)}
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda item: store.create(*item), contents.items()))
        assert list(pool.map(store.read, contents)) == list(contents.values())
    s3.requests.clear()
    refused = []
    for _ in range(20):
        try:
            build_at(s3.uri)
            break
        except CacheError as error:
            refused.append(str(error))
    assert "canary" not in "".join(refused)
    require_whole(s3.uri)
    s3.fault = lambda method, path: None
    require_whole(s3.uri)
    collect_garbage(s3.uri)
    assert verify_cache(s3.uri).problems == ()
    print(f"R14: {len(s3.requests)} requests, 30 % with faults, {len(refused)} resumed builds: 0 lost, 0 wrong")


def end_uploads(client: Any) -> int:
    """End all unfinished uploads, as a lifecycle rule does, and return how many there were."""
    uploads = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    for upload in uploads:
        client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
    return len(uploads)


def test_a_rule_for_unfinished_uploads_is_needed_and_harmless(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_files, "PART_BYTES", 5 * 2**20)
    part = memoryview(bytes(object_files.PART_BYTES))
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3.port}")
    operations = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    rules = json.loads(operations.partition("```json\n")[2].partition("```")[0])
    client.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=rules)

    build_at(s3.uri)
    store = ObjectStore(s3.uri)
    killed = store.writer("shards/00000-0/hidden_states/c.0.0")
    for _ in range(3):
        killed.write([part])
    killed.abort()
    store.remove("shards/00000-0")
    require_whole(s3.uri)
    assert end_uploads(client) == 1
    going_on = store.writer("shards/00000-1/hidden_states/c.0.0")
    for _ in range(3):
        going_on.write([part])
    assert end_uploads(client) == 1
    with pytest.raises(OSError, match=r"shards/00000-1/hidden_states/c\.0\.0"):
        going_on.close()
    require_whole(s3.uri)


def test_a_lost_answer_does_not_lose_the_name(s3: S3) -> None:
    store = ObjectStore(s3.uri)
    for number in range(10):
        lost = iter(["lost-answer"])
        s3.fault = lambda method, path, lost=lost: next(lost, None) if method == "PUT" else None  # type: ignore[misc]
        assert store.create(f"commits/{number}.json", b"ours")
        assert not store.create(f"commits/{number}.json", b"theirs")


def test_a_conflict_of_two_conditional_puts_is_tried_again(s3: S3) -> None:
    conflicts = iter(["409", "409"])
    s3.fault = lambda method, path: next(conflicts, None) if method == "PUT" else None  # type: ignore[return-value]
    assert ObjectStore(s3.uri).create("commits/a.json", b"ours")


def test_exactly_one_of_three_creates_a_name(s3: S3) -> None:
    stores = [ObjectStore(s3.uri) for _ in range(3)]
    for number in range(8):
        barrier = threading.Barrier(3)

        def create(index: int, barrier: threading.Barrier = barrier, number: int = number) -> bool:
            barrier.wait()
            return stores[index].create(f"race/{number}", f"by {index}".encode())

        with ThreadPoolExecutor(3) as pool:
            won = list(pool.map(create, range(3)))
        assert sum(won) == 1
        assert stores[0].read(f"race/{number}") == f"by {won.index(True)}".encode()


def test_an_outage_ends_in_an_error(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_client, "TIMEOUT_S", 0.5)
    s3.fault = lambda method, path: "503"
    started = time.monotonic()
    with pytest.raises(CacheError, match=r"cannot read s3://bucket/.*/CACHE\.json") as caught:
        open_cache(s3.uri)
    assert time.monotonic() - started < 60
    assert "canary" not in str(caught.value)


def test_an_answer_that_stalls_is_asked_for_again(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    build_at(s3.uri)
    monkeypatch.setattr(object_client, "TIMEOUT_S", 1.0)
    stalls = iter(["stall"])
    s3.fault = lambda method, path: next(stalls, None) if "hidden_states" in path else None  # type: ignore[return-value]
    require_whole(s3.uri)


def test_a_listing_that_breaks_off_is_asked_for_again(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    build_at(s3.uri)
    listing, breaks = obstore.list, 2

    def break_off(*arguments: Any) -> Any:
        nonlocal breaks
        breaks -= 1
        if breaks >= 0:
            raise GenericError("request or response body error")
        return listing(*arguments)

    monkeypatch.setattr(object_store, "_PAUSE_S", 0.0)
    monkeypatch.setattr(obstore, "list", break_off)
    assert len(list(open_store(s3.uri).list("commits"))) == 3
    assert breaks == -1
    breaks = 1000
    with pytest.raises(OSError, match="body error"):
        list(open_store(s3.uri).list("commits"))


def test_a_damaged_or_missing_object_is_found_and_repaired(s3: S3) -> None:
    build_at(s3.uri)
    store = open_store(s3.uri)
    names = [entry.name for entry in store.list("shards") if entry.name.endswith("hidden_states/c.0.0")]
    data = bytearray(store.read(names[0]))
    data[5] ^= 1
    store.replace(names[0], bytes(data))
    store.remove(names[2])
    with pytest.raises(CacheCorrupt, match="shard 00000, sample 'sample-0'"):
        open_cache(s3.uri).read(["sample-0"])
    cache = open_cache(s3.uri)
    with pytest.raises(CacheCorrupt, match="no such object"):
        cache.read(cache.sample_ids[2:])
    assert {problem.path for problem in verify_cache(s3.uri).problems} == {names[0], names[2]}
    assert len(repair_cache(s3.uri).withdrawn_shards) == 2
    build_at(s3.uri)
    require_whole(s3.uri)


def work_in_fork(cache: TeacherCache, uri: str, told: "multiprocessing.Queue[str]") -> None:
    for found, sample in zip(cache.read([s.sample_id for s in SAMPLES], threads=2), SAMPLES, strict=True):
        assert_same(found, sample)
    for attempt in (lambda: cache.read(["absent"]), lambda: ObjectStore(uri).create("new", b"")):
        try:
            attempt()
        except CacheError as error:
            told.put(str(error))


def test_forked_workers_read_and_do_not_write(s3: S3) -> None:
    build_at(s3.uri)
    cache = open_cache(s3.uri)
    assert_same(cache.read(["sample-0"])[0], SAMPLES[0])
    context = multiprocessing.get_context("fork")
    told: multiprocessing.Queue[str] = context.Queue()
    workers = [context.Process(target=work_in_fork, args=(cache, s3.uri, told), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    messages = [told.get(timeout=120) for _ in range(4)]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert sum("'absent' is not in the cache" in message for message in messages) == 2
    assert sum("can only read it; start processes that write by 'spawn'" in message for message in messages) == 2


def test_a_store_must_refuse_a_second_create(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(s3.uri)
    require_create(store)
    assert list(store.list("staging")) == []
    monkeypatch.setattr(ObjectStore, "create", lambda *_: True)
    with pytest.raises(ConfigError, match="second create"):
        require_create(store)
    with pytest.raises(ConfigError, match="second create"):
        build_at(s3.uri)


def test_longer_objects_are_refused_before_they_are_read(s3: S3) -> None:
    store = ObjectStore(s3.uri)
    with store.writer("big") as file:
        file.write([memoryview(bytes(20 * 1024**2)), memoryview(b"end")])
    assert store.size("big") == 20 * 1024**2 + 3
    with pytest.raises(OSError, match="at most 1000 are expected"):
        store.read("big", limit_bytes=1000)
    tail = bytearray(3)
    store.open("big").read_into(20 * 1024**2, [memoryview(tail)[:1], memoryview(tail)[1:]])
    assert tail == b"end"


@pytest.mark.parametrize(
    "uri",
    ["s3://", "s3://user:secret@bucket/a", "s3://bucket/a?key=secret", "s3://bucket/../other", "s3://bucket/a/../b"],
)
def test_uris_hold_no_secrets_and_do_not_go_up(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_cache(uri)
    assert "secret" not in str(caught.value)


def test_memory_stores_are_shared_by_uri(tmp_path: Path) -> None:
    build_at("memory://shared/cache")
    require_whole("memory://shared/cache")
