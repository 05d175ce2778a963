"""DeepSpeed ZeRO-3: the one place that builds its configuration, its process group and its engine."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import Backend, Stage, TrainConfig
from distill.engine import Engine, PartitionReport, TorchEngine, set_learning_rate
from distill.processes import Processes, launch_environment
from distill.stages import StageModel
from teacher_cache.errors import ConfigError

logger = logging.getLogger(__name__)

OWN_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
    "gradient_clipping",
    "gradient_allreduce_op",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
)


@contextlib.contextmanager
def launched_processes(*, backend: Backend, num_processes: int) -> Iterator[Processes]:
    """Join the processes that a launcher started, or be the only one.

    Raises:
        ConfigError: The launch environment is incomplete, or of another size than the run file says.
    """
    environment = launch_environment(os.environ)
    world_size = int(environment["WORLD_SIZE"])
    if world_size != num_processes:
        raise ConfigError(
            f"train.num_processes is {num_processes}, but {world_size} were launched: change it, or launch with "
            f"torchrun --nproc-per-node={num_processes}"
        )
    if backend == "torch" and world_size > 1:
        raise ConfigError(f"backend torch trains in one process, but {world_size} were launched: use backend zero3")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(environment["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    initialised = backend == "zero3" and _init_distributed(environment)
    try:
        yield Processes(rank=int(environment["RANK"]), world_size=world_size, device=device)
    finally:
        if initialised:
            import deepspeed

            deepspeed.comm.destroy_process_group()
            deepspeed.comm.comm.cdb = None


def make_engine(model: StageModel, *, stage: Stage, train: TrainConfig, dtype: str, processes: Processes) -> Engine:
    """Put a stage's model, its trained parts already chosen, into the configured backend.

    Raises:
        ConfigError: The backend cannot train in this element type or with these settings.
    """
    if train.backend == "torch":
        return TorchEngine(model, stage=stage, train=train, dtype=dtype, processes=processes)
    return ZeroEngine(model, stage=stage, train=train, dtype=dtype, processes=processes)


class ZeroEngine:
    """DeepSpeed ZeRO-3."""

    def __init__(
        self, model: StageModel, *, stage: Stage, train: TrainConfig, dtype: str, processes: Processes
    ) -> None:
        import deepspeed
        from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

        self._processes = processes
        self.model = model.to_device(processes.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        config = deepspeed_config(stage, train=train, dtype=dtype, num_trained=sum(p.numel() for p in trained))
        for module in leaf_modules(model, max_parameters=train.zero.leaf_module_parameters):
            set_z3_leaf_module(module, True)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
        report = self.partition_report()
        logger.info("ZeRO-3 over %d process(es): %s", processes.world_size, asdict(report))
        if processes.world_size > 1 and report.partitioned < report.parameters / 2:
            raise ConfigError(
                f"only {report.partitioned} of {report.parameters} parameter elements are partitioned over the "
                f"processes: lower train.zero.persistence_threshold ({train.zero.persistence_threshold})"
            )

    def forward(self, **inputs: Any) -> Any:
        """Run the model's forward inside the engine."""
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient; the engine averages over processes, and the sum is wanted."""
        self._engine.backward(loss * self._processes.world_size, scale_wrt_gas=False)

    def gradient_norm(self) -> float:
        """Return the norm over all processes."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        # where gradients are offloaded they are moved and measured here; the step does it again
        self._optimizer.finalize_gradient_accumulation_boundary()
        return float(combine_grad_norm_groups(self._optimizer._get_norm_groups()))

    def discard(self) -> None:
        """Drop the gradient the way DeepSpeed does when it overflows; the next backward overwrites what is left."""
        self._optimizer._pre_step()
        self._optimizer._partition_all_parameters()
        self._optimizer._overflow_clean_up(self._optimizer.loss_scale)
        self._engine._unmanaged_backward_count = 0

    def step(self, *, learning_rate: float) -> float:
        """Update the parameters."""
        set_learning_rate(self._optimizer, learning_rate)
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    def save(self, directory: Path) -> None:
        """Write this process's shares."""
        self._engine.save_checkpoint(str(directory.parent), tag=directory.name, save_latest=False)

    def load(self, directory: Path) -> None:
        """Read this process's shares."""
        self._engine.load_checkpoint(str(directory.parent), tag=directory.name)

    def gathered(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[None]:
        """Gather one parameter."""
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter])

    def partition_report(self) -> PartitionReport:
        """Count the parameters by what DeepSpeed keeps of each."""
        parameters: list[Any] = list(self.model.parameters())
        partitioned = [parameter for parameter in parameters if not parameter.ds_persist]
        total = sum(parameter.ds_numel for parameter in parameters)
        whole = total - sum(parameter.ds_numel for parameter in partitioned)
        return PartitionReport(
            parameters=total,
            partitioned=total - whole,
            held=whole + sum(parameter.ds_tensor.numel() for parameter in partitioned),
        )

    def close(self) -> None:
        """Release the engine's hooks and buffers."""
        self._engine.destroy()


def deepspeed_config(stage: Stage, *, train: TrainConfig, dtype: str, num_trained: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for one stage.

    Raises:
        ConfigError: The element type is float16, or an override touches our own keys.
    """
    if dtype == "float16":
        raise ConfigError(
            "training in float16 needs loss scaling, which is not supported: set the student's dtype to bfloat16"
        )
    refused = sorted(set(train.zero.overrides) & set(OWN_KEYS))
    if refused:
        raise ConfigError(f"train.zero.overrides sets {', '.join(refused)}: these follow from the stage's own settings")
    config = train.stage(stage)
    own = {
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
                # the fused one is compiled at start-up
                "torch_adam": True,
            },
        },
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": train.zero.persistence_threshold,
            "reduce_bucket_size": min(num_trained, 500_000_000),
        },
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": 2**31,
    }
    return _merge(own, train.zero.overrides)


def leaf_modules(model: StageModel, *, max_parameters: int) -> list[nn.Module]:
    """Return the largest frozen modules of the student to gather whole; what is not called itself is looked into.

    Trained modules are left alone: a leaf reduces its gradients after its first backward call, and the Recalibrator
    is called twice per pass.
    """

    def search(module: nn.Module) -> Iterator[nn.Module]:
        parameters = list(module.parameters())
        frozen = not any(parameter.requires_grad for parameter in parameters)
        called = not isinstance(module, nn.ModuleList | nn.ModuleDict)
        if frozen and called and 0 < sum(parameter.numel() for parameter in parameters) <= max_parameters:
            yield module
        else:
            for child in module.children():
                yield from search(child)

    return list(search(model.student.base_model))


def _init_distributed(environment: Mapping[str, str]) -> bool:
    import deepspeed

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    if torch.distributed.is_initialized():
        return False
    os.environ.update(environment)
    # compiled at start-up where it is offered; training does not use it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(verbose=False)
    return True


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
