"""Train a student in the workers of a Ray Train job, one training process each.

For those whose platform starts everything through Ray Train; `genrecal submit ray` needs none of it. The output
folder must be on storage that all nodes share: checkpoints stay there, and a worker group that is started again goes
on from the newest, so nothing is handed to Ray Train but a worker's failure.
"""

from pathlib import Path
from typing import Any

from launch.run_config import RunConfig
from teacher_cache.build import ray_session
from teacher_cache.errors import GenrecalError


def train_with_ray(
    config: RunConfig, *, student: str | None = None, cpus_per_worker: float = 1.0, max_failures: int = 3
) -> None:
    """Train one student with ``train.num_processes`` Ray Train workers, on GPUs where the cluster has any.

    Args:
        config: The run file.
        student: Which student, where the run file has several.
        cpus_per_worker: CPUs to reserve for each worker.
        max_failures: How often all workers are started again after one is lost or failed.

    Raises:
        ConfigError: The Ray cluster asks for no token, or others may read it.
        GenrecalError: Training failed more often than that.
    """
    chosen, workers = config.student(student).name, config.train.num_processes
    session = ray_session(
        num_cpus=workers * cpus_per_worker, insecure=config.cache.build.insecure_ray, log_to_driver=True
    )
    with session as ray:
        # Ray takes its authentication mode when it is imported, so not before the session
        from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
        from ray.train import RunConfig as RayRunConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        on_gpus = ray.cluster_resources().get("GPU", 0) > 0
        trainer = TorchTrainer(
            _train,
            train_loop_config={"config": config.model_dump(mode="json"), "student": chosen},
            torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=on_gpus,
                resources_per_worker={"CPU": cpus_per_worker} | ({"GPU": 1} if on_gpus else {}),
            ),
            run_config=RayRunConfig(
                name=f"genrecal-{chosen}",
                storage_path=str((Path(config.output_dir) / "ray-train").resolve()),
                failure_config=FailureConfig(max_failures=max_failures),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise GenrecalError(f"training {chosen} in Ray Train failed: {error}") from error


def _train(settings: dict[str, Any]) -> None:
    from distill.trainer import train_student

    config = RunConfig.model_validate(settings["config"])
    student = config.student(settings["student"])
    train_student(
        cache=config.cache,
        student=student.alone(),
        train=student.settings(config.train),
        output_dir=Path(config.output_dir),
    )
