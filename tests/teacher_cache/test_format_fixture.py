"""Format version 2 stays readable: caches in git against numbers that no code of the store has made."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from crc32c import crc32c

from teacher_cache import open_cache
from teacher_cache.config import LEVELS, Level
from teacher_cache.errors import FormatUnsupported
from teacher_cache.gc import collect_garbage
from teacher_cache.inspect import cache_status, find_caches
from teacher_cache.repair import repair_cache
from teacher_cache.schema import SkippedSample, predicting_rows, question_row_mask, tier_a_rows
from teacher_cache.verify import verify_cache
from tests.fixtures.format_content import (
    HIDDEN,
    IDENTITY,
    SKIPPED,
    SPANS,
    TOPK,
    WITHOUT_QUESTIONS,
    digest_of,
    head,
    planned,
    targets_of,
)
from tests.fixtures.make_format_fixture import open_compact, open_exact
from tests.teacher_cache.store import assert_same

FIXTURE = Path(__file__).parents[1] / "fixtures" / "format-2"
DIGESTS = {
    "exact": "04fc5b8a8fdee6fd1cea8362208ddcc45a5f00157a11703bd2fb9c765960601d",
    "compact": "a04949ce7b1cb59d77445ac97ca1682fc0a0c8f36409756ffee3e9fbb8b84785",
}
"""BLAKE3 of the latest snapshot, which covers every byte: the caches in git never change."""
LIMIT_BYTES = 600_000


@pytest.mark.parametrize("name", DIGESTS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_fixture_is_as_it_was_made(name: str, level: Level) -> None:
    report = verify_cache(str(FIXTURE / name), level=level, trusted_digest=DIGESTS[name])
    assert report.problems == ()
    assert (report.samples, report.missing_shards) == (4, ())
    assert sum(path.stat().st_size for path in FIXTURE.rglob("*")) < LIMIT_BYTES


def test_exact_rows_read_as_the_numbers_that_were_stored() -> None:
    cache = open_cache(str(FIXTURE / "exact"))
    assert cache.sample_ids == tuple(SPANS)
    assert cache.skipped == (SkippedSample(sample_id=SKIPPED, reason="no-answer", message="it has no assistant turn"),)
    for found, sample_id in zip(cache.read(SPANS), SPANS, strict=True):
        assert_same(found, targets_of(sample_id, dtype=torch.bfloat16))
        assert cache.sample_digest(sample_id) == digest_of(sample_id)
    assert open_cache(str(FIXTURE / "exact"), snapshot=0).sample_ids == tuple(SPANS)[:3]


def test_8_bit_rows_read_as_the_numbers_that_were_stored() -> None:
    cache = open_cache(str(FIXTURE / "compact"))
    assert cache.snapshot == 2
    for found, sample_id in zip(cache.read(SPANS), SPANS, strict=True):
        assert_same(found, replace(targets_of(sample_id, dtype=torch.float32), question_hidden_states=None))


def test_a_few_numbers_are_what_they_were_once_and_for_all() -> None:
    (ada,) = open_cache(str(FIXTURE / "exact")).read(["ada"])
    assert ada.token_ids.tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99, 110, 121]
    assert ada.hidden_states[:2].tolist() == [[7.0, -0.25, 0.5, -1.0], [7.0, 0.5, -1.0, 2.0]]
    assert ada.question_hidden_states is not None
    assert ada.question_hidden_states[0].tolist() == [7.0, -0.25, 0.5, -1.0]
    assert ada.topk_ids is not None
    assert ada.topk_ids.tolist() == [[0, 5], [1, 6], [2, 7], [3, 8], [4, 9]]
    assert ada.topk_logprobs is not None
    assert ada.topk_logprobs[4].tolist() == [-0.3125, -0.75]
    assert ada.logsumexp is not None
    assert ada.logsumexp.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ada.target_logprobs is not None
    assert ada.target_logprobs.tolist() == [-1.5, -2.0, -2.5, -3.0, -3.5]


@pytest.mark.parametrize("name", DIGESTS)
def test_the_manifest_and_the_head_read_as_stored(name: str) -> None:
    cache, expected = open_cache(str(FIXTURE / name)), head()
    codec = {"exact": "exact", "compact": "fp8"}[name]
    assert {**cache.identity, "data": None} == {**IDENTITY, "codec": codec, "data": None}
    assert cache.provenance["release"] == "fixture"
    assert {shard["engine"] for shard in cache.provenance["shards"]} == {"arithmetic"}
    found = cache.teacher_head()
    assert torch.equal(found.weight, expected.weight)
    assert found.bias is not None
    assert expected.bias is not None
    assert torch.equal(found.bias, expected.bias)
    assert (found.logit_scale, found.logit_softcap) == (expected.logit_scale, expected.logit_softcap)


def rows_by_hand(shard: Path, array: str) -> np.ndarray:
    """Read an array of a shard from its bytes, by what docs/format.md says of them."""
    metadata = json.loads((shard / array / "zarr.json").read_bytes())
    (sharding,) = metadata["codecs"]
    chunk_shape = sharding["configuration"]["chunk_shape"]
    dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
    chunk_bytes = dtype.itemsize * int(np.prod(chunk_shape))
    data = next((shard / array).glob("c.*")).read_bytes()
    chunks = -(-metadata["shape"][0] // chunk_shape[0])
    index, index_crc = data[-4 - 16 * chunks : -4], data[-4:]
    assert crc32c(index) == int.from_bytes(index_crc, "little")
    parts = []
    for offset, length in np.frombuffer(index, dtype="<u8").reshape(chunks, 2).tolist():
        body, crc = data[offset : offset + length - 4], data[offset + length - 4 : offset + length]
        assert len(body) == chunk_bytes
        assert crc32c(body) == int.from_bytes(crc, "little")
        parts.append(np.frombuffer(body, dtype=dtype).reshape(chunk_shape))
    return np.concatenate(parts)[: metadata["shape"][0]]


def test_a_second_reader_of_a_few_lines_finds_the_same_rows() -> None:
    (shard,) = (FIXTURE / "exact").glob("shards/first-*")
    sample_ids = json.loads((shard / "zarr.json").read_bytes())["attributes"]["sample_ids"]
    columns = json.loads((shard / "offsets" / "zarr.json").read_bytes())["attributes"]["columns"]
    offsets = dict(zip(columns, rows_by_hand(shard, "offsets").T, strict=True))
    for place, sample_id in enumerate(sample_ids):
        expected = targets_of(sample_id, dtype=torch.bfloat16)
        for array, axis in {
            "token_ids": "tokens",
            "spans": "turns",
            "hidden_states": "tier_a",
            "question_hidden_states": "tier_q",
            "topk_ids": "answer_tokens",
            "topk_logprobs": "answer_tokens",
            "logsumexp": "answer_tokens",
            "target_logprobs": "answer_tokens",
            "answer_byte_ends": "answer_tokens",
        }.items():
            start, stop = offsets[axis][place : place + 2]
            found, wanted = rows_by_hand(shard, array)[start:stop], getattr(expected, array)
            if wanted is None:
                assert (sample_id, len(found)) == (WITHOUT_QUESTIONS, 0)
            elif isinstance(wanted, tuple):
                assert [tuple(span) for span in found.tolist()] == list(wanted)
            elif wanted.dtype == torch.bfloat16:
                assert np.array_equal(found, wanted.view(torch.uint16).numpy())
            else:
                assert np.array_equal(found, wanted.numpy())


def test_the_content_covers_every_axis() -> None:
    for sample_id in SPANS:
        sample = targets_of(sample_id, dtype=torch.float32)
        assert sample.hidden_states.shape == (len(tier_a_rows(sample.spans)), HIDDEN)
        assert sample.topk_ids is not None
        assert sample.topk_ids.shape == (len(predicting_rows(sample.spans)), TOPK)
        if sample.question_hidden_states is not None:
            rows = question_row_mask(sample.spans, num_tokens=len(sample.token_ids)).sum()
            assert sample.question_hidden_states.shape == (rows, HIDDEN)


def test_a_cache_of_this_version_can_be_extended(tmp_path: Path) -> None:
    uri = str(tmp_path / "cache")
    shutil.copytree(FIXTURE / "exact", uri)
    sample = replace(targets_of("ada", dtype=torch.bfloat16), sample_id="new")
    writer = open_exact(Path(uri), [planned("new", "new")])
    writer.commit_shard(
        "new", [sample], sample_digests={"new": digest_of("new")}, skipped=(), provenance={"engine": "test"}
    )
    cache = open_cache(uri)
    assert cache.sample_ids == (*SPANS, "new")
    assert_same(cache.read(["later"])[0], targets_of("later", dtype=torch.bfloat16))
    assert_same(cache.read(["new"])[0], sample)
    assert verify_cache(uri).ok


@pytest.mark.parametrize(
    "use",
    [
        open_cache,
        verify_cache,
        repair_cache,
        collect_garbage,
        cache_status,
        lambda uri: open_compact(Path(uri)),
    ],
    ids=["open", "verify", "repair", "gc", "status", "build"],
)
def test_a_newer_version_is_refused_and_left_alone(tmp_path: Path, use: Callable[[str], object]) -> None:
    """What a newer version looks like is unknown but for two keys, so nothing else of it is looked at."""
    (tmp_path / "plans").mkdir()
    newer = b'{"format": "genrecal-cache", "version": 3, "teachers": [1, 2], "signed": "yes"}'
    (tmp_path / "CACHE.json").write_bytes(newer)
    with pytest.raises(
        FormatUnsupported, match=r"version 3, this release reads 'genrecal-cache' version 2; use a newer"
    ):
        use(str(tmp_path))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["CACHE.json", "plans"]
    assert (tmp_path / "CACHE.json").read_bytes() == newer


def test_a_newer_version_does_not_serve_a_run(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE / "exact", tmp_path / "good")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "CACHE.json").write_text('{"format": "genrecal-cache", "version": 3}')
    good, newer = find_caches(tmp_path, identity={**IDENTITY, "codec": "exact"}, digests={"ada": digest_of("ada")})
    assert (good.uri, good.serves) == (str(tmp_path / "good"), True)
    assert (newer.uri, newer.serves) == (str(tmp_path / "newer"), False)
    assert "version 3" in newer.differences[0]
