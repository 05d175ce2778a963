import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache import open_cache
from teacher_cache.documents import encode_document
from teacher_cache.errors import (
    CacheCorrupt,
    CacheMismatch,
    CacheNotFound,
    ConfigError,
    FormatUnsupported,
    TeacherError,
)
from teacher_cache.manifest import fingerprint
from teacher_cache.plan import PlannedShard
from teacher_cache.schema import SkippedSample, Span, TeacherHead
from tests.teacher_cache.store import (
    IDENTITY,
    VOCAB,
    build,
    commit,
    digest_of,
    make_plan,
    make_samples,
    make_targets,
    open_builder,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


@given(identity=st.dictionaries(st.text(), json_values, max_size=4))
def test_fingerprint_ignores_key_order_and_survives_json(identity: dict[str, Any]) -> None:
    expected = fingerprint(identity)
    assert fingerprint(reversed_keys(identity)) == expected
    assert fingerprint(json.loads(json.dumps(identity))) == expected


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {1, 2}, object(), b"bytes", Path("p"), torch.bfloat16, {1: "key"}, "\ud800"]
)
def test_fingerprint_refuses_what_has_no_stable_form(value: Any) -> None:
    with pytest.raises(ConfigError, match="no stable JSON form"):
        fingerprint({"teacher": {"weights": [value]}})


def changed(path: str, value: Any) -> dict[str, Any]:
    identity = json.loads(json.dumps(IDENTITY))
    *parents, last = path.split(".")
    target = identity
    for name in parents:
        target = target[name]
    target[last] = value
    return identity


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("teacher.weights", "other"),
        ("teacher.dtype", "float16"),
        ("processing.chat_template", "78"),
        ("processing.max_length", 4097),
        ("targets.topk", 8),
        ("targets.question_fraction", 1.0),
        ("tap", "before-norm"),
        ("processing.added", True),
    ],
)
def test_another_identity_is_refused_by_field(tmp_path: Path, path: str, value: Any) -> None:
    samples = make_samples(2)
    open_builder(tmp_path / "cache", samples)
    with pytest.raises(CacheMismatch) as caught:
        open_builder(tmp_path / "cache", samples, identity=changed(path, value))
    lines = [line for line in str(caught.value).splitlines() if "stored" in line]
    assert len(lines) == 1
    assert re.fullmatch(rf"  {re.escape(path)}: stored .*, asked {re.escape(json.dumps(value))}", lines[0])


def test_other_samples_are_refused_and_another_grouping_is_not(tmp_path: Path) -> None:
    samples = make_samples(4)
    writer = open_builder(tmp_path / "cache", samples, per_shard=2)
    with pytest.raises(CacheMismatch, match=r"4 stored, 5 asked, of which 1 are not stored, first \['sample-4'\]"):
        open_builder(tmp_path / "cache", make_samples(5))
    assert open_builder(tmp_path / "cache", samples[:3]).missing_shards() == writer.missing_shards()
    assert open_builder(tmp_path / "cache", samples, per_shard=4).missing_shards() == writer.missing_shards()


def test_a_finished_cache_opens_again_without_work(tmp_path: Path) -> None:
    samples = make_samples(4)
    build(tmp_path / "cache", samples)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    writer = open_builder(tmp_path / "cache", samples)
    assert writer.missing_shards() == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()} == before


def rewrite_manifest(root: Path, **changes: Any) -> None:
    body = json.loads((root / "CACHE.json").read_bytes())
    del body["sha256"]
    (root / "CACHE.json").write_bytes(encode_document({**body, **changes}))


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    open_builder(tmp_path / "cache", make_samples(2))
    rewrite_manifest(tmp_path / "cache", version=3, new_field={})
    with pytest.raises(FormatUnsupported, match=r"'genrecal-cache' version 3.*reads.*version 2; use a newer release"):
        open_cache(str(tmp_path / "cache"))
    rewrite_manifest(tmp_path / "cache", version=1)
    with pytest.raises(FormatUnsupported, match="build the cache again"):
        open_cache(str(tmp_path / "cache"))


def test_a_changed_identity_does_not_keep_its_fingerprint(tmp_path: Path) -> None:
    open_builder(tmp_path / "cache", make_samples(2))
    rewrite_manifest(tmp_path / "cache", identity=changed("tap", "other"))
    with pytest.raises(CacheCorrupt, match="fingerprint"):
        open_cache(str(tmp_path / "cache"))


def test_no_cache_and_foreign_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFound, match="build the cache"):
        open_cache(str(tmp_path / "nothing"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        open_builder(tmp_path / "mine", make_samples(2))


@pytest.mark.parametrize("shard_id", ["../up", "/abs", "", ".hidden", "a/b", "a\0", "a.b", "x" * 101])
def test_a_shard_id_is_a_plain_name(tmp_path: Path, shard_id: str) -> None:
    samples = make_samples(1)
    (shard,) = make_plan(samples, per_shard=1)
    with pytest.raises(ConfigError, match="shard id"):
        open_builder_with(tmp_path, [replace(shard, shard_id=shard_id)])
    with pytest.raises(ConfigError, match="planned twice"):
        open_builder_with(tmp_path, [shard, shard])


def open_builder_with(tmp_path: Path, plan: list[PlannedShard]) -> None:
    from teacher_cache.writer import create_or_open_builder

    create_or_open_builder(str(tmp_path / "cache"), identity=IDENTITY, plan=plan, provenance={}, head=None)


def test_a_shard_takes_exactly_its_planned_samples(tmp_path: Path) -> None:
    samples = make_samples(4)
    writer = open_builder(tmp_path / "cache", samples)
    digests = {sample.sample_id: digest_of(sample.sample_id) for sample in samples}
    wrong = [samples[:1], samples[:3], [samples[0], samples[2]], [samples[0], samples[0]], []]
    for chosen in wrong:
        with pytest.raises(CacheMismatch, match="shard 00000: 2 samples are planned"):
            writer.commit_shard("00000", chosen, sample_digests=digests, skipped=(), provenance={})
    both = [SkippedSample(sample_id="sample-0", reason="too-long", message="m")]
    with pytest.raises(CacheMismatch, match="3 were given"):
        writer.commit_shard("00000", samples[:2], sample_digests=digests, skipped=both, provenance={})
    with pytest.raises(CacheMismatch, match="has digest None, planned was"):
        writer.commit_shard("00000", samples[:2], sample_digests={}, skipped=(), provenance={})
    with pytest.raises(CacheMismatch, match="'elsewhere' is not planned"):
        writer.commit_shard("elsewhere", samples[:2], sample_digests=digests, skipped=(), provenance={})
    assert len(writer.missing_shards()) == 2
    assert list((tmp_path / "cache").glob("shards/*")) == []


def broken(name: str, value: Any) -> Any:
    sample = make_targets("bad")
    object.__setattr__(sample, name, value(getattr(sample, name)))
    return sample


def with_value(value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[5 % tensor.numel()] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_states", with_value(float("nan")), "hidden_states holds NaN"),
        ("question_hidden_states", with_value(float("inf")), "question_hidden_states holds NaN or infinity"),
        ("logsumexp", with_value(float("nan")), "logsumexp holds NaN"),
        ("topk_logprobs", with_value(float("-inf")), "topk_logprobs holds NaN or infinity"),
        ("hidden_states", lambda t: t[:-1], r"hidden_states has shape \(6, 8\), expected \(7, 8\)"),
        ("question_hidden_states", lambda t: t[1:], "question_hidden_states has shape"),
        ("question_hidden_states", lambda t: t.float(), "question_hidden_states is torch.float32.*expected bfloat16"),
        ("hidden_states", lambda t: t.double(), "one of float32, bfloat16, float16"),
        ("topk_ids", lambda t: t[1:], "topk_ids has shape"),
        ("topk_ids", lambda t: t.float(), "topk_ids is torch.float32.*expected int32 or int64"),
        ("topk_ids", with_value(VOCAB), f"topk_ids ranges over .*expected 0..{VOCAB - 1}"),
        ("topk_logprobs", lambda t: t.double(), "topk_logprobs is torch.float64.*expected float32"),
        ("topk_logprobs", lambda t: t.flip(1), "not sorted"),
        ("target_logprobs", with_value(0.5), "log-probability is 0.5"),
        ("answer_byte_ends", lambda t: t.flip(0), "answer_byte_ends of turn 0 decreases"),
        ("answer_byte_ends", lambda t: t - 1, "answer_byte_ends of turn 0"),
        ("answer_byte_ends", lambda t: t[1:], "answer_byte_ends has shape"),
        ("token_ids", with_value(-1), "token_ids ranges over -1"),
        ("spans", lambda _: (Span(0, 4),), r"answer span \(0, 4\)"),
        ("spans", lambda _: (Span(3, 7), Span(6, 8)), r"answer span \(6, 8\)"),
        ("spans", lambda _: (Span(3, 99),), r"answer span \(3, 99\)"),
        ("spans", lambda _: (), "no answer span"),
    ],
)
def test_broken_targets_are_refused_at_commit(tmp_path: Path, name: str, value: Any, message: str) -> None:
    sample = broken(name, value)
    writer = open_builder(tmp_path / "cache", [sample])
    with pytest.raises(TeacherError, match=f"sample 'bad'.*{message}"):
        commit(writer, writer.missing_shards()[0], [sample])
    assert len(writer.missing_shards()) == 1
    assert list((tmp_path / "cache").glob("shards/*")) == []


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    samples = make_samples(1)
    writer = open_builder(tmp_path / "cache", samples, head=TeacherHead(weight=torch.zeros(VOCAB, 16)))
    with pytest.raises(TeacherError, match="8 columns, the stored teacher head takes 16"):
        commit(writer, writer.missing_shards()[0], samples)


def test_provenance_must_be_plain(tmp_path: Path) -> None:
    samples = make_samples(1)
    with pytest.raises(ConfigError, match="where is a PosixPath"):
        open_builder(tmp_path / "cache", samples, provenance={"where": tmp_path})
    writer = open_builder(tmp_path / "cache", samples, provenance={"sizes": (1, 2)})
    commit(writer, writer.missing_shards()[0], samples)
    assert open_cache(str(tmp_path / "cache")).provenance["sizes"] == [1, 2]
