"""DeepSpeed ZeRO-3: the one place that makes its engine, in the process group of the launch."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from distill.call_order import require_same_calls
from distill.config import Backend, Stage, TrainConfig
from distill.engine import Engine, PartitionReport, TorchEngine, set_learning_rate
from distill.partitioned_loading import load_partitioned, whole_size
from distill.preflight import warn_of_stale_locks
from distill.processes import Processes, launch_environment, require_visible_gpu
from distill.rendezvous import ARRIVAL_TIMEOUT_S, join_process_group
from distill.reshard import is_resharded, load_resharded
from distill.stages import StageModel
from distill.student import load_student
from distill.watchdog import collective_timeout
from distill.zero_config import deepspeed_config
from teacher_cache.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def launched_processes(
    *, backend: Backend, num_processes: int, timeout: timedelta | None = None
) -> Iterator[Processes]:
    """Join the processes that a launcher started, or be the only one; no collective takes longer than ``timeout``.

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
    device = _own_device(int(environment["LOCAL_RANK"]))
    with _launch_variables(environment):
        initialised = backend == "zero3" and _init_distributed(
            environment, device=device, timeout=timeout or collective_timeout(TrainConfig())
        )
        try:
            yield Processes(rank=int(environment["RANK"]), world_size=world_size, device=device)
        finally:
            if initialised:
                import deepspeed

                deepspeed.comm.destroy_process_group()
                deepspeed.comm.comm.cdb = None


def check_before_start(train: TrainConfig, *, stages: Sequence[Stage], dtype: str) -> None:
    """Check the settings of the stages before anything is loaded.

    Raises:
        ConfigError: DeepSpeed's configuration contradicts a stage.
    """
    if train.backend == "zero3":
        for stage in stages:
            deepspeed_config(stage, train=train, dtype=dtype, num_trained=1)
        warn_of_stale_locks(os.environ)


def load_for_backend(
    path: Path, *, stage: Stage, train: TrainConfig, dtype: str, trust_remote_code: bool, processes: Processes
) -> transformers.PreTrainedModel:
    """Load a student, in shares where ``init_on_load`` asks for it; every process calls this."""
    if train.backend == "zero3" and train.zero.init_on_load:
        config = deepspeed_config(stage, train=train, dtype=dtype, num_trained=1)
        student = load_partitioned(
            path, dtype=dtype, trust_remote_code=trust_remote_code, zero_config=config, processes=processes
        )
        if student is not None:
            return student
        logger.warning("%s is loaded whole by every process: its weights are not stored as they are used", path)
    return load_student(path, dtype=dtype, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Make a module's parameters whole for reading, if they are partitioned; every process enters."""
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


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
        config = deepspeed_config(stage, train=train, dtype=dtype, num_trained=sum(map(whole_size, trained)))
        for module in leaf_modules(model, max_parameters=train.zero.leaf_module_parameters):
            set_z3_leaf_module(module, True)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
        if model.spec.with_answers:
            # read outside of its own module: met in the middle of a traced pass, it would break the trace
            for parameter in model.student.get_output_embeddings().parameters():
                deepspeed.zero.register_external_parameter(model, parameter)
        self._measure_norms = self._optimizer._get_norm_groups
        self._forget_norm()
        report = self.partition_report()
        logger.info("ZeRO-3 over %d process(es): %s", processes.world_size, asdict(report))
        if processes.world_size > 1 and report.partitioned < report.parameters / 2:
            raise ConfigError(
                f"only {report.partitioned} of {report.parameters} parameter elements are partitioned over the "
                f"processes: lower train.zero.persistence_threshold ({train.zero.persistence_threshold})"
            )

    def forward(self, **inputs: Any) -> Any:
        """Run the model's forward inside the engine."""
        if inputs.get("task", "losses") != "losses":  # those of a step are compared before its first, all at once
            require_same_calls([inputs], processes=self._processes)
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient; the engine averages over processes, and the sum is wanted."""
        self._engine.backward(loss * self._processes.world_size, scale_wrt_gas=False)

    def gradient_norm(self) -> float:
        """Return the norm over all processes; the step clips by it, and does not measure again."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        # where gradients are offloaded they are moved and measured here, and the step finds none left to move
        self._optimizer.finalize_gradient_accumulation_boundary()
        self._optimizer._offload_boundary_param_ids = set()
        norms = self._measure_norms()
        self._optimizer._get_norm_groups = lambda: norms
        return float(combine_grad_norm_groups(norms))

    def discard(self) -> None:
        """Drop the gradient the way DeepSpeed does when it overflows; the next backward overwrites what is left."""
        self._optimizer._pre_step()
        self._optimizer._partition_all_parameters()
        self._optimizer._overflow_clean_up(self._optimizer.loss_scale)
        self._engine._unmanaged_backward_count = 0
        self._forget_norm()

    def step(self, *, learning_rate: float) -> float:
        """Update the parameters."""
        set_learning_rate(self._optimizer, learning_rate)
        self._engine.step()
        self._forget_norm()
        return float(self._engine.get_global_grad_norm() or 0.0)

    def _forget_norm(self) -> None:
        """Let a step measure the norm itself unless `gradient_norm` has done so since the last one."""
        self._optimizer._get_norm_groups = self._measure_norms

    def save(self, directory: Path) -> None:
        """Write this process's shares."""
        self._engine.save_checkpoint(str(directory.parent), tag=directory.name, save_latest=False)

    def load(self, directory: Path) -> None:
        """Read this process's shares."""
        if is_resharded(directory):
            load_resharded(self._engine, self.model, directory, processes=self._processes)
            return
        try:
            self._engine.load_checkpoint(str(directory.parent), tag=directory.name)
        except ValueError as error:
            # torch's, where the optimizer has other groups than those that were saved
            raise CheckpointError(
                f"{directory} cannot be loaded ({error}): if train.zero was changed (sub_group_size), take that back, "
                f"or make it readable with `genrecal reshard {directory.parent.parent}`, then start again"
            ) from error

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


def leaf_modules(model: StageModel, *, max_parameters: int) -> list[nn.Module]:
    """Return the largest frozen modules of the student to gather whole; what is not called itself is looked into.

    Trained modules are left alone: a leaf reduces its gradients after its first backward call, and the Recalibrator
    is called twice per pass.
    """

    def search(module: nn.Module) -> Iterator[nn.Module]:
        parameters = list(module.parameters())
        frozen = not any(parameter.requires_grad for parameter in parameters)
        called = not isinstance(module, nn.ModuleList | nn.ModuleDict)
        if frozen and called and 0 < sum(map(whole_size, parameters)) <= max_parameters:
            yield module
        else:
            for child in module.children():
                yield from search(child)

    return list(search(model.student.base_model))


@contextlib.contextmanager
def _launch_variables(environment: Mapping[str, str]) -> Iterator[None]:
    """Set the launch variables, which DeepSpeed reads, for the block: what starts after it is of no launch."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _own_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    require_visible_gpu(local_rank, num_gpus=torch.cuda.device_count(), environment=os.environ)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _init_distributed(environment: Mapping[str, str], *, device: torch.device, timeout: timedelta) -> bool:
    """Make a process group unless there is one; return whether it was made."""
    import deepspeed

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    # compiled at start-up where it is offered; training does not use it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    is_ours = not torch.distributed.is_initialized()
    if is_ours:
        join_process_group(
            environment,
            backend=deepspeed.get_accelerator().communication_backend_name(),
            device=device,
            timeout=timeout,
            arrival_timeout_s=ARRIVAL_TIMEOUT_S,
        )
    else:
        # the group of a Ray Train worker, whose collectives end after half an hour
        torch.distributed.distributed_c10d._set_pg_timeout(timeout)
    deepspeed.init_distributed(verbose=False)
    # it makes groups of its own, and gives them torch's default limit: 10 minutes on GPUs
    deepspeed.comm.comm.cdb.new_group = partial(torch.distributed.new_group, timeout=timeout)
    return is_ours
