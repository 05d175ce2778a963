"""DeepSpeed's configuration: what a stage decides, and what a user's own file may say beside it."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill.config import TrainConfig
from distill.zero_config import deepspeed_config
from distill.zero_rules import known_top_level_keys
from teacher_cache.errors import ConfigError

# as the documentation of Hugging Face's trainer shows it
COMMON_FILE: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
STAGE = {"global_batch_size": 16, "micro_batch_size": 2, "gradient_clipping": 0.5, "weight_decay": 0.1}


def built(user: dict[str, Any] | None = None, *, dtype: str = "bfloat16", **zero: Any) -> dict[str, Any]:
    values = {"num_processes": 2, "align": STAGE, "zero": {"overrides": user or {}} | zero}
    return deepspeed_config("align", train=TrainConfig.model_validate(values), dtype=dtype, num_trained=1000)


def refusal(user: dict[str, Any], **zero: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        built(user, **zero)
    return str(raised.value)


def test_the_configuration_follows_from_the_stage() -> None:
    config = built()
    assert config["managed_gradient_accumulation"] is False
    assert config["gradient_clipping"] == 0.5
    assert config["optimizer"]["params"]["torch_adam"]
    assert config["optimizer"]["params"]["weight_decay"] == 0.1
    assert config["bf16"]["enabled"]
    assert config["zero_optimization"]["stage"] == 3


def test_float16_is_refused() -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        built(dtype="float16")


def test_a_users_file_is_merged_over_ours_and_overrides_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(COMMON_FILE))
    config = built({"zero_optimization": {"offload_param": {"device": "none"}}}, config_file=str(path))
    zero = config["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_param"]["device"] == "none"
    assert zero["overlap_comm"]
    assert zero["stage3_param_persistence_threshold"] == 10_000  # "auto" is ours
    assert config["steps_per_print"] == 2000
    assert config["optimizer"] == built()["optimizer"]
    assert "auto" not in json.dumps(config)
    assert "scheduler" not in config


def test_equal_values_are_accepted() -> None:
    equal = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "gradient_allreduce_op": "mean",
        "bfloat16": {"enabled": True},
        "fp16": {"enabled": False},
        "optimizer": {"type": "adamw", "params": {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.1}},
        "autotuning": {"enabled": False, "fast": True},
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    assert built(equal)["optimizer"] == built()["optimizer"]


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ({"train_batch_size": 32}, "train_batch_size: expected 16 (follows from train.align), found 32"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu: expected 2"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: expected 4"),
        ({"managed_gradient_accumulation": True}, "managed_gradient_accumulation: expected false"),
        ({"gradient_clipping": 1.0}, "gradient_clipping: expected 0.5"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op: expected "mean"'),
        ({"optimizer": {"type": "Muon"}}, 'optimizer.type: expected "AdamW"'),
        ({"optimizer": {"params": {"lr": 1e-3}}}, "optimizer.params.lr: expected 0.0001"),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, "optimizer.params.betas: expected [0.9, 0.999]"),
        ({"optimizer": {"params": {"torch_adam": False}}}, "optimizer.params.torch_adam: expected true"),
        ({"optimizer": {"params": {"momentum": 0.9}}}, "optimizer.params.momentum: expected no such key"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type: expected no such key (train.align gives"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage: expected 3"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights: expected false"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow.topk_ratio"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: expected false"),
        ({"bf16": {"enabled": False}}, "bf16.enabled: expected true"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16_master_weights_and_grads: expected false"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'data_types.grad_accum_dtype: expected "fp32"'),
        ({"data_types": {"buffer_dtype": "bf16"}}, 'data_types.buffer_dtype: expected null or "fp32"'),
        ({"communication_data_type": "fp16"}, "communication_data_type: expected null or"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            'offload_param.device: expected "cpu" or "none"',
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "resumes without what it had moved"),
        ({"zero_optimization": {"pipeline_loading_checkpoint": True}}, "pipeline_loading_checkpoint: expected false"),
        ({"checkpoint": {"writer": {"decoupled": True}}}, "checkpoint.writer.decoupled: expected no such key"),
        ({"elasticity": {"enabled": True}}, "elasticity: expected it absent or switched off"),
        ({"compression_training": {"weight_quantization": {}}}, "compression_training: expected it absent"),
        ({"sparse_gradients": True}, "sparse_gradients: expected it absent or switched off"),
        ({"activation_checkpointing": {"partition_activations": True}}, "train.gradient_checkpointing recomputes"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile: expected false"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal: expected false"),
        ({"gradient_acumulation_steps": 2}, "reads no such key; did you mean gradient_accumulation_steps?"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com: DeepSpeed reads no such key"),
        ({"prescale_gradients": "auto"}, "prescale_gradients: auto is for what a stage decides"),
        ({"zero_optimization": True}, "zero_optimization: expected an object"),
        ({"zero_optimization": {"sub_group_size": "many"}}, "sub_group_size: Input should be a valid integer"),
    ],
)
def test_contradictions_are_refused_with_expected_and_found(user: dict[str, Any], expected: str) -> None:
    assert expected in refusal(user)


def test_all_contradictions_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(COMMON_FILE | {"gradient_clipping": 1.0, "train_batch_size": 1, "steps_per_prin": 1}))
    message = refusal({"zero_optimization": {"stage": 1}}, config_file=str(path))
    named = ("gradient_clipping: ", "train_batch_size: ", "steps_per_prin: ", "zero_optimization.stage: ", str(path))
    assert [name for name in named if name not in message] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds list"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "gives steps_per_print twice"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text)
    refused = refusal({}, config_file=str(path))
    assert message in refused
    assert str(path) in refused


def test_known_keys_come_from_the_installed_deepspeed() -> None:
    known = known_top_level_keys()
    assert {*COMMON_FILE, "activation_checkpointing", "flops_profiler", "aio", "comms_logger"} <= known
