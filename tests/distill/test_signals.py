"""A signal ends a run between two steps, whatever it is doing, and loses nothing; a second one ends it at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from distill import loop, stage_setup
from distill.loader import RankBatches
from teacher_cache.config import CacheConfig
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import STAGE, continue_align, numbers, read_metrics

SETTINGS: dict[str, Any] = {"align": STAGE | {"max_steps": 6}, "save_interval_steps": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("signals")
    data = write_data(folder / "data", num_samples=13)
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=data)


@pytest.fixture(scope="module")
def whole(cache: CacheConfig, tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    continue_align(cache, tiny_llava, folder, **SETTINGS)
    return numbers(read_metrics(folder, "align"))


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def in_set_up() -> Iterator[None]:
    """Send the signal while the data are joined with the cache."""
    with mock.patch.object(stage_setup, "join_cache", after(terminate, stage_setup.join_cache)):
        yield


@contextmanager
def in_save() -> Iterator[None]:
    """Send the signal at the beginning of the first save."""
    with mock.patch.object(loop, "save_checkpoint", after(terminate, loop.save_checkpoint)):
        yield


@contextmanager
def waiting_for_data() -> Iterator[None]:
    """Send the signal while the fourth step waits for samples that never come."""
    take = RankBatches.__next__
    taken = [0]

    def waiting(batches: RankBatches) -> Any:
        taken[0] += 1
        if taken[0] == 4:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            time.sleep(600)
        return take(batches)

    previous = signal.signal(signal.SIGALRM, lambda *_: terminate())
    with mock.patch.object(RankBatches, "__next__", waiting):
        yield
    signal.signal(signal.SIGALRM, previous)


@contextmanager
def in_the_last_step() -> Iterator[None]:
    """Send the signal after the last step has begun, when no step comes that would look for it."""
    take = loop.take_step

    def taking(*arguments: Any, step: int, **options: Any) -> Any:
        outcome = take(*arguments, step=step, **options)
        if step == SETTINGS["align"]["max_steps"] - 1:
            terminate()
        return outcome

    with mock.patch.object(loop, "take_step", taking):
        yield


def after(first: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **options: Any) -> Any:
        first()
        return call(*arguments, **options)

    return both


@pytest.mark.parametrize(
    ("during", "steps_done"),
    [(in_set_up, 0), (in_save, 2), (waiting_for_data, 3), (in_the_last_step, 6)],
    ids=["set-up", "save", "data", "last step"],
)
def test_a_signal_ends_the_run_and_loses_nothing(
    during: Callable[[], Any],
    steps_done: int,
    cache: CacheConfig,
    tiny_llava: Path,
    whole: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped, during():
        continue_align(cache, tiny_llava, tmp_path, **SETTINGS)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert time.monotonic() - began < 300
    tags = sorted((tmp_path / "training/tiny/align/checkpoints").glob("step-*"))
    assert [tag.name for tag in tags[-1:]] == ([f"step-{steps_done:08d}"] if steps_done else [])
    continue_align(cache, tiny_llava, tmp_path, **SETTINGS)
    assert numbers(read_metrics(tmp_path, "align")) == whole


def test_a_second_signal_ends_the_process_at_once() -> None:
    script = (
        "import os, signal, time\n"
        "from distill.signals import noted_signals\n"
        "with noted_signals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(signals.received, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert finished.returncode == -signal.SIGINT
    assert finished.stdout == f"{int(signal.SIGTERM)}\n"
