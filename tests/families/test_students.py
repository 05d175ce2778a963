"""Every family as a student: names of its parts, padded batches, the Recalibrator's blocks, a step of two stages."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from distill.batch import collate
from distill.config import StudentConfig, TrainConfig
from distill.encoder import StudentEncoder
from distill.joined_sample import JoinedSample
from distill.stage_spec import stage_spec
from distill.stages import StageModel
from distill.student import last_hidden_state, load_student, name_parts
from distill.trainer import train_student
from recalibrator import Recalibrator, RecalibratorConfig
from teacher_cache.config import CacheConfig, TeacherConfig
from teacher_cache.schema import TeacherHead
from teacher_cache.teacher import TransformersTeacher
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import STAGE, read_metrics, student_config, train_config
from tests.families.conftest import Directories
from tests.families.models import FAMILIES, HEADS, LARGE, SMALL
from tests.families.samples import encode, samples_of

QWEN_PARTS = {
    "model.visual.": "vision_encoder",
    "model.visual.merger.": "projector",
    "model.visual.deepstack_merger_list.": "projector",
}
TOWER_PARTS = {
    "model.vision_tower.": "vision_encoder",
    "model.multi_modal_projector.": "projector",
    "model.image_newline": "projector",
}
BODY_PARTS = {"layers.": "body", "norm.": "body", "embed_tokens.": "embeddings"}
TRAINED = {
    "align": {"recalibrator"},
    "distill": {"recalibrator", "body"},
    "finetune": {"body", "head", "embeddings", "projector"},
}


def expected_part(name: str, *, has_images: bool) -> str:
    """The part by the longest prefix of its name."""
    body = "model.language_model." if has_images else "model."
    prefixes = {"lm_head.": "head", **{body + name: part for name, part in BODY_PARTS.items()}}
    if has_images:
        prefixes |= QWEN_PARTS | TOWER_PARTS
    return prefixes[max((prefix for prefix in prefixes if name.startswith(prefix)), key=len)]


def stored_names(path: Path) -> set[str]:
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_have_the_familys_names(name: str, directories: Directories) -> None:
    has_images = FAMILIES[name].has_images
    parts = name_parts(load_student(directories(name), dtype="float32"))
    assert parts == {parameter: expected_part(parameter, has_images=has_images) for parameter in parts}
    images = {"vision_encoder", "projector"} if has_images else set()
    assert set(parts.values()) == {"body", "embeddings", "head"} | images


@pytest.mark.parametrize("name", FAMILIES)
def test_each_stage_trains_its_parts_only(name: str, directories: Directories) -> None:
    student = load_student(directories(name), dtype="float32")
    text = student.config.get_text_config()
    recalibrator = Recalibrator(RecalibratorConfig(student_config=text, teacher_hidden=48))
    head = TeacherHead(weight=torch.zeros(8, 48), bias=None, logit_scale=1.0, logit_softcap=None)
    assert {type(block) for block in recalibrator.blocks} == {type(student.get_decoder().layers[0])}
    for stage, trained in TRAINED.items():
        spec = stage_spec(stage, method="genrecal", train=TrainConfig(), has_images=FAMILIES[name].has_images)
        model = StageModel(spec, student=student, recalibrator=recalibrator, teacher_head=head)
        for parameter, tensor in model.student.named_parameters():
            part = expected_part(parameter, has_images=FAMILIES[name].has_images)
            assert tensor.requires_grad == (part in trained), f"{stage}: {parameter}"
        if model.recalibrator is not None:
            assert all(tensor.requires_grad for tensor in model.recalibrator.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_in_a_padded_batch_equals_the_sample_alone(name: str, directories: Directories) -> None:
    student = load_student(directories(name), dtype="float32").eval()
    conversations = encode(directories(name), samples_of(FAMILIES[name]))
    batch = collate(
        [JoinedSample(encoded=conversation, targets=None) for conversation in conversations],
        with_answers=True,
        with_recalibrator=False,
        with_regularization=False,
        include_boundary_row=True,
    ).student
    with torch.inference_mode():
        together = last_hidden_state(
            student, batch.input_ids, attention_mask=batch.attention_mask, model_inputs=batch.model_inputs
        )
        for row, conversation in zip(together, conversations, strict=True):
            ids = torch.from_numpy(conversation.token_ids).long()[None]
            alone = student.base_model(input_ids=ids, **conversation.model_inputs).last_hidden_state[0]
            torch.testing.assert_close(row[: len(alone)], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_images])
def test_images_in_the_students_dtype_are_what_it_makes_of_them(name: str, directories: Directories) -> None:
    student = load_student(directories(name), dtype="bfloat16").eval()
    conversation = encode(directories(name), samples_of(FAMILIES[name]))[0]
    encoder = StudentEncoder(None, config=StudentConfig(name="a", model=str(directories(name))), memory_mib=0)
    ids = torch.from_numpy(conversation.token_ids).long()[None]
    with torch.inference_mode():
        as_processed = student.base_model(input_ids=ids, **conversation.model_inputs).last_hidden_state
        cast = {key: encoder.in_dtype(value) for key, value in conversation.model_inputs.items()}
        assert any(value.dtype == torch.bfloat16 for value in cast.values())
        assert torch.equal(student.base_model(input_ids=ids, **cast).last_hidden_state, as_processed)


def test_a_soft_cap_on_attention_scores_takes_effect(directories: Directories, tmp_path: Path) -> None:
    path = Path(shutil.copytree(directories("gemma2"), tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": 0.1}))
    (conversation,) = encode(path, samples_of(HEADS["gemma2"])[:1])
    ids = torch.from_numpy(conversation.token_ids).long()[None]
    rows = []
    for model in (directories("gemma2"), path):
        student = load_student(model, dtype="float32").eval()
        teacher = TransformersTeacher(TeacherConfig(model=str(model), dtype="float32")).model
        with torch.inference_mode():
            both = [each.base_model(input_ids=ids).last_hidden_state for each in (student, teacher)]
        assert torch.equal(*both)
        rows.append(both[0])
    assert float((rows[0] - rows[1]).norm() / rows[0].norm()) > 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_student_keeps_the_names_of_its_checkpoint(name: str, directories: Directories, tmp_path: Path) -> None:
    load_student(directories(name), dtype="float32").save_pretrained(tmp_path)
    assert stored_names(tmp_path) == stored_names(directories(name))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, directories: Directories) -> Mapping[bool, CacheConfig]:
    """One teacher cache with images, and one without."""
    folder = tmp_path_factory.mktemp("families")
    sizes, text_only = (SMALL, LARGE), range(6)
    with_images = write_data(folder / "images", num_samples=6, text_only=(3,), multi_turn=(2,), image_sizes=sizes)
    without = write_data(folder / "text", num_samples=6, text_only=text_only, multi_turn=(2,))
    return {
        True: build_small_cache(folder / "a", teacher=directories("qwen2-vl"), data=with_images),
        False: build_small_cache(folder / "b", teacher=directories("llama"), data=without),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_of_align_and_distill(
    name: str, caches: Mapping[bool, CacheConfig], directories: Directories, tmp_path: Path
) -> None:
    stage = STAGE | {"max_steps": 1}
    train_student(
        cache=caches[FAMILIES[name].has_images],
        student=student_config(directories(name)),
        train=train_config(stages=["align", "distill"], align=stage, distill=stage),
        output_dir=tmp_path,
    )
    base = dict(load_student(directories(name), dtype="float32").named_parameters())
    for stage_name, trained in (("align", set()), ("distill", {"body"})):
        student = load_student(tmp_path / "training" / "tiny" / stage_name / "export", dtype="float32")
        moved = {name for name, tensor in student.named_parameters() if not torch.equal(tensor, base[name])}
        parts = name_parts(student)
        assert moved == {parameter for parameter, part in parts.items() if part in trained}
        (record,) = read_metrics(tmp_path, stage_name)
        losses = [record[f"train/{term}_loss"] for term in ("ce", "kl")]
        assert all(0 < loss < 20 for loss in losses)
