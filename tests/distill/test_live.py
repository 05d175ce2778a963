"""A run from the cache gives the losses of the same run with the teacher live, digit for digit."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

from distill.config import Stage
from distill.live import LiveTeacher
from distill.trainer import train_student
from teacher_cache import open_cache
from teacher_cache.config import CacheConfig
from teacher_cache.errors import CheckpointError, SampleError
from teacher_cache.samples import read_samples
from teacher_cache.schema import TIERS, TeacherTargets, Tier
from teacher_cache.teacher import TransformersTeacher
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import numbers, read_metrics, student_config, train_config

# every stage that reads the teacher, with each of the targets that it can read: method, stages, settings
RUNS: dict[str, tuple[str, list[Stage], dict[str, Any]]] = {
    "genrecal": ("genrecal", ["align", "distill"], {}),
    "stand-ins": ("genrecal", ["align", "distill"], {"recalibrator": {"student_answer_fraction": 0.7}}),
    "kd, topk": ("kd", ["distill"], {"baselines": {"source": "topk"}}),
    "kd, rows": ("kd", ["distill"], {"baselines": {"source": "rows"}}),
    "uld, topk": ("uld", ["distill"], {"baselines": {"source": "topk"}}),
    "uld, rows": ("uld", ["distill"], {"baselines": {"source": "rows"}}),
}


class CountingTeacher(LiveTeacher):
    """Notes which samples the teacher ran over, and for which tiers."""

    def __init__(self, config: CacheConfig) -> None:
        samples = read_samples(config.data).samples
        super().__init__(TransformersTeacher(config.teacher), config=config, samples=samples)
        self.reads: list[tuple[str, frozenset[Tier]]] = []

    def read(self, sample_ids: Iterable[str], *, tiers: Collection[Tier] = TIERS) -> list[TeacherTargets]:
        ids = list(sample_ids)
        self.reads += [(sample_id, frozenset(tiers)) for sample_id in ids]
        return super().read(ids, tiers=tiers)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("live")
    data = write_data(folder / "data", num_samples=12, text_only=(3,), multi_turn=(2, 7))
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=data)


@pytest.mark.parametrize("name", RUNS)
def test_losses_from_the_cache_equal_those_of_the_live_teacher(
    name: str, cache: CacheConfig, tiny_qwen2_vl: Path, tiny_internvl: Path, tmp_path: Path
) -> None:
    method, stages, settings = RUNS[name]
    # kd needs the teacher's tokenizer
    student = student_config(tiny_qwen2_vl if method == "kd" else tiny_internvl, method=method)
    train = train_config(stages=stages, **settings)
    live = CountingTeacher(cache)
    train_student(cache=cache, student=student, train=train, output_dir=tmp_path / "cached")
    assert live.reads == []
    train_student(cache=cache, student=student, train=train, output_dir=tmp_path / "live", targets=live)
    for stage in stages:
        cached = numbers(read_metrics(tmp_path / "cached", stage))
        assert len(cached) == 3
        assert numbers(read_metrics(tmp_path / "live", stage)) == cached
    # three steps of six samples in every stage, each a run of the teacher
    assert len(live.reads) >= 18 * len(stages)


def test_a_live_teacher_computes_what_its_cache_holds(cache: CacheConfig) -> None:
    live, stored = CountingTeacher(cache), open_cache(cache.uri)
    assert live.sample_ids == stored.sample_ids
    assert len(live) == len(stored)
    assert live.hidden_size == stored.hidden_size
    for tiers in (("A",), ("A", "L"), TIERS):
        targets, expected = (source.read(live.sample_ids, tiers=tiers) for source in (live, stored))
        for own, cached in zip(targets, expected, strict=True):
            assert own.spans == cached.spans
            assert live.sample_digest(own.sample_id) == stored.sample_digest(cached.sample_id)
            assert live.num_tokens(own.sample_id) == stored.num_tokens(cached.sample_id)
            for field in ("token_ids", "hidden_states", "question_hidden_states", "topk_logprobs", "answer_byte_ends"):
                left, right = getattr(own, field), getattr(cached, field)
                assert (left is None) == (right is None), (tiers, field)
                assert left is None or left.tolist() == right.tolist(), (tiers, field)


def test_question_rows_are_those_that_a_build_keeps(cache: CacheConfig) -> None:
    half = cache.model_copy(update={"targets": cache.targets.model_copy(update={"question_fraction": 0.5})})
    live = CountingTeacher(half)
    kept = [targets.question_hidden_states is not None for targets in live.read(live.sample_ids)]
    assert set(kept) == {True, False}


def test_a_live_run_does_not_go_on_from_a_run_with_the_cache(
    cache: CacheConfig, tiny_internvl: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"cache": cache, "student": student_config(tiny_internvl), "output_dir": tmp_path}
    train_student(**settings, train=train_config(), stages=["align"])
    with pytest.raises(CheckpointError, match="cache"):
        train_student(**settings, train=train_config(), stages=["align"], targets=CountingTeacher(cache))


def test_a_sample_that_the_teacher_cannot_take_is_named(cache: CacheConfig) -> None:
    short = cache.model_copy(update={"data": cache.data.model_copy(update={"max_length": 8})})
    with pytest.raises(SampleError, match="max_length is 8") as error:
        CountingTeacher(short).read(["s000"])
    assert error.value.sample_id == "s000"
