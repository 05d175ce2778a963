"""Adapters in the place of the student's weights: what they change, what they leave, what is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from distill import trainer
from distill.adapters import add_adapters, has_adapters, is_adapter, merge_adapters
from distill.config import LoraConfig
from distill.engine import Engine
from distill.export_checkpoint import export_checkpoint
from distill.student import load_student, name_parts
from distill.trainer import train_student
from teacher_cache.config import CacheConfig
from teacher_cache.errors import ConfigError
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import numbers, read_metrics, student_config, train_config

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("adapters")
    data = write_data(folder / "data", num_samples=6, text_only=(3,))
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=data)


def with_adapters(path: Path, **changes: Any) -> Any:
    student = load_student(path, dtype="float32").eval()
    add_adapters(student, LoraConfig.model_validate(LORA | changes), seed=3)
    return student


def logits(student: Any) -> Tensor:
    with torch.no_grad():
        return student(input_ids=torch.arange(3, 23).view(2, 10)).logits


@pytest.mark.parametrize("family", ["tiny_qwen2_vl", "tiny_internvl", "tiny_llava", "tiny_qwen2"])
def test_adapters_are_on_the_bodys_linear_layers_alone(family: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(family)
    plain = load_student(path, dtype="float32").eval()
    student = with_adapters(path)
    parts = name_parts(student)
    linear = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear) and name_parts(plain).get(f"{name}.weight") == "body"
    }
    adapted = {name.split(".lora_")[0] for name, part in parts.items() if part == "adapters"}
    assert adapted == linear
    assert len(linear) > 0
    torch.testing.assert_close(logits(student), logits(plain), rtol=0, atol=0)  # nothing is added at first


def test_target_modules_choose_layers_and_unknown_ones_are_named(tiny_internvl: Path) -> None:
    student = with_adapters(tiny_internvl, target_modules=["q_proj", "v_proj"])
    names = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in name_parts(student) if is_adapter(name)}
    assert names == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"no linear layer query; it has .*q_proj"):
        with_adapters(tiny_internvl, target_modules=["q_proj", "query"])


def test_merged_weights_compute_what_the_adapters_do(tiny_internvl: Path) -> None:
    student = with_adapters(tiny_internvl)
    for name, parameter in student.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    state = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
    plain = load_student(tiny_internvl, dtype="float32").eval()
    before = logits(plain)
    merged = merge_adapters(student, state)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), logits(student), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, logits(student), atol=1e-2)


@pytest.fixture(scope="module")
def run(cache: CacheConfig, tiny_internvl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora-run")
    student = student_config(tiny_internvl, lora=LORA)
    train_student(cache=cache, student=student, train=train_config(), output_dir=folder)
    return folder / "training" / "tiny"


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_student(folder, dtype="float32").named_parameters())


def test_what_is_frozen_keeps_every_bit(run: Path, tiny_internvl: Path) -> None:
    base, parts = weights(tiny_internvl), name_parts(load_student(tiny_internvl, dtype="float32"))
    for stage in ("distill", "finetune"):
        trained = weights(run / stage / "export")
        changed = {name for name, tensor in trained.items() if not torch.equal(tensor, base[name])}
        linear = {name for name, part in parts.items() if part == "body" and base[name].dim() == 2}
        assert changed == linear
    aligned = weights(run / "align" / "export")
    assert all(torch.equal(tensor, base[name]) for name, tensor in aligned.items())


def test_finetune_goes_on_with_the_adapters_of_distill(run: Path) -> None:
    stored = [load_file(run / stage / "adapter" / "adapter_model.safetensors") for stage in ("distill", "finetune")]
    assert stored[0].keys() == stored[1].keys()
    moved = max(float((stored[1][name] - tensor).abs().max()) for name, tensor in stored[0].items())
    # three steps of Adam at a falling rate from 1e-3 move a weight by no more; other first values would differ by 0.1
    assert 0 < moved < 4e-3


def test_peft_reads_the_adapters(run: Path, tiny_internvl: Path) -> None:
    loaded = PeftModel.from_pretrained(load_student(tiny_internvl, dtype="float32"), run / "finetune" / "adapter")
    exported = load_student(run / "finetune" / "export", dtype="float32")
    torch.testing.assert_close(logits(loaded.eval()), logits(exported.eval()), rtol=1e-4, atol=1e-5)


def test_a_student_without_adapters_shares_the_align_stage(
    run: Path, cache: CacheConfig, tiny_internvl: Path, tmp_path: Path
) -> None:
    train_student(
        cache=cache, student=student_config(tiny_internvl), train=train_config(), output_dir=tmp_path, stages=["align"]
    )
    assert numbers(read_metrics(tmp_path, "align")) == numbers(read_metrics(run.parents[1], "align"))
    # done under another configuration of the adapters: nothing is left to do
    train_student(
        cache=cache,
        student=student_config(tiny_internvl, lora=LORA),
        train=train_config(),
        output_dir=tmp_path,
        stages=["align"],
    )


def test_an_interrupted_stage_resumes_bit_identically_and_its_checkpoint_exports(
    run: Path, cache: CacheConfig, tiny_internvl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_config(tiny_internvl, lora=LORA)

    def killed(engine: Engine, *_: Any, **__: Any) -> None:
        if has_adapters(engine.model.student):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "export_adapters", killed)
        with pytest.raises(KeyboardInterrupt):
            train_student(cache=cache, student=student, train=train_config(), output_dir=tmp_path)
    ours = tmp_path / "training" / "tiny"
    assert export_checkpoint(ours / "distill", tmp_path / "exported").name == "step-00000003"
    base, exported = weights(tiny_internvl), weights(tmp_path / "exported")
    linear = {name.split(".base_layer")[0] for name, _ in with_adapters(tiny_internvl).named_parameters()}
    changed = {name for name, tensor in exported.items() if not torch.equal(tensor, base[name])}
    assert changed
    assert {name.removesuffix(".weight") for name in changed} <= linear
    train_student(cache=cache, student=student, train=train_config(), output_dir=tmp_path)
    for stage in ("distill", "finetune"):
        files = [folder / stage / "export" / "model.safetensors" for folder in (ours, run)]
        assert files[0].read_bytes() == files[1].read_bytes()
