"""Losses of a stage against a dense, unpadded reference; parts; what trains."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distill.config import DistillConfig, RecalibratorOptions, StudentConfig, TrainConfig
from distill.data import JoinedData, StudentEncoder, join_cache
from distill.losses import forward_kl, topk_forward_kl
from distill.stages import StageModel, batch_counts, stage_spec
from distill.student import load_student, name_parts
from recalibrator import Recalibrator, RecalibratorConfig
from teacher_cache import open_cache
from teacher_cache.chat import load_processor
from teacher_cache.config import CacheConfig
from teacher_cache.errors import ConfigError
from teacher_cache.samples import read_samples
from tests.distill.small_cache import build_small_cache, write_data

FAMILIES = ["tiny_qwen2_vl", "tiny_internvl", "tiny_llava"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("stages")
    data = write_data(folder / "data", num_samples=5, text_only=(3,), multi_turn=(2,))
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=data, without_question_rows=("s001",))


def set_up(
    cache: CacheConfig, path: Path, *, stage: str, method: str = "genrecal", train: TrainConfig | None = None
) -> tuple[StageModel, JoinedData]:
    spec = stage_spec(stage, method=method, train=train or TrainConfig(), has_images=True)
    config = StudentConfig(name="s", model=str(path), max_length=512)
    encoder = StudentEncoder(load_processor(str(path)), config=config, memory_mib=1)
    opened = open_cache(cache.uri)
    data = join_cache(opened, read_samples(cache.data), encoder=encoder, spec=spec, max_samples=None)
    student = load_student(path, dtype="float32")
    torch.manual_seed(0)
    recalibrator = Recalibrator(
        RecalibratorConfig(student_config=student.config.get_text_config(), teacher_hidden=opened.hidden_size)
    )
    model = StageModel(spec, student=student, recalibrator=recalibrator, teacher_head=opened.teacher_head())
    return model.train(), data


def dense_reference(model: StageModel, data: JoinedData) -> dict[str, Tensor]:
    """Sum the losses sample by sample, without padding, from full logits and Hugging Face's own forward."""
    head = model.teacher_head
    sums = dict.fromkeys(("ce", "kl", "regularization", "sft"), torch.zeros(()))
    for sample in data.load(range(len(data.sample_ids))):
        regularized = data.spec.regularization_weight > 0 and sample.targets.question_hidden_states is not None
        spec = dataclasses.replace(data.spec, regularization_weight=float(regularized))
        batch = dataclasses.replace(data, spec=spec).collate([sample])
        ids = torch.from_numpy(sample.encoded.token_ids).long()[None]
        outputs = model.student(input_ids=ids, output_hidden_states=True, **sample.encoded.model_inputs)
        for start, stop in sample.encoded.spans:
            logits = outputs.logits[0, start - 1 : stop - 1]
            sums["sft"] = sums["sft"] + functional.cross_entropy(logits, ids[0, start:stop], reduction="sum")
        if batch.main is None:
            continue
        starts = [0, *(stop for _, stop in sample.encoded.spans)]
        questions = torch.cat(
            [outputs.hidden_states[-1][0, a:b] for a, (b, _) in zip(starts, sample.encoded.spans, strict=False)]
        )
        passes = {"": (batch.main, questions, "student")}
        if batch.regularization is not None:
            passes["regularization"] = (batch.regularization, batch.regularization.question_rows, "teacher")
        for name, (passed, rows, origin) in passes.items():
            out = model.recalibrator(rows, passed.answer_rows, passed.plan, questions_from=origin)
            logits, teacher = out @ head.weight.T, passed.teacher_rows @ head.weight.T
            ce = functional.cross_entropy(logits, passed.labels, reduction="sum")
            kl = forward_kl(logits, teacher).sum()
            if name:
                sums[name] = sums[name] + ce + kl
            else:
                sums["ce"], sums["kl"] = sums["ce"] + ce, sums["kl"] + kl
    return sums


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["align", "distill", "finetune"])
def test_batch_losses_equal_the_dense_reference(
    cache: CacheConfig, family: str, stage: str, request: pytest.FixtureRequest
) -> None:
    model, data = set_up(cache, request.getfixturevalue(family), stage=stage)
    batch = data.collate(data.load(range(5)))
    counts = batch_counts(batch)
    losses = model(batch=batch, counts=counts)
    reference = dense_reference(model, data)
    totals = losses.totals
    expected = torch.zeros(())
    if stage != "finetune":
        torch.testing.assert_close(totals.ce_loss, reference["ce"].detach())
        torch.testing.assert_close(totals.kl_loss, reference["kl"].detach(), rtol=1e-4, atol=1e-5)
        expected = expected + (reference["ce"] + reference["kl"]) / counts.answer_tokens
    if stage == "align":
        assert 0 < counts.regularization_tokens < counts.answer_tokens  # one sample has no question rows
        torch.testing.assert_close(totals.regularization_loss, reference["regularization"].detach())
        expected = expected + reference["regularization"] / counts.regularization_tokens
    else:
        torch.testing.assert_close(totals.sft_loss, reference["sft"].detach())
        expected = expected + reference["sft"] / counts.student_tokens
    torch.testing.assert_close(losses.loss, expected)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(losses.loss, list(trained.values()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(trained.values()), allow_unused=True)
    for name, own, other in zip(trained, ours, theirs, strict=True):
        assert own is not None, f"{name} is trained but has no gradient"
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_kd_adds_the_divergence_from_the_cached_topk(cache: CacheConfig, tiny_qwen2_vl: Path) -> None:
    model, data = set_up(cache, tiny_qwen2_vl, stage="distill", method="kd")
    batch = data.collate(data.load(range(5)))
    totals = model(batch=batch, counts=batch_counts(batch)).totals
    expected = torch.zeros(())
    for sample in data.load(range(5)):
        ids = torch.from_numpy(sample.encoded.token_ids).long()[None]
        logits = model.student(input_ids=ids, **sample.encoded.model_inputs).logits[0]
        rows = torch.cat([logits[start - 1 : stop - 1] for start, stop in sample.encoded.spans])
        expected += topk_forward_kl(rows, sample.targets.topk_ids, sample.targets.topk_logprobs).sum().detach()
    torch.testing.assert_close(totals.topk_kl_loss, expected)
    # the student is the teacher here, so only the tail bucket's rounding is left
    assert abs(float(totals.topk_kl_loss)) < 1e-3
    assert float(totals.ce_loss) == 0.0


@pytest.mark.parametrize("family", [*FAMILIES, "tiny_qwen2"])
def test_every_parameter_has_one_part(family: str, request: pytest.FixtureRequest) -> None:
    model = load_student(request.getfixturevalue(family), dtype="float32")
    parts = name_parts(model)
    assert set(parts) == {name for name, _ in model.named_parameters()}
    expected = {"body", "embeddings", "head"} | ({"vision_encoder", "projector"} if family != "tiny_qwen2" else set())
    assert set(parts.values()) == expected
    body = {name for name, part in parts.items() if part == "body"}
    assert all(".layers." in name or name.endswith(".norm.weight") for name in body)
    assert not any("vision" in name or "visual" in name for name in body)
    if family == "tiny_qwen2_vl":
        assert parts["model.visual.merger.mlp.0.weight"] == "projector"


def test_a_tied_head_belongs_to_the_embeddings(tiny_qwen2: Path, tmp_path: Path) -> None:
    model = load_student(tiny_qwen2, dtype="float32")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    tied = load_student(tmp_path, dtype="float32")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert "head" not in name_parts(tied).values()


def test_a_missing_weight_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in tiny_qwen2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny_qwen2 / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj"):
        load_student(tmp_path, dtype="float32")


TRAINED: Mapping[tuple[str, str], set[str]] = {
    ("genrecal", "align"): {"recalibrator"},
    ("genrecal", "distill"): {"body", "recalibrator"},
    ("genrecal", "finetune"): {"body", "head", "embeddings", "projector"},
    ("sft", "distill"): {"body"},
    ("sft", "finetune"): {"body", "head", "embeddings", "projector"},
    ("kd", "distill"): {"body"},
}


@pytest.mark.parametrize(("method", "stage"), list(TRAINED))
def test_trained_parts(method: str, stage: str) -> None:
    spec = stage_spec(stage, method=method, train=TrainConfig(), has_images=True)
    assert spec.trained == TRAINED[method, stage]
    text_only = stage_spec(stage, method=method, train=TrainConfig(), has_images=False)
    assert text_only.trained == TRAINED[method, stage] - {"projector"}


def test_recalibrator_can_be_frozen_in_distill() -> None:
    train = TrainConfig(distill=DistillConfig(train_recalibrator=False))
    assert stage_spec("distill", method="genrecal", train=train, has_images=True).trained == {"body"}


def test_distillation_reaches_the_students_question_rows(cache: CacheConfig, tiny_llava: Path) -> None:
    train = TrainConfig(recalibrator=RecalibratorOptions(include_boundary_row=True))
    model, data = set_up(cache, tiny_llava, stage="distill", train=train)
    batch = data.collate(data.load(range(5)))
    counts = batch_counts(batch)._replace(student_tokens=float("inf"))  # without the student's own loss
    model(batch=batch, counts=counts).loss.backward()
    body = [p for name, p in model.student.named_parameters() if name_parts(model.student)[name] == "body"]
    assert all(float(p.grad.abs().max()) > 0 for p in body)


def test_shuffled_questions_change_the_cross_entropy(cache: CacheConfig, tiny_llava: Path) -> None:
    model, data = set_up(cache, tiny_llava, stage="align")
    batch = data.collate(data.load(range(5)))
    with torch.no_grad():
        own, other = model(batch=batch, task="question_shuffle").tolist()
        totals = model(batch=batch, counts=batch_counts(batch)).totals
    assert own == pytest.approx(float(totals.ce_loss), rel=1e-5)
    assert other != own


def test_features_have_one_row_per_sample(cache: CacheConfig, tiny_llava: Path) -> None:
    model, data = set_up(cache, tiny_llava, stage="align")
    joined = data.load([0, 2, 3])
    with torch.no_grad():
        features = model(batch=data.collate(joined), task="features")
    assert {name: len(rows) for name, rows in features.items()} == dict.fromkeys(("z_s", "r_s", "z_l", "r_l"), 3)
    targets = joined[0].targets
    start = targets.spans[0].start
    question = torch.cat([targets.question_hidden_states[: start - 1], targets.hidden_states[:1]])
    torch.testing.assert_close(features["z_l"][0], question.mean(0))
