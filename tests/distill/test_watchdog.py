"""A process that stands still ends itself, says where it stood, and asks to be started again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.processes import Processes
from distill.watchdog import EXIT_CODE, Watchdog
from tests.distill.injected_faults import injected
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import STAGE, continue_align, read_metrics
from tests.reliability.processes import run_in_child

LIMIT_S = 1.0
GRACE_S = 20.0
"""What a busy machine may add to a limit."""


def run_script(body: str) -> tuple[int, str, float]:
    began = time.monotonic()
    script = f"import logging, time\nfrom distill.watchdog import Watchdog\nlogging.basicConfig()\n{body}"
    root = Path(__file__).parents[2]
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=root, check=False
    )
    return finished.returncode, finished.stderr, time.monotonic() - began


def test_what_does_not_end_in_time_ends_the_process() -> None:
    code, log, seconds = run_script(
        "def stands_still():\n    time.sleep(250)\n"
        f"with Watchdog() as watchdog:\n    watchdog.expect('step 7', within_s={LIMIT_S})\n    stands_still()\n"
    )
    assert code == EXIT_CODE == 3
    assert "step 7 did not end within 1 s" in log
    assert "in stands_still" in log
    assert LIMIT_S <= seconds < 50


def test_what_ends_in_time_goes_on() -> None:
    code, log, _ = run_script(
        "with Watchdog() as watchdog:\n"
        "    for step in range(8):\n"
        "        watchdog.expect(f'step {step}', within_s=60)\n"
        "        time.sleep(0.01)\n"
        "time.sleep(0.1)\n"
    )
    assert (code, log) == (0, "")


def test_a_step_that_hangs_ends_the_run_and_the_next_one_goes_on(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_qwen2_vl: Path,
    tiny_llava: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path_factory.mktemp("hang")
    data = write_data(folder / "data", num_samples=13)
    cache = build_small_cache(folder, teacher=tiny_qwen2_vl, data=data)
    settings: dict[str, Any] = {"align": STAGE | {"max_steps": 5}, "save_interval_steps": 1}

    def hang(*_: Any, **__: Any) -> None:
        time.sleep(10_000)

    def hanging(_: Callable[..., None]) -> None:
        import logging

        logging.basicConfig(force=True)
        with injected({3: hang}):
            continue_align(cache, tiny_llava, folder / "run", hang_timeout_s=10.0, **settings)

    status, _ = run_in_child(hanging)
    assert status == EXIT_CODE
    log = capfd.readouterr().err
    assert "tiny align: step 3 did not end within 10 s" in log
    assert "in hang" in log
    continue_align(cache, tiny_llava, folder / "run", **settings)
    assert [record["global_step"] for record in read_metrics(folder / "run", "align")] == [1, 2, 3, 4, 5]
    print("R27: a step that hangs: exit code 3 at its limit, the step and all stacks in the log, resumed")


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_the_survivor_of_a_pair_does_not_wait_for_ever(number: int, tmp_path: Path) -> None:
    # one that is killed must be noticed without the limit, which a busy machine might reach before
    limits_s = (LIMIT_S if number == signal.SIGSTOP else 10 * GRACE_S, 10 * GRACE_S)
    children = [
        _fork_rank(rank, place=tmp_path / "store", number=number, limit_s=limit_s)
        for rank, limit_s in enumerate(limits_s)
    ]
    began = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
    seconds = time.monotonic() - began
    os.kill(children[1], signal.SIGKILL)
    os.waitpid(children[1], 0)
    # a peer that is gone is an error at once; one that stands still is one after the limit
    assert status == (EXIT_CODE if number == signal.SIGSTOP else 1)
    assert seconds < LIMIT_S + 2 * GRACE_S
    print(f"R27: a peer after {signal.Signals(number).name}: the survivor ended with exit code {status}")


def _fork_rank(rank: int, *, place: Path, number: int, limit_s: float) -> int:
    child = os.fork()
    if child:
        return child
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
        processes = Processes(rank=rank, world_size=2, device=torch.device("cpu"))
        with Watchdog() as watchdog:
            for step in range(1000):
                watchdog.expect(f"step {step}", within_s=limit_s)
                if rank == 1 and step == 5:
                    os.kill(os.getpid(), number)
                processes.sum([1.0])
    except BaseException:
        os._exit(1)
    os._exit(0)
