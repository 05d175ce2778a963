import multiprocessing
import os
import pickle
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache import open_cache
from teacher_cache.errors import CacheError, CacheIncomplete, ConfigError
from teacher_cache.inspect import cache_status
from teacher_cache.reader import TeacherCache
from teacher_cache.schema import SkippedSample, Span, TeacherTargets
from teacher_cache.verify import verify_cache
from tests.teacher_cache.store import (
    HIDDEN,
    VOCAB,
    assert_same,
    build,
    commit,
    digest_of,
    make_head,
    make_samples,
    make_targets,
    open_builder,
)


@pytest.fixture
def samples() -> list[TeacherTargets]:
    return make_samples(7)


@pytest.fixture
def cache(tmp_path: Path, samples: list[TeacherTargets]) -> TeacherCache:
    build(tmp_path / "cache", samples, per_shard=3)
    return open_cache(str(tmp_path / "cache"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_targets_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    samples = make_samples(5, dtype=dtype)
    samples[0].hidden_states[0, :3] = torch.tensor([-0.0, torch.finfo(dtype).tiny / 2, torch.finfo(dtype).max])
    build(tmp_path / "cache", samples)
    cache = open_cache(str(tmp_path / "cache"))
    for sample in samples:
        assert_same(cache.read([sample.sample_id])[0], sample)


def test_read_keeps_the_asked_order_across_shards(cache: TeacherCache, samples: list[TeacherTargets]) -> None:
    order = [6, 0, 3, 0, 5]
    for got, index in zip(cache.read([samples[i].sample_id for i in order]), order, strict=True):
        assert_same(got, samples[index])


def test_sizes_come_from_the_commit_records(cache: TeacherCache, samples: list[TeacherTargets]) -> None:
    assert cache.sample_ids == tuple(sample.sample_id for sample in samples)
    assert (cache.hidden_size, cache.vocab_size) == (HIDDEN, VOCAB)
    for sample in samples:
        assert cache.num_tokens(sample.sample_id) == len(sample.token_ids)
        assert cache.answer_tokens(sample.sample_id) == sum(span.stop - span.start for span in sample.spans)
        assert cache.sample_digest(sample.sample_id) == digest_of(sample.sample_id)
    assert [shard["engine"] for shard in cache.provenance["shards"]] == ["test"] * 3
    assert cache.provenance["release"] == "0.1.0"


def test_teacher_head_keeps_its_scalars(cache: TeacherCache) -> None:
    head, expected = cache.teacher_head(), make_head()
    assert torch.equal(head.weight, expected.weight)
    assert head.bias is None
    assert (head.logit_scale, head.logit_softcap) == (expected.logit_scale, expected.logit_softcap)


def test_rows_outside_the_fraction_stay_absent(tmp_path: Path) -> None:
    samples = [make_targets(f"s{i}", questions=False) for i in range(2)]
    build(tmp_path / "cache", samples)
    cache = open_cache(str(tmp_path / "cache"))
    assert all(sample.question_hidden_states is None for sample in cache.read(["s0", "s1"]))
    assert cache.tier_bytes()["Q"] < cache.tier_bytes()["A"]
    assert verify_cache(str(tmp_path / "cache")).ok


def test_present_but_empty_question_rows_differ_from_absent_ones(tmp_path: Path) -> None:
    whole = make_targets("all answer", spans=[Span(1, 6)], num_tokens=6)
    build(tmp_path / "cache", [whole])
    (got,) = open_cache(str(tmp_path / "cache")).read(["all answer"])
    assert got.question_hidden_states is not None
    assert got.question_hidden_states.shape == (0, HIDDEN)


def test_skipped_samples_are_listed_and_named(tmp_path: Path) -> None:
    samples = make_samples(4)
    writer = open_builder(tmp_path / "cache", samples)
    first, second = writer.missing_shards()
    bad = [SkippedSample(sample_id=id_, reason="too-long", message="in \udcff.png") for id_ in first.sample_ids]
    writer.commit_shard(first.shard_id, [], sample_digests={}, skipped=bad, provenance={})
    commit(writer, second, samples)
    cache = open_cache(str(tmp_path / "cache"))
    assert cache.sample_ids == second.sample_ids
    assert [(sample.sample_id, sample.message) for sample in cache.skipped] == [
        (id_, "in \\udcff.png") for id_ in first.sample_ids
    ]
    assert verify_cache(str(tmp_path / "cache")).ok
    with pytest.raises(CacheError, match=r"sample-0.*skipped \(too-long\)"):
        cache.read(["sample-0"])


spans_strategy = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4)


@settings(max_examples=20, deadline=None)
@given(
    conversations=st.lists(st.tuples(spans_strategy, st.integers(0, 6), st.booleans()), min_size=1, max_size=6),
    per_shard=st.integers(1, 4),
    hidden=st.integers(1, 40),
)
def test_any_ragged_samples_come_back(
    conversations: list[tuple[list[tuple[int, int]], int, bool]], per_shard: int, hidden: int
) -> None:
    samples = []
    for index, (turns, trailing, questions) in enumerate(conversations):
        spans, position = [], 0
        for header, answer in turns:
            spans.append(Span(position + header, position + header + answer))
            position = spans[-1].stop
        samples.append(
            make_targets(
                f"{index} ü",
                spans=spans,
                num_tokens=position + trailing,
                hidden=hidden,
                questions=questions,
                seed=index,
            )
        )
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder, "cache"), samples, per_shard=per_shard, head=None)
        cache = open_cache(f"file://{folder}/cache")
        for got, sample in zip(cache.read(cache.sample_ids), samples, strict=True):
            assert_same(got, sample)


def test_other_tools_read_the_shards(tmp_path: Path, samples: list[TeacherTargets], cache: TeacherCache) -> None:
    (folder,) = (tmp_path / "cache" / "shards").glob("00001-*")
    group = zarr.open_group(folder, mode="r")
    assert group.attrs["sample_ids"] == ["sample-3", "sample-4", "sample-5"]
    offsets = group["offsets"]
    columns = {name: offsets[:, index] for index, name in enumerate(offsets.attrs["columns"])}
    assert group["hidden_states"].attrs["genrecal_dtype"] == "bfloat16"

    def rows(array: str, axis: str, sample: int) -> np.ndarray:
        start, stop = columns[axis][sample : sample + 2]
        return group[array][start:stop]

    for row, sample in enumerate(samples[3:6]):
        hidden = sample.hidden_states.view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(rows("hidden_states", "tier_a", row), hidden)
        assert np.array_equal(rows("topk_logprobs", "answer_tokens", row), sample.topk_logprobs.numpy())
        assert np.array_equal(rows("token_ids", "tokens", row), sample.token_ids.numpy())
        assert np.array_equal(rows("spans", "turns", row), np.array(sample.spans))


def test_reads_need_only_the_rows_of_the_sample(tmp_path: Path) -> None:
    rows = 3000
    samples = [make_targets(f"s{i}", spans=[Span(1, rows)], num_tokens=rows, seed=i) for i in range(2)]
    build(tmp_path / "cache", samples)
    (stored,) = (tmp_path / "cache" / "shards").glob("*/hidden_states/c.0.0")
    data = bytearray(stored.read_bytes())
    data[:100] = bytes(100)
    stored.write_bytes(data)
    assert_same(open_cache(str(tmp_path / "cache")).read(["s1"])[0], samples[1])
    with pytest.raises(CacheError, match="sample 's0'"):
        open_cache(str(tmp_path / "cache")).read(["s0"])


def test_threads_share_one_cache(cache: TeacherCache, samples: list[TeacherTargets]) -> None:
    with ThreadPoolExecutor(8) as pool:
        for index, got in enumerate(pool.map(lambda i: cache.read([samples[i % 7].sample_id])[0], range(40))):
            assert_same(got, samples[index % 7])


def test_a_fork_reads_after_its_parent_did(cache: TeacherCache, samples: list[TeacherTargets]) -> None:
    cache.read(cache.sample_ids)
    child = os.fork()
    if child == 0:
        try:
            assert_same(cache.read(["sample-4"])[0], samples[4])
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_spawned_process_reads_a_pickled_cache(cache: TeacherCache, samples: list[TeacherTargets]) -> None:
    cache.read(["sample-4"])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert_same(pool.apply(_read_one, (cache, "sample-4")), samples[4])
        pool.close()
        pool.join()


def _read_one(cache: TeacherCache, sample_id: str) -> TeacherTargets:
    return cache.read([sample_id])[0]


def test_a_builder_pickles_small(tmp_path: Path, samples: list[TeacherTargets]) -> None:
    writer = open_builder(tmp_path / "cache", samples)
    first = writer.missing_shards()[0]
    data = pickle.dumps(writer)
    assert len(data) < 1000
    commit(pickle.loads(data), first, samples)
    assert first not in writer.missing_shards()


def test_an_incomplete_cache_must_be_asked_for(tmp_path: Path, samples: list[TeacherTargets]) -> None:
    uri = str(tmp_path / "cache")
    writer = open_builder(tmp_path / "cache", samples)
    commit(writer, writer.missing_shards()[1], samples)
    with pytest.raises(CacheIncomplete, match=r"lacks 3 of 4 shards \(00000, 00002, 00003\)"):
        open_cache(uri)
    cache = open_cache(uri, allow_incomplete=True)
    assert cache.sample_ids == ("sample-2", "sample-3")
    assert_same(cache.read(["sample-3"])[0], samples[3])
    assert cache_status(uri).missing_shards == ("00000", "00002", "00003")
    report = verify_cache(uri)
    assert report.ok
    assert report.missing_shards == ("00000", "00002", "00003")


def test_readers_see_whole_shards_only_while_a_build_runs(tmp_path: Path, samples: list[TeacherTargets]) -> None:
    uri = str(tmp_path / "cache")
    writer = open_builder(tmp_path / "cache", samples, per_shard=1)

    def write() -> None:
        for shard in writer.missing_shards():
            commit(writer, shard, samples)

    thread = threading.Thread(target=write)
    thread.start()
    counts = [0]
    while counts[-1] < len(samples):
        cache = open_cache(uri, allow_incomplete=True)
        for got in cache.read(cache.sample_ids):
            assert_same(got, samples[int(got.sample_id.removeprefix("sample-"))])
        counts.append(len(cache.sample_ids))
    thread.join()
    assert counts == sorted(counts)


def test_unknown_ids_and_schemes_are_refused(cache: TeacherCache) -> None:
    with pytest.raises(CacheError, match="'nobody' is not in the cache"):
        cache.read(["nobody"])
    with pytest.raises(ConfigError, match="scheme 'http' is not supported"):
        open_cache("http://host/cache")
