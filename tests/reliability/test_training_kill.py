"""R16: a trainer that is killed anywhere, also amid a save, goes on with the same numbers and the same samples."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from distill import loop as loop_module
from distill.checkpoint import RECORD, Record, committed_tags, find_checkpoint, read_checkpoint, save_checkpoint
from distill.engine import Engine
from distill.processes import Processes
from distill.step import Loop, Outcome, take_step
from distill.trainer import train_student
from teacher_cache.config import CacheConfig
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import STAGE, student_config, train_config
from tests.reliability.checkpoint_ops import Operations, counted
from tests.reliability.processes import quick_folder, run_in_child

SAVE_INTERVAL = 2
ZERO_STEPS = 12
ZERO_KILLS = (1, 4, 7, 10)
"""Steps after which a ZeRO-3 process is killed."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("killed")
    data = write_data(folder / "data", num_samples=13, text_only=(3, 9), multi_turn=(2, 7))
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=data, without_question_rows=("s001", "s005"))


def train(cache: CacheConfig, student: Path, output_dir: Path, *, max_steps: int, **changes: Any) -> None:
    """Train, and list the samples of every step that is taken in order.jsonl."""
    taken = output_dir / "order.jsonl"
    output_dir.mkdir(parents=True, exist_ok=True)

    def listing(loop: Loop, batches: Iterator[Any], *, step: int, **others: Any) -> Outcome | None:
        class Listed:
            def __init__(self) -> None:
                self.__dict__.update(vars(batches))

            def __getattr__(self, name: str) -> Any:
                return getattr(batches, name)

            def __next__(self) -> Any:
                part = next(batches)
                ids = [batch.sample_ids for batch in part.micro_batches]
                with taken.open("a") as file:
                    file.write(json.dumps([step, ids]) + "\n")
                return part

        return take_step(loop, Listed(), step=step, **others)  # type: ignore[arg-type]

    with mock.patch.object(loop_module, "take_step", listing):
        train_student(
            cache=cache,
            student=student_config(student),
            train=train_config(
                align=STAGE | {"max_steps": max_steps, "learning_rate": 1e-2},
                save_interval_steps=SAVE_INTERVAL,
                shuffle_gap_interval_steps=1000,
                **changes,
            ),
            output_dir=output_dir,
            stages=["align"],
        )


def metrics(output_dir: Path) -> list[str]:
    """Return the numbers of each step, floats as hexadecimal."""
    path = output_dir / "training/tiny/align/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = ("global_step", "train", "optim")
    return [json.dumps({k: float(v).hex() for k, v in line.items() if k.split("/")[0] in kept}) for line in lines]


def order(output_dir: Path) -> dict[int, set[str]]:
    """Return, for every step, the distinct lists of samples that it was taken with."""
    found: dict[int, set[str]] = {}
    for line in (output_dir / "order.jsonl").read_text().splitlines():
        step, ids = json.loads(line)
        found.setdefault(step, set()).add(json.dumps(ids))
    return found


def kill_soon(path: Path, *, lines: int, delay_s: float) -> None:
    """Kill this process a while after a file has so many lines."""

    def watch() -> None:
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            time.sleep(0.001)
        time.sleep(delay_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize(("max_kills", "steps"), [(4, 30), pytest.param(20, 110, marks=pytest.mark.slow)])
def test_kills_at_random_steps_change_no_number(
    max_kills: int, steps: int, cache: CacheConfig, tiny_llava: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(cache, tiny_llava, whole, max_steps=steps)
    log = killed / "training/tiny/align/metrics.jsonl"
    chooser, most_lost, kills = random.Random(0), 0, 0
    while kills < max_kills:
        before = len(metrics(killed))
        resumed = _newest(killed)
        most_lost = max(most_lost, before - resumed)
        target, delay_s = resumed + chooser.randint(1, 4), chooser.random() * 0.03

        # the lines that are computed again go first, so that the killed run's own are waited for
        if log.exists():
            log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:resumed]))

        def doomed(_: object, target: int = target, delay_s: float = delay_s) -> None:
            kill_soon(log, lines=target, delay_s=delay_s)
            train(cache, tiny_llava, killed, max_steps=steps)

        status, _ = run_in_child(doomed)
        assert status == -signal.SIGKILL
        kills += 1
    train(cache, tiny_llava, killed, max_steps=steps)
    assert metrics(killed) == metrics(whole)
    assert order(killed) == order(whole)
    assert all(len(lists) == 1 for lists in order(killed).values())
    # a step may have been under way, and the save of the one before it
    assert most_lost <= SAVE_INTERVAL
    exported = [(run / "training/tiny/align/recalibrator.safetensors").read_bytes() for run in (whole, killed)]
    assert exported[0] == exported[1]
    print(f"R16: torch: {kills} kills in {steps} steps: trace and samples identical, at most {most_lost} steps lost")


@pytest.mark.slow
def test_kills_under_zero3_change_no_number(cache: CacheConfig, tiny_llava: Path, tmp_path: Path) -> None:
    import deepspeed  # noqa: F401 - once, instead of in every child

    log = tmp_path / "killed/training/tiny/align/metrics.jsonl"
    zero3 = {"backend": "zero3", "zero": {"persistence_threshold": 0}}

    def child(name: str, *, lines: int | None = None) -> int:
        def act(_: object) -> None:
            if lines is not None:
                kill_soon(log, lines=lines, delay_s=0.0)
            train(cache, tiny_llava, tmp_path / name, max_steps=ZERO_STEPS, **zero3)

        return run_in_child(act)[0]

    for lines in ZERO_KILLS:
        assert child("killed", lines=lines) == -signal.SIGKILL
    assert child("killed") == 0
    assert child("whole") == 0
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert order(tmp_path / "killed") == order(tmp_path / "whole")
    for name in ("recalibrator.safetensors", "export/model.safetensors"):
        killed, whole = (tmp_path / run / "training/tiny/align" / name for run in ("killed", "whole"))
        assert killed.read_bytes() == whole.read_bytes()
    print(f"R16: ZeRO-3: {len(ZERO_KILLS)} kills in {ZERO_STEPS} steps: trace, samples and exported bytes identical")


def _newest(output_dir: Path) -> int:
    tags = committed_tags(output_dir / "training/tiny/align/checkpoints")
    return int(tags[-1].name.removeprefix("step-")) if tags else 0


def test_a_kill_at_any_operation_of_a_save_loses_no_checkpoint(
    cache: CacheConfig, tiny_llava: Path, tmp_path: Path
) -> None:
    kills = []

    def killed_everywhere(engine: Engine, directory: Path, *, record: Record, processes: Processes, keep: int) -> None:
        def save(folder: Path) -> None:
            save_checkpoint(engine, folder, record=record, processes=processes, keep=keep)

        if record.step == 3 * SAVE_INTERVAL:
            kills.append(kill_everywhere(save, directory, record=record, processes=processes))
        save(directory)

    with mock.patch.object(loop_module, "save_checkpoint", killed_everywhere):
        train(cache, tiny_llava, tmp_path, max_steps=3 * SAVE_INTERVAL + 1)
    assert kills[0] >= 25
    print(f"R16: {kills[0]} kills at every operation of a save: 0 lost checkpoints, every save done again")


def kill_everywhere(save: Callable[[Path], None], directory: Path, *, record: Record, processes: Processes) -> int:
    """Kill a save of the third checkpoint before each of its operations; return how many there are."""
    with quick_folder() as place:
        shutil.copytree(directory, place / "whole")
        operations = Operations()
        with counted(operations):
            save(place / "whole")
        expected = {
            tag.name: read_checkpoint(tag) for tag in (*committed_tags(directory), place / "whole" / _tag(record))
        }
        for number in range(1, operations.count + 1):
            folder = place / "killed"
            shutil.copytree(directory, folder)

            def doomed(_: object, number: int = number, folder: Path = folder) -> None:
                with counted(Operations(kill_at=number)):
                    save(folder)

            assert run_in_child(doomed)[0] == -signal.SIGKILL
            for again in (False, True):
                if again:
                    save(folder)
                found = find_checkpoint(folder, identity=record.identity, layout=record.layout, processes=processes)
                assert found is not None
                reference = expected[found.directory.name]
                assert reference is not None
                assert found.record == reference.record
                assert found.step == record.step or (not again and found.step == record.step - SAVE_INTERVAL)
            assert len(committed_tags(folder)) == 2
            assert not list(folder.glob("damaged-*"))
            shutil.rmtree(folder)
    return operations.count


def _tag(record: Record) -> str:
    return f"step-{record.step:08d}"


def test_the_record_is_what_counts(tmp_path: Path) -> None:
    (tmp_path / "step-00000002").mkdir()
    assert committed_tags(tmp_path) == []
    (tmp_path / "step-00000002" / RECORD).touch()
    assert [tag.name for tag in committed_tags(tmp_path)] == ["step-00000002"]
