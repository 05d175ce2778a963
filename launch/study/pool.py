"""Tasks in parallel processes: each process does one after the other, and one that dies takes only its task along."""

import importlib
import logging
import multiprocessing
import os
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

from launch.processes import FATE_SHARED, end_with_parent

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 60.0
"""Seconds that a task has for its checkpoint when the study is stopped."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call in a process of its own."""

    name: str
    target: str
    """``module:function``."""
    arguments: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a task ended."""

    task: Task
    error: str | None
    """None where it went well."""
    seconds: float


@dataclass(kw_only=True)
class _Worker:
    process: Any
    pipe: Connection
    task: Task | None = None
    began: float = 0.0


class Pool:
    """Processes that do tasks; they start when there is work and stay for the next tasks.

    When the caller leaves early, running tasks get SIGTERM and time to keep what they have.
    """

    def __init__(self, *, workers: int, threads: int, log_dir: Path) -> None:
        self._workers, self._threads, self._log_dir = workers, threads, log_dir
        self._crew: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _stop(self._crew)

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """Run tasks in their order, so many at a time, and yield each as it ends, well or not."""
        queue = deque(tasks)
        while len(self._crew) < min(self._workers, len(tasks)):
            self._crew.append(_start(self._threads, self._log_dir))
        for worker in self._crew:
            _give(worker, queue)
        while busy := [worker for worker in self._crew if worker.task]:
            ready = wait([worker.pipe for worker in busy])
            for worker in busy:
                if worker.pipe not in ready:
                    continue
                outcome, alive = _outcome(worker)
                if not alive:
                    self._crew.remove(worker)
                    worker = _start(self._threads, self._log_dir)
                    self._crew.append(worker)
                _give(worker, queue)
                yield outcome


def _start(threads: int, log_dir: Path) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # what a child reads when it imports must be in the environment before it starts
    previous = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", FATE_SHARED)}
    os.environ |= {"OMP_NUM_THREADS": str(threads), FATE_SHARED: str(os.getpid())}
    try:
        process = context.Process(target=_work, args=(theirs, threads, log_dir), daemon=False)
        process.start()
    finally:
        for name, value in previous.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    theirs.close()
    return _Worker(process=process, pipe=ours)


def _give(worker: _Worker, queue: deque[Task]) -> None:
    worker.task = queue.popleft() if queue else None
    worker.began = time.monotonic()
    if worker.task is not None:
        worker.pipe.send(worker.task)


def _outcome(worker: _Worker) -> tuple[Outcome, bool]:
    """Return how the worker's task ended, and whether the worker can take another."""
    assert worker.task is not None
    try:
        error, alive = worker.pipe.recv(), True
    except EOFError:
        worker.process.join()
        error, alive = f"the process ended with exit code {worker.process.exitcode}", False
    return Outcome(task=worker.task, error=error, seconds=time.monotonic() - worker.began), alive


def _stop(crew: Sequence[_Worker]) -> None:
    for worker in crew:
        worker.pipe.close()
        if worker.task is not None:
            worker.process.terminate()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for worker in crew:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(pipe: Connection, threads: int, log_dir: Path) -> None:
    """Do tasks until the other side is gone."""
    end_with_parent()
    import torch

    from launch.logs import setup_logging

    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would say so on the console
    setup_logging(log_dir / f"worker-{os.getpid()}.log", console=False)
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        logger.info("begin %s", task.name)
        error = None
        try:
            module, function = task.target.split(":")
            getattr(importlib.import_module(module), function)(*task.arguments)
        except Exception as fault:
            logger.exception("%s failed", task.name)
            error = "".join(traceback.format_exception_only(fault)).strip()
        with suppress(BrokenPipeError):
            pipe.send(error)
