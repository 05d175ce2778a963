"""Plans, indexes and heads that are longer than a request may take: written in parts, read in pieces, checked once."""

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import obstore
import pytest
import torch
from obstore.exceptions import NotFoundError

from teacher_cache import checked_file, object_client, object_store, open_cache, stored_digest
from teacher_cache.durable_files import digest_bytes
from teacher_cache.errors import CacheCorrupt, CacheError
from teacher_cache.manifest import read_manifest
from teacher_cache.object_store import ObjectStore
from teacher_cache.schema import TeacherHead
from teacher_cache.snapshot import map_index, read_snapshot
from teacher_cache.storage import open_store
from teacher_cache.verify import verify_cache
from tests.teacher_cache.s3_server import BUCKET, S3, Fault, start_s3
from tests.teacher_cache.store import assert_same, build, make_samples, open_builder

PIECE = 512
DATA = bytes(range(256)) * 10 + b"end"
PARTS = math.ceil(len(DATA) / PIECE)
NAME = "index/0123456789abcdef.safetensors"
SAMPLES = make_samples(8)


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S3_UPLOAD_PART_MIN_SIZE", str(PIECE))
        with start_s3(patch) as s3:
            yield s3


@pytest.fixture
def s3(server: S3, request: pytest.FixtureRequest) -> Iterator[S3]:
    server.uri = f"s3://{BUCKET}/{request.node.name}/cache"
    server.requests.clear()
    yield server
    server.fault = lambda method, path: None


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", PIECE)
    monkeypatch.setattr(object_store, "_PAUSE_S", 0.0)
    for module in (object_store, stored_digest):
        monkeypatch.setattr(module, "COPY_BYTES", PIECE)


def large_head() -> TeacherHead:
    return TeacherHead(weight=torch.randn(100, 8, generator=torch.Generator().manual_seed(3)))


def unfinished(s3: S3) -> list[str]:
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3.port}")
    uploads = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    return [upload["Key"] for upload in uploads if f"s3://{BUCKET}/{upload['Key']}".startswith(s3.uri)]


def requests(s3: S3, method: str, part: str) -> list[str]:
    return [path for made, path in s3.requests if made == method and part in path]


def require_whole(store: ObjectStore) -> None:
    assert store.read(NAME) == DATA
    assert store.size(NAME) == len(DATA)


def test_what_is_named_by_its_content_goes_up_in_parts(s3: S3) -> None:
    build(s3.uri, SAMPLES, per_shard=4, head=large_head())  # type: ignore[arg-type]
    store = open_store(s3.uri)
    manifest = read_manifest(store)
    assert manifest.teacher_head is not None
    snapshot = read_snapshot(store, 0, fingerprint=manifest.fingerprint)
    large = {name: digest for name, digest in snapshot.files.items() if name != "CACHE.json"}
    assert set(large) == {manifest.plan.file, manifest.teacher_head.file, snapshot.index}
    for name, digest in large.items():
        puts = requests(s3, "PUT", name)
        assert len(puts) == math.ceil(digest.size_bytes / PIECE) > 1
        assert all("partNumber=" in path for path in puts)
        assert len(requests(s3, "POST", name)) == 2
        assert digest_bytes(store.read(name)) == digest
    conditional = [path for method, path in s3.requests if method == "PUT" and "partNumber" not in path]
    assert all(sum(name in path for path in conditional) == 1 for name in ("CACHE.json", "commits/00000.0", "00000000"))
    assert unfinished(s3) == []

    s3.requests.clear()
    cache = open_cache(s3.uri)
    assert len(requests(s3, "GET", "index/")) == math.ceil(large[snapshot.index].size_bytes / PIECE)
    assert torch.equal(cache.teacher_head().weight, large_head().weight)
    head = manifest.teacher_head
    assert len(requests(s3, "GET", head.file)) == math.ceil(head.digest.size_bytes / PIECE)
    for found, sample in zip(cache.read(cache.sample_ids), SAMPLES, strict=True):
        assert_same(found, sample)
    assert verify_cache(s3.uri).ok


def test_a_name_that_is_taken_keeps_its_bytes(s3: S3) -> None:
    store = ObjectStore(s3.uri)
    assert store.create_content(NAME, DATA)
    s3.requests.clear()
    assert store.create_content(NAME, DATA)
    assert not store.create_content(NAME, DATA[:-1] + b"?")
    assert not store.create_content(NAME, DATA + b"more")
    assert (s3.count("PUT"), s3.count("POST")) == (0, 0)
    require_whole(store)


def test_a_document_is_read_in_pieces(s3: S3) -> None:
    store = ObjectStore(s3.uri)
    for size, pieces in ((0, 0), (PIECE, 0), (PIECE + 1, 2), (len(DATA), PARTS)):
        store.replace(NAME, DATA[:size])
        s3.requests.clear()
        assert store.read(NAME) == DATA[:size]
        assert [method for method, _ in s3.requests] == ["GET"] * (1 + pieces)


@pytest.mark.parametrize("fault", ["lost-answer", "reset", "503"])
@pytest.mark.parametrize("step", ["uploads", "partNumber=2", "uploadId"])
def test_a_request_of_an_upload_that_fails_is_made_again(s3: S3, fault: Fault, step: str) -> None:
    faults = iter([fault])
    method = "PUT" if "part" in step else "POST"

    def fail(made: str, path: str) -> Fault | None:
        return next(faults, None) if made == method and step in path else None

    s3.fault = fail
    store = ObjectStore(s3.uri)
    assert store.create_content(NAME, DATA)
    assert next(faults, None) is None
    require_whole(store)


def test_an_upload_that_was_finished_before_its_answer_was_lost_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    put = obstore.put

    def put_and_lose(*arguments: Any, **options: Any) -> None:
        put(*arguments, **options)
        raise NotFoundError("NoSuchUpload")  # what S3 says when the end of an upload is asked for again

    monkeypatch.setattr(obstore, "put", put_and_lose)
    store = ObjectStore("memory://lost/cache")
    assert store.create_content(NAME, DATA)
    require_whole(store)


def test_an_upload_that_fails_for_good_leaves_nothing(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_client, "TIMEOUT_S", 0.2)
    s3.fault = lambda method, path: "503" if "partNumber=3" in path else None
    store = ObjectStore(s3.uri)
    with pytest.raises(OSError, match=NAME):
        store.create_content(NAME, DATA)
    assert (store.size(NAME), list(store.list(""))) == (None, [])
    assert unfinished(s3) == []
    s3.fault = lambda method, path: None
    assert store.create_content(NAME, DATA)
    require_whole(store)


UPLOAD = """
import sys
from teacher_cache import object_store
object_store.PART_BYTES = int(sys.argv[1])
object_store.ObjectStore(sys.argv[2]).create_content(sys.argv[3], bytes(100 * object_store.PART_BYTES))
"""


def test_a_killed_upload_leaves_nothing_that_is_seen(s3: S3) -> None:
    s3.fault = lambda method, path: "stall" if "partNumber=4" in path else None
    process = subprocess.Popen([sys.executable, "-c", UPLOAD, str(PIECE), s3.uri, NAME])
    deadline = time.monotonic() + 120
    while not requests(s3, "PUT", "partNumber=4"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    s3.fault = lambda method, path: None
    store = ObjectStore(s3.uri)
    assert (store.size(NAME), list(store.list(""))) == (None, [])
    assert len(unfinished(s3)) == 1, "what the rule of docs/operations.md ends"
    assert store.create_content(NAME, DATA)
    require_whole(store)


READS: dict[str, Callable[[str], object]] = {
    "the head of a reader": lambda uri: open_cache(uri).teacher_head(),
    "the head of a writer": lambda uri: open_builder(uri, SAMPLES, per_shard=4).head,  # type: ignore[arg-type]
    "the index": lambda uri: map_index(
        open_store(uri), read_snapshot(open_store(uri), 0, fingerprint=read_manifest(open_store(uri)).fingerprint)
    ),
}


@pytest.mark.parametrize("what", READS)
def test_the_bytes_that_are_used_are_those_that_were_checked(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "memory://large/cache"
    build(uri, SAMPLES, per_shard=4, head=large_head())  # type: ignore[arg-type]
    get_range = ObjectStore.get_range
    kind = what.split()[1]
    seen: list[str] = []
    fault: dict[int, Callable[[bytes], bytes]] = {}

    def transfer(store: ObjectStore, name: str, *, offset: int, length: int) -> Any:
        data = bytes(get_range(store, name, offset=offset, length=length))
        if kind not in name:
            return data
        seen.append(name)
        return fault.get(len(seen) - 1, bytes)(data)

    def change(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    def fail(data: bytes) -> bytes:
        raise OSError(5, "connection reset")

    monkeypatch.setattr(ObjectStore, "get_range", transfer)
    READS[what](uri)
    (size,) = (entry.size_bytes for entry in open_store(uri).list("") if kind in entry.name)
    count = len(seen)
    assert count == math.ceil(size / PIECE) > 1
    for number in range(count):
        for act, error, message in ((change, CacheCorrupt, "was changed"), (fail, CacheError, "connection reset")):
            seen.clear()
            fault = {number: act}
            with pytest.raises(error, match=message):
                READS[what](uri)


def test_a_file_that_is_gone_or_of_another_length_is_named() -> None:
    store = ObjectStore("memory://gone/cache")
    expected = digest_bytes(DATA)
    for data, message in ((None, "is missing"), (DATA[:-1], f"has {len(DATA) - 1} bytes, {len(DATA)} were committed")):
        if data is not None:
            store.replace(NAME, data)
        with (
            pytest.raises(CacheCorrupt, match=f"the index: memory://gone/cache/{NAME} {message}"),
            checked_file.checked_file(store, NAME, expected=expected, where="the index"),
        ):
            pass


def test_a_copy_that_finds_no_space_is_an_error_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore("memory://full/cache")
    store.replace(NAME, DATA)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with (
        pytest.raises(CacheError, match=r"no temporary file for .*No space left on device"),
        checked_file.checked_file(store, NAME, expected=digest_bytes(DATA), where="the index"),
    ):
        pass
