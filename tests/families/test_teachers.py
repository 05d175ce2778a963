"""Every family as a teacher in vLLM, against the plain transformers forward."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teacher_cache.config import BuildConfig, Dtype, TeacherConfig
from teacher_cache.errors import TeacherError
from teacher_cache.head_check import ScoredRows, check_head_agrees
from teacher_cache.schema import EncodedConversation, TeacherTargets
from teacher_cache.teacher import TransformersTeacher, compute_targets, load_teacher_head
from teacher_cache.vllm_teacher import VllmTeacher
from tests.families.conftest import Directories
from tests.families.models import FAMILIES, HEADS, write_family
from tests.families.samples import MAX_LENGTH, encode, samples_of

RELATIVE_TOLERANCE = 1e-5
LOGPROB_TOLERANCE = 1e-4
BFLOAT16_EXCESS = 1.1
"""Both engines round as often, in another order: neither can be the nearer one for every family."""
TOPK = 8


@dataclass(frozen=True, kw_only=True)
class Computed:
    """One family's targets from both engines."""

    name: str
    path: Path
    found: Sequence[TeacherTargets]
    expected: Sequence[TeacherTargets]


def compute_with_vllm(
    path: Path, conversations: Sequence[EncodedConversation], *, dtype: Dtype
) -> list[TeacherTargets]:
    build = BuildConfig(max_batched_tokens=MAX_LENGTH, kv_cache_gib=0.0625)
    teacher = VllmTeacher(TeacherConfig(model=str(path), dtype=dtype), build=build, max_length=MAX_LENGTH)
    found = compute_targets(teacher, conversations, topk=TOPK, question_rows=[True] * len(conversations))
    teacher.close()
    return found


def compute_with_transformers(
    path: Path, conversations: Sequence[EncodedConversation], *, dtype: Dtype
) -> list[TeacherTargets]:
    teacher = TransformersTeacher(TeacherConfig(model=str(path), dtype=dtype))
    return compute_targets(teacher, conversations, topk=TOPK, question_rows=[True] * len(conversations))


def all_rows(targets: TeacherTargets) -> Tensor:
    assert targets.question_hidden_states is not None
    return torch.cat([targets.hidden_states, targets.question_hidden_states]).float()


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(
    scope="module",
    params=[*FAMILIES, *(pytest.param(name, marks=pytest.mark.nightly) for name in HEADS)],
)
def computed(request: pytest.FixtureRequest, directories: Directories) -> Computed:
    path = directories(request.param)
    conversations = encode(path, samples_of((FAMILIES | HEADS)[request.param]))
    return Computed(
        name=request.param,
        path=path,
        found=compute_with_vllm(path, conversations, dtype="float32"),
        expected=compute_with_transformers(path, conversations, dtype="float32"),
    )


@pytest.mark.slow
def test_rows_agree_with_transformers(computed: Computed) -> None:
    differences = {
        found.sample_id: relative_difference(all_rows(found), all_rows(expected))
        for found, expected in zip(computed.found, computed.expected, strict=True)
    }
    print(f"FAMILY: {computed.name}: largest relative difference of vLLM's rows {max(differences.values()):.1e}")
    assert max(differences.values()) < RELATIVE_TOLERANCE, differences


@pytest.mark.slow
def test_answer_scores_agree_with_transformers(computed: Computed) -> None:
    rows = clear = 0
    for found, expected in zip(computed.found, computed.expected, strict=True):
        for name in ("topk_logprobs", "logsumexp", "target_logprobs"):
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), atol=LOGPROB_TOLERANCE, rtol=LOGPROB_TOLERANCE
            )
        assert expected.topk_logprobs is not None
        assert expected.topk_ids is not None
        assert found.topk_ids is not None
        apart = expected.topk_logprobs[:, 0] - expected.topk_logprobs[:, 1] > LOGPROB_TOLERANCE
        assert torch.equal(found.topk_ids[apart, 0], expected.topk_ids[apart, 0])
        rows, clear = rows + len(apart), clear + int(apart.sum())
    assert clear >= 0.9 * rows


@pytest.mark.slow
def test_the_stored_head_gives_the_engines_own_scores(computed: Computed) -> None:
    head = load_teacher_head(TeacherConfig(model=str(computed.path), dtype="float32"))
    difference = check_head_agrees([ScoredRows.of(sample, count=100) for sample in computed.found], head=head)
    print(f"FAMILY: {computed.name}: largest difference through the stored head {difference:.1e} nats")
    assert difference <= LOGPROB_TOLERANCE


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*FAMILIES, *HEADS])
def test_bfloat16_is_as_near_to_float32_as_in_transformers(name: str, directories: Directories) -> None:
    path = directories(name)
    conversations = encode(path, samples_of((FAMILIES | HEADS)[name]))
    exact = torch.cat([all_rows(t) for t in compute_with_transformers(path, conversations, dtype="float32")])
    engines = {"vLLM": compute_with_vllm, "transformers": compute_with_transformers}
    found = {
        engine: relative_difference(
            torch.cat([all_rows(targets) for targets in compute(path, conversations, dtype="bfloat16")]), exact
        )
        for engine, compute in engines.items()
    }
    print(
        f"FAMILY: {name}: bfloat16 against float32: " + ", ".join(f"{key} {value:.2e}" for key, value in found.items())
    )
    assert found["vLLM"] <= BFLOAT16_EXCESS * found["transformers"]


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.published_name])
def test_vllm_misses_weights_that_are_not_named_as_published(name: str, tmp_path: Path) -> None:
    write_family(dataclasses.replace(FAMILIES[name], published_name=None), tmp_path)
    conversations = encode(tmp_path, samples_of(FAMILIES[name]))
    with pytest.raises(TeacherError, match=r"no module or parameter named 'vision_tower\.embeddings'"):
        compute_with_vllm(tmp_path, conversations, dtype="float32")
