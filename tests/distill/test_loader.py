"""R19: a process's parts of the steps, made in a thread or in worker processes, stopped and taken up anywhere."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from torch import Tensor

from distill.config import AlignConfig, StudentConfig, TrainConfig
from distill.data import JoinedData, RankBatch, join_cache
from distill.encoder import SampleReader, StudentEncoder
from distill.loader import RankBatches
from distill.order import SampleOrder
from distill.processes import Processes
from distill.stage_spec import stage_spec
from teacher_cache import open_cache
from teacher_cache.chat import load_processor
from teacher_cache.config import CacheConfig, DataConfig
from teacher_cache.errors import DataError, GenrecalError
from teacher_cache.sample_file import SampleFile, scan_samples
from teacher_cache.samples import read_samples
from tests.distill.small_cache import build_small_cache, write_data

NUM_SAMPLES, GLOBAL_BATCH, EPOCHS = 13, 5, 2
STEPS = -(-EPOCHS * NUM_SAMPLES // GLOBAL_BATCH)
RANKS = (1, 2, 4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("loader")
    data = write_data(
        folder / "data",
        num_samples=NUM_SAMPLES,
        text_only=(3, 4, 8),
        multi_turn=(2, 5),
        image_sizes=((16, 16), (40, 24)),
    )
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=data, without_question_rows=("s000", "s004", "s007"))


@pytest.fixture(scope="module")
def student(tiny_qwen2_vl: Path) -> Path:
    return tiny_qwen2_vl


def join(cache: CacheConfig, student: Path, *, max_length: int = 512) -> JoinedData:
    config = StudentConfig(name="s", model=str(student), max_length=max_length)
    return join_cache(
        open_cache(cache.uri),
        scan_samples(cache.data),
        encoder=StudentEncoder(load_processor(str(student)), config=config, memory_mib=1),
        spec=stage_spec("align", method="genrecal", train=TrainConfig(), has_images=True),
        max_samples=None,
        reader=SampleReader(cache.data),
    )


def batches_of(
    data: JoinedData, *, workers: int, rank: int = 0, num_ranks: int = 1, start: int = 0, **config: Any
) -> RankBatches:
    settings = {"global_batch_size": GLOBAL_BATCH, "micro_batch_size": 3, "micro_batch_tokens": 150, **config}
    return RankBatches(
        data,
        order=SampleOrder(num_samples=len(data.samples), global_batch_size=GLOBAL_BATCH, seed=3, stage="align"),
        config=AlignConfig.model_validate(settings),
        train=TrainConfig(data_workers=workers),
        processes=Processes(rank=rank, world_size=num_ranks, device=torch.device("cpu")),
        start=start,
        stop=STEPS,
    )


def tensors_in(record: object) -> Iterator[Tensor]:
    if isinstance(record, Tensor):
        yield record
    elif isinstance(record, dict):
        for value in record.values():
            yield from tensors_in(value)
    elif isinstance(record, tuple):
        for value in record:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(record):
        for field in dataclasses.fields(record):
            yield from tensors_in(getattr(record, field.name))


def digest(part: RankBatch) -> str:
    state = hashlib.sha256(repr((part.skipped, [batch.sample_ids for batch in part.micro_batches])).encode())
    for tensor in tensors_in(part.micro_batches):
        state.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def ids_of(parts: Sequence[RankBatch]) -> list[str]:
    met = [id_ for part in parts for batch in part.micro_batches for id_ in batch.sample_ids]
    return met + [bad.sample_id for part in parts for bad in part.skipped]


def check_restart(
    data: JoinedData, expected: Sequence[str], *, workers: int, rank: int, num_ranks: int, start: int
) -> None:
    fresh = dataclasses.replace(data, encoder=data.encoder.for_worker(None, num_workers=1))
    with batches_of(fresh, workers=workers, rank=rank, num_ranks=num_ranks, start=start) as tail:
        assert [digest(part) for part in tail] == expected[start:]


def test_r19_stopped_and_taken_up_at_every_step(cache: CacheConfig, student: Path) -> None:
    data = join(cache, student, max_length=60)
    order = SampleOrder(num_samples=NUM_SAMPLES, global_batch_size=GLOBAL_BATCH, seed=3, stage="align")
    asked = [[data.sample_ids[index] for index in order.step(step)] for step in range(STEPS)]
    stream = list(itertools.chain(*asked))
    for epoch in range(EPOCHS):
        assert sorted(stream[epoch * NUM_SAMPLES : (epoch + 1) * NUM_SAMPLES]) == sorted(data.sample_ids)
    restarts = 0
    for num_ranks in RANKS:
        by_rank = []
        for rank in range(num_ranks):
            with batches_of(data, workers=0, rank=rank, num_ranks=num_ranks) as whole:
                by_rank.append(list(whole))
            expected = [digest(part) for part in by_rank[rank]]
            for start in range(STEPS):
                check_restart(data, expected, workers=0, rank=rank, num_ranks=num_ranks, start=start)
                restarts += 1
                if start % num_ranks == rank:
                    check_restart(data, expected, workers=2, rank=rank, num_ranks=num_ranks, start=start)
                    restarts += 1
        for step in range(STEPS):
            # the same global batch whatever the number of processes: a run may go on with another one
            assert sorted(ids_of([parts[step] for parts in by_rank])) == sorted(asked[step])
    assert any(bad.reason == "too-long" for parts in by_rank for part in parts for bad in part.skipped)
    print(f"R19: {restarts} restarts of {STEPS} steps over {EPOCHS} epochs, by {RANKS} processes: 0 tails differ")


def test_parts_keep_to_the_budget_and_are_sorted(cache: CacheConfig, student: Path) -> None:
    data = join(cache, student)
    budget = 150
    with batches_of(data, workers=0, micro_batch_size=4, micro_batch_tokens=budget) as parts:
        batches = [batch for part in parts for batch in part.micro_batches]
    alone = [batch for batch in batches if batch.student.input_ids.numel() > budget]
    assert all(len(batch.sample_ids) == 1 for batch in alone)
    assert {len(batch.sample_ids) for batch in batches} >= {1, 2, 3}
    for batch in batches:
        assert 1 <= len(batch.sample_ids) <= 4
        lengths = batch.student.attention_mask.sum(1).tolist()[: len(batch.sample_ids)]
        assert lengths == sorted(lengths, reverse=True)
        assert batch.num_tokens == sum(lengths)
        assert batch.regularization is not None


def test_an_error_of_a_worker_keeps_its_type_and_message(cache: CacheConfig, student: Path) -> None:
    table = scan_samples(cache.data)
    changed = tuple(dataclasses.replace(entry, digest="0" * 64) for entry in table.samples[5:6])
    data = join(cache, student)
    wrong = dataclasses.replace(data, samples=(*data.samples[:5], *changed, *data.samples[6:]))
    wrong = dataclasses.replace(wrong, encoder=data.encoder.for_worker(None, num_workers=1))
    messages = []
    for workers in (0, 1):
        with pytest.raises(DataError, match="sample s005 of digest 0000") as caught:
            take_all(wrong, workers=workers)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def take_all(data: JoinedData, *, workers: int) -> None:
    with batches_of(data, workers=workers) as parts:
        for _ in parts:
            pass


def is_worker(pid: int) -> bool:
    """Whether a process is a worker and runs."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        return "pt_data_worker" in status.splitlines()[0] and "State:\tZ" not in status
    return False


def parent_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(re.findall(r"^PPid:\s(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0])
    return 0


def own_workers() -> set[int]:
    """Workers of this process: children of the child that forks them."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return {pid for pid in pids if is_worker(pid) and parent_of(parent_of(pid)) == os.getpid()}


def both_workers() -> set[int]:
    """Wait until both of two workers are there: the second may not have its name yet when the first has answered."""
    end = time.monotonic() + 60
    while len(found := own_workers()) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("how", ["left", "error"])
def test_an_early_end_leaves_no_worker(cache: CacheConfig, student: Path, how: str) -> None:
    data = join(cache, student)
    with contextlib.suppress(ZeroDivisionError), batches_of(data, workers=2) as parts:
        next(parts)
        assert len(both_workers()) == 2
        if how == "error":
            raise ZeroDivisionError
    assert not own_workers()


def test_workers_leave_signals_to_the_process_that_trains(cache: CacheConfig, student: Path) -> None:
    data = join(cache, student)
    with batches_of(data, workers=0) as parts:
        expected = [digest(part) for part in parts]
    with batches_of(data, workers=2) as parts:
        got = [digest(next(parts)), digest(next(parts))]  # one of each worker
        for pid in own_workers():
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        assert [*got, *(digest(part) for part in parts)] == expected


def take_all_but_kill_workers(data: JoinedData) -> None:
    with batches_of(data, workers=2) as parts:
        next(parts)
        for pid in own_workers():
            os.kill(pid, signal.SIGKILL)
        for _ in parts:
            pass


def test_a_worker_that_is_killed_ends_the_run_with_advice(cache: CacheConfig, student: Path) -> None:
    data = join(cache, student)
    with pytest.raises(GenrecalError, match=r"a process that loads data has died.*train\.data_workers"):
        take_all_but_kill_workers(data)
    assert not own_workers()


def hold_workers(cache: str, student: str) -> None:
    """Take one part, name the workers on standard output, and wait to be killed."""
    with batches_of(join(CacheConfig.model_validate_json(cache), Path(student)), workers=2) as parts:
        next(parts)
        print(json.dumps([*both_workers()]), flush=True)
        time.sleep(600)


def test_workers_end_when_the_process_that_trains_is_killed(cache: CacheConfig, student: Path) -> None:
    code = f"from {__name__} import hold_workers; hold_workers(*__import__('sys').argv[1:])"
    command = [sys.executable, "-c", code, cache.model_dump_json(), str(student)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as process:
        assert process.stdout is not None
        workers = next(json.loads(line) for line in process.stdout if line.startswith("["))
        assert len(workers) == 2
        process.kill()
    end = time.monotonic() + 60
    while any(map(is_worker, workers)):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_wait_is_the_time_that_the_caller_stood_still(
    cache: CacheConfig, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = join(cache, student)
    make, made = JoinedData.rank_batch, threading.Semaphore(0)

    def slow(self: JoinedData, *args: Any, **kwargs: Any) -> RankBatch:
        time.sleep(1.0)
        part = make(self, *args, **kwargs)
        made.release()
        return part

    monkeypatch.setattr(JoinedData, "rank_batch", slow)
    with batches_of(data, workers=0) as parts:
        next(parts)
        first = parts.waited_s
        assert first >= 0.9
        # the caller computes until the next part is made
        assert made.acquire(timeout=60)
        assert made.acquire(timeout=60)
        next(parts)
        assert parts.waited_s - first < 0.5


def test_fillers_make_up_the_number_and_weigh_nothing(cache: CacheConfig, student: Path) -> None:
    data = join(cache, student)
    with batches_of(data, workers=0, micro_batch_size=2) as parts:
        part = next(parts)
        batches = list(parts.on_device(part.micro_batches, num=len(part.micro_batches) + 2))
    for filler in batches[-2:]:
        assert filler.sample_ids == ()
        assert filler.num_tokens == 0
        assert filler.main is not None
        assert filler.regularization is not None
        weights = [filler.main.weights, filler.regularization.weights, filler.student.weights]
        assert sum(float(one.abs().sum()) for one in weights) == 0
        assert filler.student.model_inputs.keys() == batches[0].student.model_inputs.keys()


def test_data_is_read_in_any_order_from_row_groups(tmp_path: Path, digit_samples: Path) -> None:
    table = pyarrow.parquet.read_table(digit_samples)
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=5)
    config = DataConfig(path=str(path))
    entries = scan_samples(config).samples
    expected = read_samples(config).samples
    for held_bytes in (0, 2**30):
        with SampleFile(config, held_bytes=held_bytes) as file:
            chosen = [17, 3, 16, 2, 27, 3]
            assert file.read([entries[index] for index in chosen]) == [expected[index] for index in chosen]
            assert len(file._groups) == (1 if held_bytes == 0 else 3)
