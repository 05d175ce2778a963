"""Students loaded in shares against the same loaded whole."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.config import TrainConfig
from distill.processes import Processes
from distill.student import load_student
from distill.zero import launched_processes, load_for_backend, whole
from teacher_cache.errors import ConfigError

FAMILIES = ["tiny_qwen2_vl", "tiny_internvl", "tiny_llava", "tiny_qwen2"]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with launched_processes(backend="zero3", num_processes=1) as joined:
        yield joined


def load(path: Path, *, dtype: str, processes: Processes) -> torch.nn.Module:
    train = TrainConfig.model_validate({"zero": {"init_on_load": True}})
    model = load_for_backend(
        path, stage="align", train=train, dtype=dtype, trust_remote_code=False, processes=processes
    )
    assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_as_if_loaded_whole(
    family: str, dtype: str, processes: Processes, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(family)
    plain, model = load_student(path, dtype=dtype), load(path, dtype=dtype, processes=processes)
    with whole(model):
        expected, found = plain.state_dict(), model.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
    buffers = dict(model.named_buffers())
    for name, buffer in plain.named_buffers():  # those that are not stored as well
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer), name
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert model.training == plain.training


def test_tied_weights_stay_tied(tiny_qwen2: Path, tmp_path: Path, processes: Processes) -> None:
    plain = load_student(tiny_qwen2, dtype="float32")
    plain.config.tie_word_embeddings = True
    plain.tie_weights()
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"]
    model = load(tmp_path, dtype="float32", processes=processes)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with whole(model):
        assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)


@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_a_missing_or_misshapen_weight_is_named(
    fault: str, tiny_qwen2: Path, tmp_path: Path, processes: Processes
) -> None:
    load_student(tiny_qwen2, dtype="float32").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = tensors.pop(name)
    if fault == "misshapen":
        tensors[name] = tensor[:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{name}.*mend the model"):
        load(tmp_path, dtype="float32", processes=processes)
