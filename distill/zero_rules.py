"""What a user's DeepSpeed configuration may say beside a stage's own settings."""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from distill.config import Stage, TrainConfig

AUTO = "auto"
# what DeepSpeed can do beside ZeRO-3, which would change what is trained or needs a model written for it
OTHER_FEATURES = (
    "amp",
    "autotuning",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "datastates_ckpt",
    "eigenvalue",
    "elasticity",
    "expert_parallel",
    "graph_harvesting",
    "hybrid_engine",
    "nebula",
    "pipeline",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
    "torch_autocast",
    "weight_quantization",
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a user's file may say about one key."""

    key: str
    """Dotted path; ``.*`` at its end means everything below."""
    accepted: tuple[Any, ...]
    because: str


def stage_config(stage: Stage, *, train: TrainConfig, dtype: str) -> dict[str, Any]:
    """Return the part of DeepSpeed's configuration that a stage's settings decide."""
    config = train.stage(stage)
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        # a step has as many micro-batches as it needs: the caller says when it is complete
        "managed_gradient_accumulation": False,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.gradient_clipping,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.learning_rate,
                "betas": list(config.adam_betas),
                "eps": config.adam_epsilon,
                "weight_decay": config.weight_decay,
                # torch's, one kernel per group; DeepSpeed's own is compiled at start-up
                "torch_adam": True,
                "fused": True,
            },
        },
        "bf16": {"enabled": dtype == "bfloat16"},
        # else the model's: a sum of hundreds of micro-batches in bfloat16 stands still
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 3},
        "checkpoint": {"tag_validation": "Fail"},
    }


def faults(user: Mapping[str, Any], *, stage: Stage, train: TrainConfig, dtype: str) -> list[str]:
    """Return everything in a user's configuration that contradicts the stage or that DeepSpeed would not read."""
    return [
        *_contradictions(user, stage=stage, train=train, dtype=dtype),
        *_other_features(user),
        *_unknown_keys(user),
    ]


def _rules(stage: Stage, *, train: TrainConfig, dtype: str) -> Iterator[Rule]:
    config, own = train.stage(stage), stage_config(stage, train=train, dtype=dtype)
    stage_settings = f"follows from train.{stage}"
    masters = "masters, moments and sums of gradients are float32"
    reasons = {
        "bf16.enabled": "follows from the student's dtype",
        "zero_optimization.stage": "the backend is zero3",
        "data_types.grad_accum_dtype": masters,
    }
    # one number for all steps, if there is one
    per_step, rest = divmod(config.global_batch_size, train.num_processes * config.micro_batch_size)
    is_fixed = rest == 0 and config.micro_batch_tokens is None
    yield Rule(key="train_batch_size", accepted=(config.global_batch_size,), because=stage_settings)
    yield Rule(
        key="gradient_accumulation_steps",
        accepted=(per_step,) if is_fixed else (),
        because=stage_settings,
    )
    for key, value in _leaves(own):
        if key != "gradient_accumulation_steps":
            yield Rule(key=key, accepted=(value,), because=reasons.get(key, stage_settings))
    yield Rule(key="optimizer.params.adam_w_mode", accepted=(True,), because="the optimizer is AdamW")
    yield Rule(key="optimizer.*", accepted=(), because="torch's AdamW is built from the stage's settings alone")
    yield Rule(key="scheduler.*", accepted=(), because=f"train.{stage} gives the learning rate")
    yield Rule(key="gradient_allreduce_op", accepted=("mean",), because="ZeRO-3 has no sum")
    yield Rule(key="fp16.enabled", accepted=(False,), because="loss scaling is not supported")
    for key in ("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"):
        yield Rule(key=key, accepted=(False,), because=masters)
    yield Rule(key="data_types.buffer_dtype", accepted=(None, "fp32"), because=masters)
    yield Rule(key="communication_data_type", accepted=(None, "bf16", "fp32"), because="float16 overflows")
    yield Rule(key="data_types.param_dtype", accepted=(None,), because="the student's dtype gives it")
    for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        yield Rule(key=f"zero_optimization.{name}", accepted=(False,), because="it changes the numbers")
    yield Rule(key="zero_optimization.zenflow", accepted=(None,), because="it delays updates")
    yield Rule(key="zero_optimization.zenflow.*", accepted=(), because="it delays updates")
    yield Rule(key="zero_optimization.mics_shard_size", accepted=(-1,), because="it is another engine than ZeRO-3")
    yield Rule(key="zero_optimization.elastic_checkpoint", accepted=(False,), because="ZeRO-3 has none")
    yield Rule(key="zero_optimization.compute_grad_norm", accepted=(True,), because="the norm is logged")
    for name in ("offload_optimizer", "offload_param"):
        yield Rule(
            key=f"zero_optimization.{name}.device",
            accepted=("cpu", "none"),
            because="DeepSpeed 0.19.8 resumes without what it had moved to NVMe",
        )
    resumed = "resharded checkpoints are read by every process"
    yield Rule(key="zero_optimization.pipeline_loading_checkpoint", accepted=(False,), because=resumed)
    yield Rule(key="compile.deepcompile", accepted=(False,), because="steps have any number of micro-batches")
    yield Rule(key="tensor_parallel.autotp_size", accepted=(0, 1), because="students are not split by tensors")
    yield Rule(key="sequence_parallel_size", accepted=(1,), because="a sequence stays on one process")
    checkpoints = "the trainer writes and reads checkpoints, and commits what is there when a save returns"
    for name in ("load_universal", "use_node_local_storage"):
        yield Rule(key=f"checkpoint.{name}", accepted=(False,), because=checkpoints)
    yield Rule(key="checkpoint.writer", accepted=(None,), because=checkpoints)
    yield Rule(key="checkpoint.writer.*", accepted=(), because=checkpoints)
    yield Rule(
        key="activation_checkpointing.*",
        accepted=(False, None),
        because="train.gradient_checkpointing recomputes activations",
    )


def _contradictions(user: Mapping[str, Any], *, stage: Stage, train: TrainConfig, dtype: str) -> Iterator[str]:
    rules = {rule.key: rule for rule in reversed([*_rules(stage, train=train, dtype=dtype)])}
    for key, value in _leaves(user):
        above = [f"{key.rsplit('.', depth)[0]}.*" for depth in range(1, key.count(".") + 1)]
        rule = next((rules[name] for name in (key, *above) if name in rules), None)
        if rule is not None and value != AUTO and not any(_same(value, accepted) for accepted in rule.accepted):
            expected = " or ".join(map(json.dumps, rule.accepted)) or "no such key"
            yield f"{key}: expected {expected} ({rule.because}), found {json.dumps(value)}"
        elif rule is None and value == AUTO and not key.startswith("zero_optimization."):
            yield f"{key}: auto is for what a stage decides; expected a value"


def _other_features(user: Mapping[str, Any]) -> Iterator[str]:
    for name in OTHER_FEATURES:
        section = user.get(name)
        on = section.get("enabled", bool(section)) if isinstance(section, Mapping) else section
        if on and on != AUTO:
            yield f"{name}: expected it absent or switched off (it is not supported), found {json.dumps(section)}"


def _same(found: Any, accepted: Any) -> bool:
    if isinstance(found, str) and isinstance(accepted, str):
        return found.lower() == accepted.lower()
    return type(found) is type(accepted) and found == accepted if isinstance(accepted, bool) else found == accepted


def _unknown_keys(user: Mapping[str, Any]) -> Iterator[str]:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if not user:
        return
    fields = DeepSpeedZeroConfig.model_fields
    known = {name for name, field in fields.items()} | {field.alias for field in fields.values() if field.alias}
    zero = user.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        yield f"zero_optimization: expected an object, found {json.dumps(zero)}"
        return
    places = [("", user, known_top_level_keys()), ("zero_optimization.", zero, known)]
    for prefix, mapping, names in places:
        for key in sorted(set(mapping) - set(names)):
            close = difflib.get_close_matches(key, names, n=1)
            yield f"{prefix}{key}: DeepSpeed reads no such key" + (f"; did you mean {close[0]}?" if close else "")


def known_top_level_keys() -> frozenset[str]:
    """Return the keys that the installed DeepSpeed looks for, as seen when it reads a configuration."""
    from deepspeed.runtime.config import DeepSpeedConfig

    looked_up = _LookedUp(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
    DeepSpeedConfig(cast(str, looked_up))
    # read by the engine's helpers, where present
    return frozenset(looked_up.names | {"sequence_parallel_size"})


class _LookedUp(dict[str, Any]):
    """A dictionary that notes the names it is asked for."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "_LookedUp":
        return self


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
