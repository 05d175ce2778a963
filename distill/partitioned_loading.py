"""Load a student straight into ZeRO-3's partitions: no process ever holds all of it.

Its parameters are made without values. Then one file of the checkpoint after the other, a few hundred MiB at a time, is
read by the first process, sent to the others, and cut into shares. Buffers are computed as anywhere else, so that
rotary frequencies keep float32.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import conversion_mapping, core_model_loading, initialization

from distill.processes import Processes
from distill.student import check_rotary_buffers, empty_student
from teacher_cache.errors import ConfigError
from teacher_cache.teacher_checkpoint import weight_files

logger = logging.getLogger(__name__)

GROUP_ELEMENTS = 64 * 2**20
"""Parameters that are whole at once, but for one larger than that."""


def load_partitioned(
    path: Path, *, dtype: str, trust_remote_code: bool, zero_config: Mapping[str, Any], processes: Processes
) -> transformers.PreTrainedModel | None:
    """Load a student whose parameters are partitioned over the processes; every process calls this.

    Args:
        path: Local directory of the checkpoint.
        dtype: Element type of the parameters.
        trust_remote_code: Run Python code that ships with the checkpoint.
        zero_config: DeepSpeed's configuration.
        processes: Those that share the parameters.

    Returns:
        The student, or None where its weights are not simply renamed tensors of the checkpoint, such as merged experts.

    Raises:
        ConfigError: A weight is missing or misshapen.
    """
    with _without_values():
        model = empty_student(path, dtype=dtype, trust_remote_code=trust_remote_code)
        # a part of the initialisation that is left out
        model.tie_weights()
    sources = _sources(model, path)
    if sources is None:
        return None
    slots = _slots(model)
    absent = sorted(names[0] for names in slots.values() if not any(name in sources for name in names))
    if absent:
        raise ConfigError(f"{len(absent)} weights of {path} are missing, first {absent[0]}: mend the model")
    for group in _groups(slots, sources):
        _load_group(model, group, sources=sources, zero_config=zero_config, processes=processes)
    _load_buffers(model, sources)
    check_rotary_buffers(model)
    return model


def whole_size(parameter: nn.Parameter) -> int:
    """Return a parameter's number of elements, whether it is partitioned or not."""
    size: int = getattr(parameter, "ds_numel", parameter.numel())
    return size


@contextmanager
def _without_values() -> Iterator[None]:
    """Make parameters of new modules without memory; buffers are real."""
    register = nn.Module.register_parameter

    def without_value(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    with (
        mock.patch.object(nn.Module, "register_parameter", without_value),
        initialization.no_init_weights(),
    ):
        yield


def _sources(model: transformers.PreTrainedModel, path: Path) -> dict[str, tuple[Path, str]] | None:
    """Return file and stored name of each tensor by its name in the model, or None where one is made of several."""
    mapping = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, core_model_loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, core_model_loading.WeightConverter)]
    own: Any = model
    kept_wider = getattr(own, "_keep_in_fp32_modules", None) or getattr(own, "_keep_in_fp32_modules_strict", None)
    if kept_wider and model.dtype != torch.float32:
        return None
    state = model.state_dict()
    found = {}
    for file in weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            stored_names = list(tensors.keys())
        for stored in stored_names:
            name, converter = core_model_loading.rename_source_key(
                stored, renamings, converters, model.base_model_prefix, state
            )
            if converter is not None:
                return None
            found[name] = (file, stored)
    own._weight_conversions = mapping  # which saving reverts
    return found


def _slots(model: nn.Module) -> dict[int, list[str]]:
    """Return all names of each parameter; tied ones have several."""
    slots: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        slots.setdefault(id(parameter), []).append(name)
    return slots


def _groups(slots: Mapping[int, list[str]], sources: Mapping[str, tuple[Path, str]]) -> Iterator[list[list[str]]]:
    """Yield parameters, by their names, that are read together: of one file, and not too large."""
    ordered = sorted(slots.values(), key=lambda names: str(_source(names, sources)[0]))
    group: list[list[str]] = []
    size, file = 0, None
    for names in ordered:
        source, stored = _source(names, sources)
        with safe_open(source, framework="pt") as tensors:
            elements = torch.Size(tensors.get_slice(stored).get_shape()).numel()
        if group and (source != file or size + elements > GROUP_ELEMENTS):
            yield group
            group, size = [], 0
        group.append(names)
        size, file = size + elements, source
    if group:
        yield group


def _source(names: list[str], sources: Mapping[str, tuple[Path, str]]) -> tuple[Path, str]:
    return next(sources[name] for name in names if name in sources)


def _load_group(
    model: nn.Module,
    group: list[list[str]],
    *,
    sources: Mapping[str, tuple[Path, str]],
    zero_config: Mapping[str, Any],
    processes: Processes,
) -> None:
    import deepspeed

    loaded = []
    file = _source(group[0], sources)[0]
    with safe_open(file, framework="pt") as tensors:
        for names in group:
            expected = model.get_parameter(names[0])
            stored = _source(names, sources)[1]
            if list(expected.shape) != tensors.get_slice(stored).get_shape():
                raise ConfigError(
                    f"weight {stored} of {file} has shape {tensors.get_slice(stored).get_shape()}, expected "
                    f"{list(expected.shape)}: mend the model"
                )
            value = torch.empty(expected.shape, dtype=expected.dtype)
            if processes.rank == 0:
                value.copy_(tensors.get_tensor(stored))
            parameter = nn.Parameter(value, requires_grad=expected.requires_grad)
            for name in names:
                owner, _, last = name.rpartition(".")
                model.get_submodule(owner)._parameters[last] = parameter
            loaded.append(parameter)
    deepspeed.zero.Init(module=nn.ParameterList(loaded), config_dict_or_path=dict(zero_config))


def _load_buffers(model: nn.Module, sources: Mapping[str, tuple[Path, str]]) -> None:
    for name, buffer in model.named_buffers():
        if name in sources:
            file, stored = sources[name]
            with safe_open(file, framework="pt") as tensors:
                buffer.copy_(_checked(tensors.get_tensor(stored), like=buffer, name=stored))


def _checked(tensor: Tensor, *, like: Tensor, name: str) -> Tensor:
    if tensor.shape != like.shape:
        raise ConfigError(f"buffer {name} has shape {list(tensor.shape)}, expected {list(like.shape)}: mend the model")
    return tensor
