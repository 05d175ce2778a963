"""Order of samples, the join of cache and student, fillers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.batch import Batch, collate
from distill.config import StudentConfig, TrainConfig
from distill.data import JoinedData, check_turns, join_cache
from distill.encoder import StudentEncoder
from distill.stage_spec import stage_spec
from teacher_cache import open_cache
from teacher_cache.chat import load_processor
from teacher_cache.config import CacheConfig
from teacher_cache.errors import CacheMismatch, ConfigError
from teacher_cache.samples import SampleSet, read_samples
from tests.distill.small_cache import build_small_cache, write_data


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("data-join")
    data = write_data(folder / "data", num_samples=8, text_only=(3, 4), multi_turn=(2,))
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=data, without_question_rows=("s000", "s004"))


def join(
    cache: CacheConfig, student: Path, *, stage: str = "align", method: str = "genrecal", **config: object
) -> JoinedData:
    student_config = StudentConfig(name="s", model=str(student), method=method, **{"max_length": 512, **config})
    spec = stage_spec(stage, method=method, train=TrainConfig(), has_images=True)
    encoder = StudentEncoder(load_processor(str(student)), config=student_config, memory_mib=1)
    return join_cache(open_cache(cache.uri), read_samples(cache.data), encoder=encoder, spec=spec, max_samples=None)


@pytest.mark.parametrize("family", ["tiny_qwen2_vl", "tiny_internvl", "tiny_llava"])
def test_padding_and_packing_keep_every_token(cache: CacheConfig, family: str, request: pytest.FixtureRequest) -> None:
    data = join(cache, request.getfixturevalue(family), stage="distill")
    joined = data.load(range(8))
    batch = data.collate(joined)
    inputs = batch.student
    for row, sample in enumerate(joined):
        length = int(inputs.attention_mask[row].sum())
        assert inputs.input_ids[row, :length].tolist() == sample.encoded.token_ids.tolist()
        assert not inputs.attention_mask[row, length:].any()
    flat = inputs.input_ids.flatten()
    # what a row predicts is the token behind it
    assert torch.equal(flat[inputs.predicting_rows + 1], inputs.labels)
    answers = [sample.encoded.token_ids[start:stop] for sample in joined for start, stop in sample.encoded.spans]
    assert inputs.labels.tolist() == np.concatenate(answers).tolist()
    assert batch.main is not None
    teacher = [sample.targets.token_ids[start:stop] for sample in joined for start, stop in sample.targets.spans]
    assert batch.main.labels.tolist() == torch.cat(teacher).tolist()
    assert len(batch.main.teacher_rows) == len(batch.main.answer_rows) == len(batch.main.labels)


def test_align_stops_before_the_last_answer(cache: CacheConfig, tiny_llava: Path) -> None:
    data = join(cache, tiny_llava)
    joined = data.load([0, 2])
    batch = data.collate(joined)
    assert batch.student.attention_mask.sum(1).tolist() == [sample.encoded.spans[-1].start for sample in joined]
    assert len(batch.student.labels) == 0


def test_regularization_takes_the_samples_with_question_rows(cache: CacheConfig, tiny_llava: Path) -> None:
    data = join(cache, tiny_llava)
    batch = data.batch([0, 1, 2])
    assert batch.main is not None
    assert batch.regularization is not None
    own = data.load([0])[0]
    answer = sum(stop - start for start, stop in own.targets.spans)
    assert batch.regularization.labels.tolist() == batch.main.labels[answer:].tolist()
    assert batch.regularization.question_rows is not None
    targets = data.load([1])[0].targets
    # rebuilt from tiers A and Q, the question's last row is the boundary row
    start = targets.spans[0].start
    rebuilt = batch.regularization.question_rows[:start]
    assert torch.equal(rebuilt[-1], targets.hidden_states[0])
    assert torch.equal(rebuilt[:-1], targets.question_hidden_states[: start - 1])


def test_fillers_bring_what_a_micro_batch_lacks_and_weigh_nothing(cache: CacheConfig, tiny_internvl: Path) -> None:
    data = join(cache, tiny_internvl)
    batch = data.batch([4])  # neither an image nor question rows
    assert batch.sample_ids == ("s004",)
    assert "pixel_values" in batch.student.model_inputs
    assert batch.regularization is not None
    assert float(batch.regularization.weights.sum()) == 0.0
    assert batch.main is not None
    own = data.load([4])[0]
    assert float(batch.main.weights.sum()) == sum(stop - start for start, stop in own.targets.spans)


def test_changed_content_is_a_mismatch_that_names_the_sample(cache: CacheConfig, tiny_llava: Path) -> None:
    data = read_samples(cache.data)
    changed = dataclasses.replace(data.samples[2], digest="0" * 64)
    samples = (*data.samples[:2], changed, *data.samples[3:])
    with pytest.raises(CacheMismatch, match="s002"):
        rejoin(cache, tiny_llava, samples)


def test_a_part_of_the_cached_samples_can_be_trained_on(cache: CacheConfig, tiny_llava: Path) -> None:
    data = read_samples(cache.data)
    assert rejoin(cache, tiny_llava, data.samples[1:]).sample_ids == tuple(s.sample_id for s in data.samples[1:])


def test_uncached_samples_are_mismatches(cache: CacheConfig, tiny_llava: Path) -> None:
    data = read_samples(cache.data)
    with pytest.raises(CacheMismatch, match="new-one"):
        rejoin(cache, tiny_llava, (*data.samples, dataclasses.replace(data.samples[0], sample_id="new-one")))


def rejoin(cache: CacheConfig, student: Path, samples: tuple) -> JoinedData:
    joined = join(cache, student)
    return join_cache(
        open_cache(cache.uri),
        SampleSet(samples=samples, skipped=()),
        encoder=joined.encoder,
        spec=joined.spec,
        max_samples=None,
    )


def test_too_long_for_the_student(cache: CacheConfig, tiny_internvl: Path) -> None:
    data = join(cache, tiny_internvl)
    lengths = [len(s.encoded.token_ids) for s in data.load(range(8))]
    limit = max(lengths) - 1
    joined = join(cache, tiny_internvl, max_length=limit).join(data.samples)
    too_long = [sample.sample_id for sample, length in zip(data.samples, lengths, strict=True) if length > limit]
    assert [(bad.sample_id, bad.reason) for bad in joined.skipped] == [(id_, "too-long") for id_ in too_long]
    assert {s.encoded.sample_id for s in joined.samples} == set(data.sample_ids) - set(too_long)


def test_a_student_that_can_use_nothing_is_refused(cache: CacheConfig, tiny_internvl: Path) -> None:
    with pytest.raises(ConfigError, match="can use none of the 8 samples"):
        join(cache, tiny_internvl, max_length=2)


def test_a_batch_of_bad_samples_only_is_a_weightless_filler(cache: CacheConfig, tiny_internvl: Path) -> None:
    lengths = [len(s.encoded.token_ids) for s in join(cache, tiny_internvl).load(range(8))]
    longest = int(np.argmax(lengths))
    lenient = join(cache, tiny_internvl, max_length=max(lengths) - 1, max_skipped_samples=8)
    batch = lenient.batch([longest])
    assert batch.sample_ids == ()
    assert batch.main is not None
    assert float(batch.main.weights.sum()) == 0.0


def test_other_turn_count_is_a_mismatch(cache: CacheConfig, tiny_llava: Path) -> None:
    data = join(cache, tiny_llava)
    encoded = data.load([2])[0].encoded
    data.encoder._encoded["s002"] = dataclasses.replace(encoded, spans=encoded.spans[:1])
    with pytest.raises(CacheMismatch, match="s002 has 1 answers"):
        data.load([2])


def test_kd_refuses_another_tokenizer(cache: CacheConfig, tiny_llava: Path, tiny_qwen2_vl: Path) -> None:
    with pytest.raises(CacheMismatch, match="tokenizer"):
        join(cache, tiny_llava, stage="distill", method="kd").load([0])
    batch = join(cache, tiny_qwen2_vl, stage="distill", method="kd").batch([0, 1])
    assert batch.logit_targets is not None
    assert batch.logit_targets.topk_ids is not None
    assert batch.logit_targets.topk_ids.shape == (len(batch.student.labels), 8)


def test_boundary_row_can_be_left_out(cache: CacheConfig, tiny_llava: Path) -> None:
    data = join(cache, tiny_llava)
    samples = data.load([0, 2])

    def build(include: bool) -> Batch:
        options = {"with_answers": False, "with_recalibrator": True, "with_regularization": False}
        return collate(samples, include_boundary_row=include, **options)

    included, excluded = build(True).main, build(False).main
    assert included is not None
    assert excluded is not None
    assert torch.equal(excluded.weights, included.weights * ~included.plan.boundary_mask)
    assert int(included.plan.boundary_mask.sum()) == 3  # one turn and two turns


def test_other_numbers_of_answers_and_answers_of_other_lengths_are_refused(
    cache: CacheConfig, tiny_internvl: Path
) -> None:
    data = join(cache, tiny_internvl)
    (sample,) = [one for one in data.load(range(8)) if len(one.encoded.spans) > 1]
    (targets,) = data.cache.read([sample.encoded.sample_id])
    assert targets.answer_byte_ends is not None
    check_turns(sample.encoded, targets, same_tokens=False)
    with pytest.raises(CacheMismatch, match="has 2 answers for the student, 1 in the cache"):
        check_turns(sample.encoded, dataclasses.replace(targets, spans=targets.spans[:1]), same_tokens=False)
    longer = dataclasses.replace(targets, answer_byte_ends=targets.answer_byte_ends + 1)
    with pytest.raises(CacheMismatch, match=r"bytes for the student, .* in the cache: their texts differ"):
        check_turns(sample.encoded, longer, same_tokens=False)
