"""Makes each process's part of the coming steps ahead: in worker processes, or in a thread of this one."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from distill.batch import Batch
from distill.config import StageConfig, TrainConfig
from distill.data import JoinedData, RankBatch
from distill.encoder import StudentEncoder
from distill.order import SampleOrder, deal
from distill.processes import Processes
from distill.records import map_tensors, to_device
from distill.transport import pack, unpack
from teacher_cache import TeacherCache
from teacher_cache.errors import GenrecalError
from teacher_cache.prefetch import Prefetch
from teacher_cache.sample_file import SampleEntry
from teacher_cache.schema import Sample

GPU_WORKERS = 4
"""Worker processes where a GPU waits for them and the run file says nothing."""

_IMPORTED_ONCE = [__name__, "transformers.models.auto.processing_auto"]
"""By the process that worker processes are forked from; it does nothing else."""

Samples = Sequence[Sample | SampleEntry]


class RankBatches:
    """One process's part of the steps ``start`` to ``stop``, in order; to be used as a context manager.

    What making a part raises is raised where it is taken. Leaving the block ends all workers.
    """

    def __init__(
        self,
        data: JoinedData,
        *,
        order: SampleOrder,
        config: StageConfig,
        train: TrainConfig,
        processes: Processes,
        start: int,
        stop: int,
    ) -> None:
        """Begin to make the first parts; a teacher that runs in this process is asked in a thread of it."""
        self._device = processes.device
        self._copies = torch.cuda.Stream(processes.device) if processes.device.type == "cuda" else None
        self._filler: Batch | None = None
        self._data = data
        self.waited_s = 0.0
        """Seconds for which the caller waited for parts and for their way to the device."""
        shares = rank_shares(
            data,
            order=order,
            processes=processes,
            even_samples=config.micro_batch_tokens is None,
            steps=range(start, stop),
        )
        make = _Maker(data=data, micro_batch_size=config.micro_batch_size, micro_batch_tokens=config.micro_batch_tokens)
        num_workers = _num_workers(train, self._device) if isinstance(data.cache, TeacherCache) else 0
        self._source: Prefetch[RankBatch] | _Workers
        if num_workers == 0:
            self._source = Prefetch(map(make, shares))
        else:
            self._source = _Workers(make, shares, num_workers=num_workers, pin_memory=self._copies is not None)

    def __enter__(self) -> "RankBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.__exit__(kind, error, trace)

    def __iter__(self) -> "RankBatches":
        return self

    def __next__(self) -> RankBatch:
        began = time.perf_counter()
        try:
            return next(self._source)
        finally:
            self.waited_s += time.perf_counter() - began

    def on_device(self, micro_batches: Sequence[Batch], *, num: int) -> Iterator[Batch]:
        """Yield micro-batches on the device, then fillers up to a number."""
        filler: list[Batch] = []
        if num > len(micro_batches):
            self._filler = self._filler or self._data.filler_batch()
            filler = [self._filler] * (num - len(micro_batches))
        for batch in (*micro_batches, *filler):
            began = time.perf_counter()
            moved = self._to_device(batch)
            self.waited_s += time.perf_counter() - began
            yield moved

    def _to_device(self, batch: Batch) -> Batch:
        if self._copies is None:
            return to_device(batch, self._device)
        # beside the computation that is under way, so that waiting for the copy is not waiting for that
        with torch.cuda.stream(self._copies):
            moved = to_device(batch, self._device)
        self._copies.synchronize()
        computing = torch.cuda.current_stream(self._device)

        def keep_until_computed(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(computing)
            return tensor

        return map_tensors(moved, keep_until_computed)


def rank_shares(
    data: JoinedData, *, order: SampleOrder, processes: Processes, even_samples: bool, steps: range
) -> Iterator[list[Sample | SampleEntry]]:
    """Yield one process's samples of each step."""
    for step in steps:
        indices = order.step(step)
        shares = deal(data.lengths[indices], num_ranks=processes.world_size, even_samples=even_samples)
        yield [data.samples[index] for index in indices[shares[processes.rank]]]


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """Makes a part of its samples."""

    data: JoinedData
    micro_batch_size: int
    micro_batch_tokens: int | None

    def __call__(self, samples: Samples) -> RankBatch:
        return self.data.rank_batch(
            samples, micro_batch_size=self.micro_batch_size, micro_batch_tokens=self.micro_batch_tokens
        )


class _Workers:
    """Parts from worker processes of torch's DataLoader, at most one ahead per worker."""

    def __init__(self, make: _Maker, shares: Iterator[Samples], *, num_workers: int, pin_memory: bool) -> None:
        # not forked from this process: a copy of it would hold the locks of threads that it does not have
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED_ONCE)
        self._ending = context.Event()
        loader: DataLoader[Any] = DataLoader(
            _Parts(make, make.data.encoder.for_worker(self._ending, num_workers=num_workers)),
            sampler=shares,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            prefetch_factor=1,
            pin_memory=pin_memory,
            multiprocessing_context=context,
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),
        )
        self._parts: Any = iter(loader)

    def __next__(self) -> RankBatch:
        try:
            block, part = next(self._parts)
        except (EOFError, ConnectionError, RuntimeError) as error:
            # where a worker dies while its tensors are on their way, torch does not notice the death but the silence
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            raise GenrecalError(
                f"a process that loads data has died: {error!r}. It may have been short of memory, or of shared memory "
                "(/dev/shm): lower train.data_workers; start again to go on from the last checkpoint."
            ) from error
        if block is None:
            raise part
        return cast(RankBatch, unpack(block, part))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        processes = [*self._parts._workers]
        self._parts._shutdown_workers()
        for process in processes:
            process.kill()
            process.join()


class _Parts(Dataset[Any]):
    """Packed parts by their samples; an error of ours is sent as it is in the place of a part."""

    def __init__(self, make: _Maker, encoder: StudentEncoder) -> None:
        data = replace(make.data, samples=(), lengths=np.zeros(0, dtype=np.int64), encoder=encoder)
        self._make = replace(make, data=data)

    def __getitem__(self, samples: Samples) -> tuple[torch.Tensor | None, RankBatch | GenrecalError]:
        try:
            return pack(self._make(samples))
        except GenrecalError as error:
            return None, error


def _num_workers(train: TrainConfig, device: torch.device) -> int:
    if train.data_workers is not None:
        return train.data_workers
    return GPU_WORKERS if device.type == "cuda" else 0


def _as_it_is(part: Any) -> Any:
    return part


def _prepare_worker(_: int) -> None:
    # they may come to the whole group, and the process that trains decides what they mean
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_trainer, name="end-with-trainer", daemon=True).start()


def _end_with_trainer() -> None:
    # torch watches the process that forked this one, and that one lives as long as this one does
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    wait([trainer.sentinel])
    os._exit(1)
