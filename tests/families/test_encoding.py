"""What every family's processor makes of a conversation, what its head is, and what identifies a teacher."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from teacher_cache.chat import image_token_id, load_processor, tokenizer_of
from teacher_cache.config import TeacherConfig
from teacher_cache.head_check import ScoredRows, check_head_agrees
from teacher_cache.teacher import (
    TransformersTeacher,
    compute_targets,
    load_teacher_head,
    processing_identity,
    teacher_identity,
)
from teacher_cache.teacher_checkpoint import digest_files
from tests.families.conftest import Directories
from tests.families.models import FAMILIES, HEADS, LARGE, SMALL
from tests.families.samples import TURNS, encode, make_sample, samples_of

WITH_IMAGES = [name for name, family in FAMILIES.items() if family.has_images]


def config_of(path: Path) -> TeacherConfig:
    return TeacherConfig(model=str(path), dtype="float32")


@pytest.mark.parametrize("name", FAMILIES)
def test_spans_are_the_answers_with_their_end_of_turn(name: str, directories: Directories) -> None:
    path = directories(name)
    tokenizer = tokenizer_of(load_processor(str(path)))
    for conversation in encode(path, samples_of(FAMILIES[name])):
        answers = [tokenizer.decode(conversation.token_ids[start:stop]).strip() for start, stop in conversation.spans]
        expected = [answer + FAMILIES[name].chat.end_of_turn for _, answer in TURNS]
        assert answers == expected[: len(answers)]
        if conversation.sample_id in ("large", "both", "text-turns"):
            assert len(answers) == 2


@pytest.mark.parametrize("sizes", [(SMALL,), (LARGE,), (SMALL, LARGE), (LARGE, SMALL)], ids=str)
@pytest.mark.parametrize("name", WITH_IMAGES)
def test_each_image_becomes_the_tokens_of_its_size(name: str, sizes: tuple, directories: Directories) -> None:
    path = directories(name)
    (conversation,) = encode(path, [make_sample("images", sizes)])
    image = image_token_id(load_processor(str(path)))
    runs = [len(list(run)) for token, run in itertools.groupby(conversation.token_ids.tolist()) if token == image]
    print(f"FAMILY: {name}: images of {sizes} become {runs} tokens")
    assert runs == [FAMILIES[name].image_tokens[size] for size in sizes]
    assert conversation.prompt_token_ids.count(image) == len(sizes)


@pytest.mark.parametrize("name", [*FAMILIES, *HEADS])
def test_the_head_is_the_models_own(name: str, directories: Directories) -> None:
    path = directories(name)
    head = load_teacher_head(config_of(path))
    text_only = not (FAMILIES | HEADS)[name].has_images
    auto = transformers.AutoModelForCausalLM if text_only else transformers.AutoModelForImageTextToText
    assert torch.equal(head.weight, auto.from_pretrained(path).get_output_embeddings().weight)
    assert (head.logit_scale, head.logit_softcap) == {"granite": (0.25, None), "cohere": (0.25, None)}.get(
        name, (1.0, 3.0 if name == "gemma2" else None)
    )
    conversations = encode(path, samples_of((FAMILIES | HEADS)[name]))
    teacher = TransformersTeacher(config_of(path))
    found = compute_targets(teacher, conversations, topk=1, question_rows=[False] * len(conversations))
    assert check_head_agrees([ScoredRows.of(sample, count=100) for sample in found], head=head) <= 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_identity_follows_every_file_that_decides_the_targets(
    name: str, directories: Directories, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(directories(name), tmp_path / "model"))

    def identity() -> dict[str, str]:
        return teacher_identity(config_of(path)) | processing_identity(config_of(path))

    def changed(before: dict[str, str]) -> set[str]:
        after = identity()
        return {key for key in before if before[key] != after[key]}

    groups = {"config", "weights", "tokenizer", "chat_template"} | (
        {"processor"} if FAMILIES[name].has_images else set()
    )
    before = identity()
    assert {key for key, digest in before.items() if digest != digest_files([])} - {"dtype"} == groups

    with (path / "chat_template.jinja").open("a") as file:
        file.write(" ")
    assert changed(before) == {"chat_template"}
    before = identity()
    if FAMILIES[name].has_images:
        settings = json.loads((path / "processor_config.json").read_text())
        settings["image_processor"]["image_mean"] = [0.4, 0.5, 0.5]
        (path / "processor_config.json").write_text(json.dumps(settings))
        assert changed(before) == {"processor"}
        before = identity()
    weights = load_file(path / "model.safetensors")
    weights[min(weights)].view(-1)[0] += 1.0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    assert changed(before) == {"weights"}
