"""Processes for tests: children that may die, and work spread over the cores."""

import gc
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from distill.processes import Processes

T = TypeVar("T")

WORKERS = 2


@contextmanager
def quick_folder() -> Iterator[Path]:
    """Give a new folder in memory where there is one, else a temporary one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def run_in_child(act: Callable[[Callable[..., None]], object]) -> tuple[int, list[str]]:
    """Fork and act; return the exit status, or minus the signal that killed it, and the words that it told."""
    receive, send = os.pipe()

    def tell(*words: str) -> None:
        os.write(send, "".join(f"{word}\n" for word in words).encode())

    child = os.fork()
    if child == 0:
        os.close(receive)
        try:
            act(tell)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as lines:
        told = lines.read().split()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told


def spread(items: Sequence[T], work: Callable[[T, Path], object]) -> None:
    """Do the work for each item, each in an empty folder of its own, in a few processes.

    Raises:
        AssertionError: it failed for an item, which is named.
    """
    context = get_context("fork")
    failures, failed = context.SimpleQueue(), context.Event()

    def labour(number: int) -> None:
        gc.freeze()  # what was there before the fork need not be searched for garbage
        with quick_folder() as folder:
            for item in items[number::WORKERS]:
                place = folder / "place"
                place.mkdir()
                try:
                    work(item, place)
                except BaseException:
                    failures.put(f"{item}:\n{_last_error()}")
                    failed.set()
                    return
                shutil.rmtree(place)
                if failed.is_set():
                    break

    processes = [context.Process(target=labour, args=(number,)) for number in range(WORKERS)]
    _run(processes, failures, on_failure=failed.set)


def run_together(acts: Sequence[Callable[[], object]], *, on_failure: Callable[[], object]) -> None:
    """Act in as many processes at once; the first that fails calls ``on_failure``, so that no other waits for it.

    Raises:
        AssertionError: one failed.
    """
    context = get_context("fork")
    failures = context.SimpleQueue()

    def labour(act: Callable[[], object]) -> None:
        gc.freeze()
        try:
            act()
        except BaseException:
            on_failure()
            failures.put(_last_error())

    _run([context.Process(target=labour, args=(act,)) for act in acts], failures, on_failure=on_failure)


def run_ranks(act: Callable[[Processes], object], place: Path, *, world_size: int = 2) -> None:
    """Act in as many processes, which share a group of torch.distributed.

    Raises:
        AssertionError: one failed.
    """

    def join(rank: int) -> None:
        limit = timedelta(seconds=120)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{place}/ranks", rank=rank, world_size=world_size, timeout=limit
        )
        act(Processes(rank=rank, world_size=world_size, device=torch.device("cpu")))
        torch.distributed.destroy_process_group()

    (place / "ranks").unlink(missing_ok=True)
    run_together([partial(join, rank) for rank in range(world_size)], on_failure=lambda: None)


def _last_error() -> str:
    """Return the end of what went wrong, short enough for a pipe that nobody reads yet."""
    return traceback.format_exc()[-10_000:]


def _run(processes: Sequence[Any], failures: Any, *, on_failure: Callable[[], object]) -> None:
    """Wait for all; one that dies tells nothing, and the others must not wait for it."""
    for process in processes:
        process.start()
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                on_failure()
    found = [f"a process ended with exit code {process.exitcode}" for process in processes if process.exitcode]
    while not failures.empty():
        found.append(failures.get())
    assert not found, "\n".join(found)
