"""Sends the metrics to TensorBoard, Weights & Biases, Comet and CSV through DeepSpeed's own monitors.

The sections of a DeepSpeed configuration decide: ``tensorboard``, ``wandb``, ``csv_monitor``, ``comet``. They are kept
from DeepSpeed's engine, which would log beside them under a count of samples. Keys come from the environment alone.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.processes import Processes
from teacher_cache.errors import ConfigError

FOLDERS = {"tensorboard": "tensorboard", "csv_monitor": "csv"}
"""Sections that write files, and the folder of a run in which they do where the section names none."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which stage of which student writes, and where its run lies."""

    output_dir: Path
    student: str
    stage: str


class Monitors:
    """Where metrics go beside metrics.jsonl; nowhere without a section that is enabled, or on other processes."""

    def __init__(self, master: Any) -> None:
        self._master = master

    def write(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log the metrics of one step under their own names."""
        if self._master is not None:
            self._master.write_events([(name, float(value), step) for name, value in metrics.items() if "/" in name])


@contextlib.contextmanager
def open_monitors(
    sections: Mapping[str, dict[str, Any]], *, place: Place, start: int, processes: Processes
) -> Iterator[Monitors]:
    """Open the monitors of one stage, which goes on after step ``start``.

    Every stage of every student is a run of its own, since each counts its steps from 1.

    Raises:
        ConfigError: The package of a monitor is not installed.
    """
    if not sections or processes.rank > 0:
        yield Monitors(None)
        return
    with _deepspeed_rank(), _wandb_run(sections, place=place):
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        try:
            master: Any = MonitorMaster(get_monitor_config(_placed(sections, place=place)))
        except ImportError as error:
            raise ConfigError(
                f"the DeepSpeed sections {', '.join(sections)} need a package that is missing: pip install {error.name}"
            ) from error
        if master.tb_monitor is not None and start > 0:
            _forget_after(master.tb_monitor.summary_writer, step=start)
        try:
            yield Monitors(master)
        finally:
            if master.tb_monitor is not None:
                master.tb_monitor.summary_writer.close()


def _placed(sections: Mapping[str, dict[str, Any]], *, place: Place) -> dict[str, dict[str, Any]]:
    """Return the sections with a folder for this stage alone."""
    placed = {}
    for name, section in sections.items():
        if name in FOLDERS:
            base = section.get("output_path") or str(place.output_dir / FOLDERS[name])
            job = "/".join([*filter(None, [section.get("job_name")]), place.student, place.stage])
            section = {**section, "output_path": base, "job_name": job}
        placed[name] = section
    return placed


@contextlib.contextmanager
def _deepspeed_rank() -> Iterator[None]:
    """Let DeepSpeed's communication know this process's rank, which the monitors ask; the torch backend has none."""
    if torch.distributed.is_initialized():
        yield
        return
    import deepspeed

    # compiled at start-up where it is offered
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)
    try:
        yield
    finally:
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None


@contextlib.contextmanager
def _wandb_run(sections: Mapping[str, Any], *, place: Place) -> Iterator[None]:
    """Name the stage's run of Weights & Biases, which DeepSpeed does not, and end it with the stage."""
    if "wandb" not in sections:
        yield
        return
    named = "WANDB_NAME" in os.environ
    if not named:
        os.environ["WANDB_NAME"] = f"{place.student} {place.stage}"
    try:
        yield
        import wandb

        wandb.finish()
    finally:
        if not named:
            del os.environ["WANDB_NAME"]


def _forget_after(writer: Any, *, step: int) -> None:
    """Have TensorBoard drop what a killed run logged after the step from which this one goes on."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer.file_writer.event_writer.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
