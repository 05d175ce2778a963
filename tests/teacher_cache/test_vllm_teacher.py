"""vLLM against the plain transformers forward: the same rows and the same answer scores."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from teacher_cache.config import BuildConfig, Dtype, TeacherConfig
from teacher_cache.errors import SampleError, TeacherError
from teacher_cache.head_check import ScoredRows, check_head_agrees
from teacher_cache.schema import EncodedConversation, TeacherTargets
from teacher_cache.teacher import TransformersTeacher, compute_targets, load_teacher_head
from teacher_cache.vllm_plugin import PREFIX, register_class
from teacher_cache.vllm_teacher import VllmTeacher, engine_arguments, engine_environment
from tests.teacher_cache.conversations import MAX_LENGTH, encode_all, encode_digits, text_samples

TOPK = 8
FLOAT32_TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 0.1


def start(model: Path, *, dtype: Dtype, max_batched_tokens: int = MAX_LENGTH) -> VllmTeacher:
    build = BuildConfig(max_batched_tokens=max_batched_tokens, kv_cache_gib=0.0625)
    return VllmTeacher(TeacherConfig(model=str(model), dtype=dtype), build=build, max_length=MAX_LENGTH)


def largest_difference(left: TeacherTargets, right: TeacherTargets) -> float:
    pairs = [
        (getattr(left, name), getattr(right, name))
        for name in ("hidden_states", "question_hidden_states", "topk_logprobs", "logsumexp", "target_logprobs")
    ]
    assert all((a is None) == (b is None) for a, b in pairs)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs if a is not None)


def assert_agrees(
    teacher: VllmTeacher, conversations: list[EncodedConversation], *, model: Path, dtype: Dtype, tolerance: float
) -> None:
    config = TeacherConfig(model=str(model), dtype=dtype)
    wanted = [index % 2 == 0 for index in range(len(conversations))]
    found = compute_targets(teacher, conversations, topk=TOPK, question_rows=wanted)
    expected = compute_targets(TransformersTeacher(config), conversations, topk=TOPK, question_rows=wanted)
    difference = max(largest_difference(left, right) for left, right in zip(found, expected, strict=True))
    print(f"{model.parent.name} {dtype}: largest difference from transformers {difference:.2e}")
    assert difference <= tolerance
    assert all(sample.hidden_states.dtype == getattr(torch, dtype) for sample in found)
    if dtype == "float32":
        assert all(torch.equal(left.topk_ids, right.topk_ids) for left, right in zip(found, expected, strict=True))
    rows = [ScoredRows.of(sample, count=100) for sample in found]
    assert check_head_agrees(rows, head=load_teacher_head(config)) <= 1e-4


@pytest.fixture(scope="module")
def chunking_qwen2_vl(tiny_qwen2_vl: Path) -> Iterator[VllmTeacher]:
    """An engine that must cut every one of our prompts into several steps."""
    teacher = start(tiny_qwen2_vl, dtype="float32", max_batched_tokens=32)
    yield teacher
    teacher.close()


def test_qwen2_vl_agrees_over_chunked_prefill(
    chunking_qwen2_vl: VllmTeacher, tiny_qwen2_vl: Path, digit_samples: Path
) -> None:
    conversations = encode_digits(tiny_qwen2_vl, digit_samples, count=12)
    assert min(len(conversation.token_ids) for conversation in conversations) > 32
    assert_agrees(chunking_qwen2_vl, conversations, model=tiny_qwen2_vl, dtype="float32", tolerance=FLOAT32_TOLERANCE)


def test_batch_mates_do_not_change_a_sample(
    chunking_qwen2_vl: VllmTeacher, tiny_qwen2_vl: Path, digit_samples: Path
) -> None:
    conversations = encode_digits(tiny_qwen2_vl, digit_samples)
    together = compute_targets(chunking_qwen2_vl, conversations, topk=TOPK, question_rows=[True] * 6)
    for conversation, sample in zip(conversations, together, strict=True):
        (alone,) = compute_targets(chunking_qwen2_vl, [conversation], topk=TOPK, question_rows=[True])
        assert largest_difference(alone, sample) <= 1e-5


def test_a_prompt_given_already_expanded_is_caught(
    chunking_qwen2_vl: VllmTeacher, tiny_qwen2_vl: Path, digit_samples: Path
) -> None:
    (conversation,) = encode_digits(tiny_qwen2_vl, digit_samples, count=1)
    expanded = dataclasses.replace(conversation, prompt_token_ids=tuple(conversation.token_ids.tolist()))
    with pytest.raises(TeacherError, match="one placeholder per image"):
        compute_targets(chunking_qwen2_vl, [expanded], topk=TOPK, question_rows=[True])


def test_a_prompt_that_the_engine_refuses_costs_one_sample(
    chunking_qwen2_vl: VllmTeacher, tiny_qwen2_vl: Path, digit_samples: Path
) -> None:
    good, bad = encode_digits(tiny_qwen2_vl, digit_samples, count=2)
    bad = dataclasses.replace(bad, prompt_token_ids=(1,) * (MAX_LENGTH + 1))
    with pytest.raises(SampleError) as caught:
        compute_targets(chunking_qwen2_vl, [good, bad], topk=TOPK, question_rows=[True, True])
    assert (caught.value.sample_id, caught.value.reason) == (bad.sample_id, "engine-refused")
    assert len(compute_targets(chunking_qwen2_vl, [good], topk=TOPK, question_rows=[True])) == 1


def test_internvl_agrees(tiny_internvl: Path, digit_samples: Path) -> None:
    teacher = start(tiny_internvl, dtype="float32")
    conversations = encode_digits(tiny_internvl, digit_samples)
    assert_agrees(teacher, conversations, model=tiny_internvl, dtype="float32", tolerance=FLOAT32_TOLERANCE)
    teacher.close()


def test_text_only_qwen2_agrees(tiny_qwen2: Path) -> None:
    teacher = start(tiny_qwen2, dtype="float32")
    conversations = encode_all(tiny_qwen2, text_samples())
    assert_agrees(teacher, conversations, model=tiny_qwen2, dtype="float32", tolerance=FLOAT32_TOLERANCE)
    teacher.close()


def test_bfloat16_rows_keep_their_type(tiny_qwen2_vl: Path, digit_samples: Path) -> None:
    teacher = start(tiny_qwen2_vl, dtype="bfloat16")
    conversations = encode_digits(tiny_qwen2_vl, digit_samples)
    assert_agrees(teacher, conversations, model=tiny_qwen2_vl, dtype="bfloat16", tolerance=BFLOAT16_TOLERANCE)
    teacher.close()


@pytest.mark.parametrize(("tensor", "pipeline", "backend"), [(1, 1, None), (8, 1, "mp"), (1, 4, "mp"), (4, 2, "mp")])
def test_the_engine_gets_all_that_ray_reserves_gpus_for(
    tensor: int, pipeline: int, backend: str | None, tiny_qwen2: Path
) -> None:
    build = BuildConfig(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    config = TeacherConfig(model=str(tiny_qwen2))
    arguments = engine_arguments(config, directory=tiny_qwen2, build=build, max_length=MAX_LENGTH, on_cuda=True)
    assert (arguments["tensor_parallel_size"], arguments["pipeline_parallel_size"]) == (tensor, pipeline)
    assert arguments["distributed_executor_backend"] == backend


def test_on_a_gpu_the_engine_is_spawned(monkeypatch: pytest.MonkeyPatch, tiny_qwen2: Path) -> None:
    from vllm.utils.system_utils import get_mp_context

    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    assert get_mp_context().get_start_method() == "fork"
    for name, value in engine_environment(model=str(tiny_qwen2), on_cuda=True).items():
        monkeypatch.setenv(name, value)
    assert get_mp_context().get_start_method() == "spawn"


def test_a_registered_class_is_inspected_in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm import ModelRegistry

    def refuse(_: object) -> None:
        raise AssertionError("another process was started")

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr("vllm.model_executor.models.registry._run_in_subprocess", refuse)
    register_class("Qwen2ForCausalLM")
    assert ModelRegistry.models[PREFIX + "Qwen2ForCausalLM"].inspect_model_cls().is_pooling_model
    with pytest.raises(AssertionError, match="another process"):
        ModelRegistry.models[PREFIX + "OlmoeForCausalLM"].inspect_model_cls()


def test_an_architecture_that_vllm_does_not_know_is_named(tiny_qwen2: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_qwen2.iterdir():
        (model / file.name).symlink_to(file)
    (model / "config.json").unlink()
    config = json.loads((tiny_qwen2 / "config.json").read_text()) | {"architectures": ["UnheardOfForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(TeacherError, match="UnheardOfForCausalLM"):
        start(model, dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_workers_in_processes_of_their_own_agree(
    parallel: str, tiny_qwen2_vl: Path, digit_samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    build = BuildConfig.model_validate({parallel: 2, "max_batched_tokens": MAX_LENGTH, "kv_cache_gib": 0.0625})
    config = TeacherConfig(model=str(tiny_qwen2_vl), dtype="float32")
    teacher = VllmTeacher(config, build=build, max_length=MAX_LENGTH)
    conversations = encode_digits(tiny_qwen2_vl, digit_samples)
    assert_agrees(teacher, conversations, model=tiny_qwen2_vl, dtype="float32", tolerance=FLOAT32_TOLERANCE)
    core = teacher._llm.llm_engine.engine_core
    teacher.close()
    assert core.ctx.closed, "left to the garbage collector, it warns in whichever test runs then"
