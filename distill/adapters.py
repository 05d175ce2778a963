"""Low-rank adapters (LoRA) on the linear layers of a student's body, which train in the place of its weights."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.config import LoraConfig
from teacher_cache.durable_files import remove, sync_tree
from teacher_cache.errors import ConfigError

ADAPTER = "default"
"""The one adapter of a student, by the name that peft gives it."""
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def add_adapters(
    student: transformers.PreTrainedModel, config: LoraConfig, *, seed: int, weights: Path | None = None
) -> None:
    """Put adapters into a student, in place; they add nothing to its outputs before they are trained.

    Args:
        student: The student with its own weights.
        config: Rank, scale, dropout and the layers.
        seed: Decides the first values.
        weights: Folder written by ``write_adapters`` to go on from.

    Raises:
        ConfigError: ``target_modules`` names no linear layer of the body, or the stored adapters are of other layers.
    """
    from peft import inject_adapter_in_model

    torch.manual_seed(seed)
    inject_adapter_in_model(_peft_config(student, config), student, adapter_name=ADAPTER)
    if weights is None:
        return
    stored = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(weights / WEIGHTS).items()}
    adapters = {_public_name(name): p for name, p in student.named_parameters() if is_adapter(name)}
    if {name: tensor.shape for name, tensor in stored.items()} != {name: p.shape for name, p in adapters.items()}:
        raise ConfigError(f"the adapters in {weights} are not those of student.lora: restore rank and target_modules")
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(stored[name])


def is_adapter(name: str) -> bool:
    """Return whether a parameter of a student belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def has_adapters(student: nn.Module) -> bool:
    """Return whether ``add_adapters`` was called."""
    return any(is_adapter(name) for name, _ in student.named_parameters())


def merge_adapters(student: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return gathered parameters under the names of a student without adapters: W + scale B A for what had one.

    Args:
        student: The student, for the scale of each layer.
        state: All of its parameters and buffers, by its own names.
    """
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if not is_adapter(name)}
    for name, module in student.named_modules():
        down = state.get(f"{name}.lora_A.{ADAPTER}.weight")
        if down is not None:
            up, weight = state[f"{name}.lora_B.{ADAPTER}.weight"], state[f"{name}.base_layer.weight"]
            scaling: Any = module.scaling
            change = scaling[ADAPTER] * (up.float() @ down.float())
            merged[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
    return merged


def write_adapters(
    student: transformers.PreTrainedModel, state: dict[str, Tensor], folder: Path, *, config: LoraConfig, base: str
) -> None:
    """Write gathered adapters the way peft does, for `PeftModel.from_pretrained` and for servers that load adapters."""
    staging = folder.with_name(f"{folder.name}.partial")
    remove(staging)
    staging.mkdir(parents=True)
    peft_config = _peft_config(student, config)
    peft_config.base_model_name_or_path = base
    peft_config.inference_mode = True
    peft_config.save_pretrained(staging)
    tensors = {f"{PEFT_PREFIX}{_public_name(name)}": tensor for name, tensor in state.items() if is_adapter(name)}
    save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
    sync_tree(staging)
    remove(folder)
    staging.rename(folder)


def _peft_config(student: transformers.PreTrainedModel, config: LoraConfig) -> Any:
    import peft

    # annotated as an integer there, and only ever divided by the rank
    alpha: Any = config.alpha
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=_targets(student, config.target_modules),
        bias="none",
    )


def _targets(student: transformers.PreTrainedModel, wanted: Iterable[str] | None) -> list[str]:
    """Return the full names of the body's linear layers that get adapters, so that no other part's are meant."""
    decoder = student.get_decoder()
    prefix = next(name for name, module in student.named_modules() if module is decoder)
    linear = [
        name.removesuffix(".base_layer")
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{prefix}.layers.") and ".lora_" not in name
    ]
    if wanted is None:
        return linear
    chosen = [name for name in linear if any(name.endswith(f".{suffix}") for suffix in wanted)]
    unknown = [suffix for suffix in wanted if not any(name.endswith(f".{suffix}") for name in linear)]
    if unknown or not chosen:
        known = ", ".join(sorted({name.rsplit(".", 1)[1] for name in linear}))
        raise ConfigError(
            f"student.lora.target_modules: the body has no linear layer {', '.join(unknown) or '(none is named)'}; "
            f"it has {known}"
        )
    return chosen


def _public_name(name: str) -> str:
    return name.replace(f".{ADAPTER}.weight", ".weight")
