"""Losses of a stage against a dense, unpadded reference; parts; what trains."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distill import linear_losses
from distill.config import (
    AlignConfig,
    BaselineOptions,
    DistillConfig,
    RecalibratorOptions,
    StudentConfig,
    TrainConfig,
)
from distill.data import JoinedData, StudentEncoder, join_cache
from distill.joined_sample import JoinedSample
from distill.losses import forward_kl, jensen_shannon, reverse_kl
from distill.metrics import loss_metrics
from distill.stage_spec import stage_spec
from distill.stage_sums import batch_counts
from distill.stages import StageModel
from distill.student import load_student, name_parts
from distill.uld import aligned_uld_loss, span_scale, topk_distance
from recalibrator import Recalibrator, RecalibratorConfig
from recalibrator import module as recalibrator_module
from recalibrator.joint_sequence import split_tier_a
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
        spec = data.spec.with_regularization(float(regularized))
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


def perturbed(model: StageModel) -> StageModel:
    """Move the student away from the teacher, whose own weights it may have."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def student_logits(model: StageModel, sample: JoinedSample) -> Tensor:
    """Return the logits that predict the answer tokens, from Hugging Face's own forward."""
    ids = torch.from_numpy(sample.encoded.token_ids).long()[None]
    logits = model.student(input_ids=ids, **sample.encoded.model_inputs).logits[0]
    return torch.cat([logits[start - 1 : stop - 1] for start, stop in sample.encoded.spans])


def teacher_logits(model: StageModel, sample: JoinedSample) -> Tensor:
    targets = sample.targets
    index = split_tier_a([stop - start for start, stop in targets.spans]).predicting
    return targets.hidden_states[index] @ model.teacher_head.weight.T


def compare_gradients(model: StageModel, loss: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, trained)
    theirs = torch.autograd.grad(expected, trained)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=2e-6)


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jensen_shannon": jensen_shannon}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("source", "temperature"), [("topk", 1.0), ("rows", 1.0), ("rows", 2.0)])
def test_kd_adds_the_divergence_from_the_teacher(
    cache: CacheConfig, tiny_qwen2_vl: Path, divergence: str, source: str, temperature: float
) -> None:
    options = BaselineOptions(divergence=divergence, source=source, temperature=temperature, weight=0.5)
    model, data = set_up(cache, tiny_qwen2_vl, stage="distill", method="kd", train=TrainConfig(baselines=options))
    batch = data.collate(data.load(range(5)))
    counts = batch_counts(batch)
    losses = perturbed(model)(batch=batch, counts=counts)
    assert (model.teacher_head is None) == (source == "topk")
    expected = torch.zeros(())
    for sample in data.load(range(5)):
        logits = student_logits(model, sample)
        if source == "topk":
            both = bucketed(logits, sample.targets.topk_ids, sample.targets.topk_logprobs)
        else:
            both = logits / temperature, teacher_logits(model, sample) / temperature
        expected = expected + DIVERGENCES[divergence](*both).sum()
    torch.testing.assert_close(losses.totals.baseline_loss, expected.detach(), rtol=1e-4, atol=1e-5)
    assert losses.totals.baseline_loss > 0.01
    assert float(losses.totals.ce_loss) == 0.0
    sft = sum(
        functional.cross_entropy(student_logits(model, sample), answer_ids(sample), reduction="sum")
        for sample in data.load(range(5))
    )
    compare_gradients(model, losses.loss, (sft + 0.5 * expected) / counts.student_tokens)


def answer_ids(sample: JoinedSample) -> Tensor:
    ids = torch.from_numpy(sample.encoded.token_ids).long()
    return torch.cat([ids[start:stop] for start, stop in sample.encoded.spans])


def bucketed(logits: Tensor, topk_ids: Tensor, topk_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the top-k and of everything else, student and teacher."""
    own = logits.log_softmax(-1).gather(-1, topk_ids.long())
    with_rest = [torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (own, topk_logprobs)]
    return with_rest[0], with_rest[1]


@pytest.mark.parametrize(("source", "temperature"), [("topk", 1.0), ("rows", 1.0), ("rows", 2.0)])
def test_uld_adds_the_distance_over_aligned_spans(
    cache: CacheConfig, tiny_llava: Path, source: str, temperature: float
) -> None:
    options = BaselineOptions(source=source, temperature=temperature)
    model, data = set_up(cache, tiny_llava, stage="distill", method="uld", train=TrainConfig(baselines=options))
    samples = data.load(range(5))
    filler = dataclasses.replace(samples[0], weight=0.0)
    batch = data.collate([*samples, filler])
    counts = batch_counts(batch)
    losses = model(batch=batch, counts=counts)
    expected, sft, spans = torch.zeros(()), torch.zeros(()), 0
    for sample in samples:
        logits, alone = student_logits(model, sample), data.collate([sample]).logit_targets
        sft = sft + functional.cross_entropy(logits, answer_ids(sample), reduction="sum")
        spans += len(alone.spans.student.base)
        if source == "rows":
            distances = aligned_uld_loss(
                logits,
                teacher_logits(model, sample),
                student_ids=answer_ids(sample),
                teacher_ids=alone.labels,
                spans=alone.spans,
                temperature=temperature,
            )
        else:
            student, teacher = alone.spans.student, alone.spans.teacher
            logprobs = logits.log_softmax(-1).gather(-1, answer_ids(sample)[:, None])[:, 0]
            scale = span_scale(logprobs[student.others], student)
            teacher_scale = span_scale(sample.targets.target_logprobs[teacher.others], teacher)
            distances = topk_distance(
                logits.softmax(-1)[student.base] * scale[:, None],
                student_mass=scale,
                topk=sample.targets.topk_logprobs.exp()[teacher.base] * teacher_scale[:, None],
                teacher_mass=teacher_scale,
            )
        expected = expected + distances.sum()
    assert any(len(data.collate([sample]).logit_targets.spans.teacher.others) for sample in samples)
    assert counts.baseline_terms == spans
    torch.testing.assert_close(losses.totals.baseline_loss, expected.detach(), rtol=1e-5, atol=1e-6)
    compare_gradients(model, losses.loss, sft / counts.student_tokens + expected / spans)


def test_uld_at_a_temperature_needs_the_rows() -> None:
    train = TrainConfig(baselines=BaselineOptions(temperature=2.0))
    with pytest.raises(ConfigError, match=r"temperature 2.0.*source to rows"):
        stage_spec("distill", method="uld", train=train, has_images=True)
    assert stage_spec("distill", method="kd", train=train, has_images=True).baseline == "kd"


@pytest.mark.parametrize("form", ["none", "feature_mse", "kl", "ce", "ce_kl"])
def test_regularization_forms(cache: CacheConfig, tiny_llava: Path, form: str) -> None:
    train = TrainConfig(align=AlignConfig(regularization_form=form))
    model, data = set_up(cache, tiny_llava, stage="align", train=train)
    batch = data.collate(data.load(range(5)))
    with torch.no_grad():
        totals = model(batch=batch, counts=batch_counts(batch)).totals
    if form == "none":
        assert data.spec.tiers == ("A",)
        assert batch.regularization is None
        assert float(totals.regularization_loss) == 0.0
        return
    passed, head = batch.regularization, model.teacher_head
    with torch.no_grad():
        rows = model.recalibrator(passed.question_rows, passed.answer_rows, passed.plan, questions_from="teacher")
    logits = rows @ head.weight.T
    terms = {
        "feature_mse": (rows - passed.teacher_rows).square().mean(-1).sum(),
        "kl": forward_kl(logits, passed.teacher_rows @ head.weight.T).sum(),
        "ce": functional.cross_entropy(logits, passed.labels, reduction="sum"),
    }
    expected = terms["kl"] + terms["ce"] if form == "ce_kl" else terms[form]
    torch.testing.assert_close(totals.regularization_loss, expected, rtol=1e-4, atol=1e-5)


def test_each_term_has_a_weight_and_the_log_adds_them_up(cache: CacheConfig, tiny_llava: Path) -> None:
    config = DistillConfig(ce_weight=0.0, kl_weight=0.5, sft_weight=3.0, regularization_weight=0.25)
    model, data = set_up(cache, tiny_llava, stage="distill", train=TrainConfig(distill=config))
    batch = data.collate(data.load(range(5)))
    counts = batch_counts(batch)
    losses = model(batch=batch, counts=counts)
    totals = losses.totals
    expected = 0.5 * totals.kl_loss / counts.answer_tokens + 3 * totals.sft_loss / counts.student_tokens
    expected = expected + 0.25 * totals.regularization_loss / counts.regularization_tokens
    torch.testing.assert_close(losses.loss.detach(), expected)
    sums = {name: float(total) for name, total in totals._asdict().items()}
    assert loss_metrics(sums, counts, spec=data.spec)["train/loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("align", "passes"),
    [
        (AlignConfig(), 2),
        (AlignConfig(ce_weight=0.7, kl_weight=0.3), 2),
        (AlignConfig(ce_weight=0.0, regularization_form="kl"), 2),
        (AlignConfig(kl_weight=0.0, regularization_form="ce"), 2),
        (AlignConfig(regularization_form="feature_mse"), 1),
    ],
)
def test_logits_are_made_once_whatever_the_weights(
    cache: CacheConfig, tiny_llava: Path, align: AlignConfig, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = set_up(cache, tiny_llava, stage="align", train=TrainConfig(align=align))
    batch = data.collate(data.load(range(5)))
    made = []
    run = linear_losses._run
    monkeypatch.setattr(
        linear_losses, "_run", lambda rows, *args, **kw: made.append(len(rows)) or run(rows, *args, **kw)
    )
    losses = model(batch=batch, counts=batch_counts(batch))
    losses.loss.backward()
    assert len(made) == passes
    assert losses.totals.ce_loss > 0
    assert losses.totals.kl_loss > 0


@pytest.mark.parametrize(
    ("side", "refusal"),
    [
        ("question_rows", "question rows are not finite, questions from the teacher"),
        ("tier_a", "answer rows are not finite, questions from the teacher"),
    ],
)
def test_rows_that_are_not_finite_are_told_of_and_looked_at_once(
    cache: CacheConfig, tiny_llava: Path, side: str, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = set_up(cache, tiny_llava, stage="align")
    batch = data.collate(data.load(range(5)))

    def again(*_: object) -> None:
        raise AssertionError("looked at again")

    monkeypatch.setattr(recalibrator_module, "_check_finite", again)
    assert model(batch=batch, counts=batch_counts(batch)).loss.isfinite()
    assert model.refusals == []
    rows = getattr(batch.regularization, side).clone()
    rows[2, 1] = float("nan")
    changed = dataclasses.replace(batch.regularization, **{side: rows})
    losses = model(batch=dataclasses.replace(batch, regularization=changed), counts=batch_counts(batch))
    assert losses.loss.isnan()
    assert losses.totals.ce_loss.isfinite()
    assert model.refusals[0] == refusal


TIERS = {
    ("genrecal", "align"): (TrainConfig(), ("A", "Q")),
    ("genrecal", "distill"): (TrainConfig(), ("A",)),
    ("sft", "distill"): (TrainConfig(), ()),
    ("kd", "distill"): (TrainConfig(), ("A", "L")),
    ("kd", "finetune"): (TrainConfig(), ()),
    ("uld", "distill"): (TrainConfig(), ("A", "L")),
}


def test_only_the_tiers_that_are_needed_are_read() -> None:
    for (method, stage), (train, tiers) in TIERS.items():
        assert stage_spec(stage, method=method, train=train, has_images=True).tiers == tiers
    exact = TrainConfig(baselines=BaselineOptions(source="rows"))
    assert stage_spec("distill", method="kd", train=exact, has_images=True).tiers == ("A",)
    assert stage_spec("distill", method="uld", train=exact, has_images=True).tiers == ("A", "L")
    closed = TrainConfig(recalibrator=RecalibratorOptions(student_answer_fraction=1.0))
    assert stage_spec("align", method="genrecal", train=closed, has_images=True).tiers == ("A", "Q", "L")
    assert stage_spec("distill", method="sft", train=closed, has_images=True).tiers == ()


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
    ("uld", "distill"): {"body"},
    ("uld", "finetune"): {"body", "head", "embeddings", "projector"},
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
        sums = model(batch=batch, task="question_shuffle")
        totals = model(batch=batch, counts=batch_counts(batch)).totals
    torch.testing.assert_close(sums.own, totals.ce_loss)
    torch.testing.assert_close(sums.own_boundary, totals.boundary_ce)
    assert sums.other != sums.own
    assert sums.other_boundary != sums.own_boundary


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
