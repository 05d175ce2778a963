"""DeepSpeed's configuration: a stage's own settings, and beside them what a user's DeepSpeed JSON asks for."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from distill.config import Stage, TrainConfig
from distill.zero_rules import AUTO, faults, stage_config
from teacher_cache.errors import ConfigError

MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
"""Sections that this project reads itself: DeepSpeed's engine would log under a count of samples."""


def deepspeed_config(stage: Stage, *, train: TrainConfig, dtype: str, num_trained: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for one stage: ours over ``overrides`` over the file over the defaults.

    Raises:
        ConfigError: The element type is float16, or the user's part contradicts the stage or is no DeepSpeed
            configuration; every fault is named.
    """
    if dtype == "float16":
        raise ConfigError(
            "training in float16 needs loss scaling, which is not supported: set the student's dtype to bfloat16"
        )
    user = _user_config(train)
    found = faults(user, stage=stage, train=train, dtype=dtype)
    if found:
        source = train.zero.config_file or "train.zero.overrides"
        listed = "\n".join(f"  {fault}" for fault in found)
        raise ConfigError(
            f"{source} does not fit stage {stage}:\n{listed}\nRemove these keys, or set them as expected."
        )
    own = stage_config(stage, train=train, dtype=dtype)
    ours = {"train_batch_size", "fp16", *MONITORS}
    theirs = _without_auto({key: value for key, value in user.items() if key not in ours})
    merged = _merge(_merge(_defaults(train, num_trained=num_trained), theirs), own)
    _check_with_deepspeed(merged)
    return merged


def monitor_sections(train: TrainConfig) -> dict[str, dict[str, Any]]:
    """Return the enabled monitor sections of the user's part.

    Raises:
        ConfigError: A section holds a key, which would be written into the run's files.
    """
    user = _user_config(train)
    sections: dict[str, dict[str, Any]] = {name: dict(user[name]) for name in MONITORS if name in user}
    for name, section in sections.items():
        if "api_key" in section:
            raise ConfigError(
                f"the DeepSpeed section {name} holds an api_key, which would be copied into the run's files: set it "
                "in the environment instead (WANDB_API_KEY, COMET_API_KEY)"
            )
    return {name: section for name, section in sections.items() if section.get("enabled", False)}


def _defaults(train: TrainConfig, *, num_trained: int) -> dict[str, Any]:
    zero = {
        "stage3_param_persistence_threshold": train.zero.persistence_threshold,
        "reduce_bucket_size": min(num_trained, 500_000_000),
    }
    return {"zero_optimization": zero, "steps_per_print": 2**31}


def _check_with_deepspeed(config: dict[str, Any]) -> None:
    """Raise ConfigError unless the installed DeepSpeed takes the values too."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(cast(str, config))
    except ValidationError as error:
        faults = "\n".join(f"  {'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors())
        raise ConfigError(f"DeepSpeed refuses the configuration of train.zero ({error.title}):\n{faults}") from error
    except (AssertionError, ValueError, TypeError, DeepSpeedConfigError) as error:
        raise ConfigError(f"DeepSpeed refuses the configuration of train.zero: {error}") from error


def _user_config(train: TrainConfig) -> dict[str, Any]:
    file = train.zero.config_file
    user = {} if file is None else _read_json(Path(file))
    merged = _merge(user, train.zero.overrides)
    if "bfloat16" in merged:
        merged["bf16"] = merged.pop("bfloat16")
    schedule = merged.get("scheduler", {}).get("params", {})
    if schedule and all(value == AUTO for value in schedule.values()):
        del merged["scheduler"]
    return merged


def _read_json(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"DeepSpeed configuration {path} gives {', '.join(repeated)} twice: keep one of each")
        return dict(pairs)

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(f"train.zero.config_file {path}: {error.strerror} (from {os.getcwd()})") from error
    except ValueError as error:
        raise ConfigError(f"train.zero.config_file {path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"train.zero.config_file {path} holds {type(values).__name__}, expected an object")
    return values


def _without_auto(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in mapping.items()
        if value != AUTO
    }


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
