"""The reference teacher, the head read from a checkpoint, and the checks on targets."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file, save_file
from torch import Tensor

from teacher_cache.answer_scores import pack, score_logits, unpack
from teacher_cache.config import TeacherConfig
from teacher_cache.errors import ConfigError, SampleError, TeacherError
from teacher_cache.head_check import ScoredRows, check_head_agrees, head_logprobs
from teacher_cache.schema import TeacherHead, TeacherTargets
from teacher_cache.teacher import (
    TransformersTeacher,
    compute_targets,
    load_teacher_head,
    make_targets,
    processing_identity,
    teacher_identity,
)
from tests.teacher_cache.conversations import encode_all, encode_digits, text_samples


def config_of(model: Path) -> TeacherConfig:
    return TeacherConfig(model=str(model), dtype="float32")


@pytest.fixture
def copied_qwen2(tiny_qwen2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_qwen2, tmp_path / "model"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_rows_and_scores_are_those_of_the_plain_forward(tiny_qwen2_vl: Path, digit_samples: Path) -> None:
    conversations = encode_digits(tiny_qwen2_vl, digit_samples)
    found = compute_targets(
        TransformersTeacher(config_of(tiny_qwen2_vl)), conversations, topk=5, question_rows=[True] * len(conversations)
    )
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny_qwen2_vl).eval()
    for conversation, targets in zip(conversations, found, strict=True):
        with torch.inference_mode():
            ids = torch.from_numpy(conversation.token_ids).long()[None]
            plain = model(input_ids=ids, **conversation.model_inputs, output_hidden_states=True)
        rows, logprobs = plain.hidden_states[-1][0], plain.logits[0].log_softmax(-1)
        tier_a: list[int] = []
        tier_l: list[int] = []
        for start, stop in conversation.spans:
            tier_a += range(start - 1, stop)
            tier_l += range(start, stop)
        tier_q = sorted(set(range(ids.shape[1])) - set(tier_a))
        torch.testing.assert_close(targets.hidden_states, rows[tier_a])
        torch.testing.assert_close(targets.question_hidden_states, rows[tier_q])
        expected = torch.stack([logprobs[at - 1, ids[0, at]] for at in tier_l])
        torch.testing.assert_close(targets.target_logprobs, expected, atol=1e-5, rtol=1e-5)
        best = logprobs[[at - 1 for at in tier_l]].topk(5)
        torch.testing.assert_close(targets.topk_logprobs, best.values, atol=1e-5, rtol=1e-5)
        assert torch.equal(targets.topk_ids.long(), best.indices)


def test_question_rows_are_left_out_where_they_are_not_wanted(tiny_qwen2: Path) -> None:
    conversations = encode_all(tiny_qwen2, text_samples(count=2))
    first, second = compute_targets(
        TransformersTeacher(config_of(tiny_qwen2)), conversations, topk=1, question_rows=[False, True]
    )
    assert first.question_hidden_states is None
    assert second.question_hidden_states is not None


class SpreadModel:
    """A model whose inputs go to one device, here meta, while its last layer and head lie on another."""

    def __init__(self, model: Any, *, token_ids: Tensor) -> None:
        self.model = model
        self.token_ids = token_ids

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def __call__(self, *, input_ids: Tensor, use_cache: bool) -> Any:
        assert input_ids.is_meta
        return self.model(input_ids=self.token_ids[None], use_cache=use_cache)


def test_rows_of_a_model_whose_last_layer_lies_on_another_device_than_its_inputs(tiny_qwen2: Path) -> None:
    (conversation,) = encode_all(tiny_qwen2, text_samples(count=1))
    teacher = TransformersTeacher(config_of(tiny_qwen2))
    (expected,) = compute_targets(teacher, [conversation], topk=5, question_rows=[True])
    teacher.device = torch.device("meta")
    teacher.model = SpreadModel(teacher.model, token_ids=torch.from_numpy(conversation.token_ids).long())
    (found,) = compute_targets(teacher, [conversation], topk=5, question_rows=[True])
    for name in ("hidden_states", "question_hidden_states", "topk_logprobs", "logsumexp", "target_logprobs"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_logits_of_a_head_that_lies_on_another_device_than_its_rows(tiny_qwen2: Path) -> None:
    teacher = TransformersTeacher(config_of(tiny_qwen2))
    add_hook_to_module(teacher.model.lm_head, AlignDevicesHook(execution_device="meta"))
    rows, logits = teacher._forward(torch.ones(1, 4, dtype=torch.long), {}, torch.tensor([1, 2]))
    assert (rows.device.type, logits.device.type) == ("cpu", "meta")
    assert (len(rows), logits.shape) == (4, (2, teacher.vocab_size))


def test_more_topk_than_vocabulary_is_refused(tiny_qwen2: Path) -> None:
    with pytest.raises(ConfigError, match=r"targets\.topk.*320"):
        compute_targets(TransformersTeacher(config_of(tiny_qwen2)), [], topk=321, question_rows=[])


def test_incomplete_weights_are_refused(copied_qwen2: Path) -> None:
    weights = load_file(copied_qwen2 / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied_qwen2 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"layers\.1\.mlp\.up_proj"):
        TransformersTeacher(config_of(copied_qwen2))


def test_values_that_are_not_finite_blame_the_sample(tiny_qwen2: Path) -> None:
    (conversation,) = encode_all(tiny_qwen2, text_samples(count=1))
    answers = sum(span.stop - span.start for span in conversation.spans)
    scores = score_logits(torch.randn(answers, 8), target_ids=torch.zeros(answers, dtype=torch.int32), topk=2)
    rows = torch.randn(answers + 1, 4)
    rows[1, 2] = float("nan")
    with pytest.raises(SampleError) as caught:
        make_targets(conversation, rows=rows, scores=scores, with_question=False)
    assert (caught.value.sample_id, caught.value.reason) == ("text-0", "not-finite")


def test_head_is_read_from_the_checkpoint(tiny_qwen2_vl: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny_qwen2_vl)
    head = load_teacher_head(TeacherConfig(model=str(tiny_qwen2_vl), dtype="bfloat16"))
    assert torch.equal(head.weight, model.get_output_embeddings().weight.to(torch.bfloat16))
    assert head.logit_softcap is None


def test_tied_head_scale_and_softcap_are_read(copied_qwen2: Path) -> None:
    weights = load_file(copied_qwen2 / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, copied_qwen2 / "model.safetensors", metadata={"format": "pt"})
    edit_json(copied_qwen2 / "config.json", tie_word_embeddings=True, logits_scaling=4.0, final_logit_softcapping=30.0)
    head = load_teacher_head(config_of(copied_qwen2))
    assert torch.equal(head.weight, weights["model.embed_tokens.weight"])
    assert (head.logit_scale, head.logit_softcap) == (0.25, 30.0)


def test_remote_code_is_refused_unless_trusted(copied_qwen2: Path) -> None:
    edit_json(copied_qwen2 / "config.json", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(ConfigError, match="trust_remote_code"):
        teacher_identity(config_of(copied_qwen2))
    teacher_identity(TeacherConfig(model=str(copied_qwen2), trust_remote_code=True))


def test_identity_follows_content_and_nothing_else(copied_qwen2: Path) -> None:
    config = config_of(copied_qwen2)
    teacher, processing = teacher_identity(config), processing_identity(config)
    edit_json(copied_qwen2 / "config.json", transformers_version="0.0")
    (copied_qwen2 / "README.md").write_text("a note")
    assert teacher_identity(config) == teacher
    assert teacher_identity(config.model_copy(update={"dtype": "bfloat16"})) != teacher

    (copied_qwen2 / "chat_template.jinja").write_text("{{ messages }}")
    changed = processing_identity(config)
    assert {name for name in changed if changed[name] != processing[name]} == {"chat_template"}

    weights = load_file(copied_qwen2 / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1.0
    save_file(weights, copied_qwen2 / "model.safetensors", metadata={"format": "pt"})
    changed = teacher_identity(config)
    assert {name for name in changed if changed[name] != teacher[name]} == {"weights"}


def test_head_check_accepts_own_rows_and_catches_rows_off_by_one(tiny_qwen2: Path) -> None:
    config = config_of(tiny_qwen2)
    head = load_teacher_head(config)
    conversations = encode_all(tiny_qwen2, text_samples())
    found = compute_targets(TransformersTeacher(config), conversations, topk=2, question_rows=[False] * 6)

    def difference(samples: list[TeacherTargets]) -> float:
        return check_head_agrees([ScoredRows.of(sample, count=3) for sample in samples], head=head)

    assert difference(found) < 1e-4
    shifted = [dataclasses.replace(sample, hidden_states=sample.hidden_states.roll(1, dims=0)) for sample in found]
    with pytest.raises(TeacherError, match="output head"):
        difference(shifted)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_head_logprobs_equal_a_full_log_softmax(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.head_check.HEAD_CHECK_VOCAB", 7)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(23, 5, generator=generator), torch.randn(23, generator=generator)
    rows, ids = torch.randn(11, 5, generator=generator), torch.randint(23, (11,), generator=generator)
    head = TeacherHead(weight=weight, bias=bias, logit_scale=0.5, logit_softcap=softcap)
    logits = 0.5 * (rows @ weight.T + bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(head_logprobs(rows, target_ids=ids, head=head), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_targets_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 5).to(dtype)
    scores = score_logits(torch.randn(2, 9), target_ids=torch.tensor([4, 8]), topk=3)
    sizes: dict[str, Any] = {"num_rows": 3, "hidden_size": 5, "dtype": dtype, "num_answers": 2, "topk": 3}
    found_rows, found = unpack(pack(rows, scores), **sizes)
    assert torch.equal(found_rows, rows)
    for field in dataclasses.fields(scores):
        assert torch.equal(getattr(found, field.name), getattr(scores, field.name))
    with pytest.raises(ValueError, match="bytes of targets"):
        unpack(pack(rows, scores), **sizes | {"topk": 2})
